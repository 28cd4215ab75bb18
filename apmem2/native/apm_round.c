/* apm_round.c - how do the jobs of a file that waited become durable together?
 *
 * The unit is the round: all jobs of one file that waited, run together, one round of a file at a time (law 2). Copies go
 * first, in runs of adjacent bytes; then the pages, sorted, overlapping and adjacent ones merged and nothing in between
 * added (law 11). What a round costs is its device flushes, each about as much as thirty of anything else. So:
 *
 *   - one run of copies and nothing else: one pwritev2(RWF_DSYNC);
 *   - one run of pages and nothing else: one msync;
 *   - more, where the file system is known to make earlier write-back durable with any later sync of the file
 *     (apm_file.one_flush): plain writes; sync_file_range starts the writing of every run, then waits for every run; then one
 *     msync, of the last, commits and flushes for all;
 *   - more, elsewhere: each run its own RWF_DSYNC or msync.
 *
 * fdatasync would do in place of the last msync, but it writes whatever else is dirty in the file as well (law 11). The first
 * error of a sync latches the file, and every job of the round learns of it (law 4). */
#include "apm_internal.h"

#include <string.h>
#include <sys/uio.h>

/* ---- the round ---------------------------------------------------------------------------------------------------- */

struct span {
    uint64_t begin, end;
    struct apm_record *record;
};

/* Shell sort by begin: no memory, at most APM_ROUND_JOBS_MAX spans that mostly come sorted. Gaps: Ciura 2001. */
static void sort_spans(struct span *spans, uint32_t count) {
    static const uint32_t gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof *gaps; g++)
        for (uint32_t i = gaps[g]; i < count; i++) {
            struct span moved = spans[i];
            uint32_t j = i;
            for (; j >= gaps[g] && spans[j - gaps[g]].begin > moved.begin; j -= gaps[g])
                spans[j] = spans[j - gaps[g]];
            spans[j] = moved;
        }
}

static bool is_write(const struct apm_record *record) {
    return record->job.kind == APM_JOB_COPY || record->job.kind == APM_JOB_FILL;
}

/* Errors that say: refused before a byte reached the page cache. No sync gives these, so even under RWF_DSYNC they are the
 * caller's alone. */
static bool callers_alone(int code) { return code == -EFAULT || code == -EFBIG; }

/* One written run has ended with result: who learns what. durable: it was written with RWF_DSYNC. */
static void settle_run(struct apm_file_full *file, struct span *run, uint32_t count, int result, bool durable, bool wrote) {
    for (uint32_t i = 0; i < count; i++) {
        run[i].record->code = result;
        run[i].record->needs_sync = result == 0 && !durable;
    }
    if (result < 0 && wrote && !(durable ? callers_alone(result) : apm_sync_refused(result)))
        apm_file_fail(&file->pub, result);
}

/* ---- writing -------------------------------------------------------------------------------------------------------- */

static bool mergeable(const struct apm_record *record) {
    return record->job.kind == APM_JOB_COPY && record->job.map->by_pwrite && (record->job.flags & APM_F_SOURCE_OWNED) &&
           record->job.size < APM_PIECE;
}

/* Where the run that begins at spans[i] ends: adjacent copies whose bytes are ours, up to a piece of work. */
static uint32_t run_end(const struct span *spans, uint32_t i, uint32_t count) {
    uint32_t next = i + 1;
    uint64_t total = spans[i].record->job.size;
    if (!mergeable(spans[i].record))
        return next;
    for (; next < count && next - i < APM_RUN_PIECES && total < APM_PIECE; next++) {
        if (spans[next].begin != spans[next - 1].end || !mergeable(spans[next].record))
            break;
        total += spans[next].record->job.size;
    }
    return next;
}

/* The copies and fills of the round: sorted when any order will do, which is when no two touch the same byte and the bytes
 * to be copied are not in the file themselves; else in the order of their calls. */
static uint32_t gather_writes(struct apm_record *jobs, struct span *spans) {
    uint32_t count = 0;
    bool all_merge = true, overlap = false;
    for (struct apm_record *record = jobs; record; record = record->next)
        if (is_write(record)) {
            all_merge = all_merge && mergeable(record);
            spans[count++] = (struct span){apm_record_end(record) - record->job.size, apm_record_end(record), record};
        }
    if (all_merge && count > 1) {
        struct span sorted[APM_ROUND_JOBS_MAX];
        memcpy(sorted, spans, count * sizeof *spans);
        sort_spans(sorted, count);
        for (uint32_t i = 1; i < count; i++)
            overlap = overlap || sorted[i].begin < sorted[i - 1].end;
        if (!overlap)
            memcpy(spans, sorted, count * sizeof *spans);
    }
    return count;
}

/* One run. *wrote: the file was touched, so an error may be that of a write-back. */
static int write_run(struct apm_file_full *file, const struct span *run, uint32_t count, bool durable, bool *wrote) {
    if (!mergeable(run->record))
        return apm_sync_write_one(run->record, durable, wrote);
    struct iovec pieces[APM_RUN_PIECES];
    for (uint32_t i = 0; i < count; i++)
        pieces[i] = (struct iovec){(void *)(uintptr_t)run[i].record->job.data, run[i].record->job.size};
    *wrote = true;
    return apm_sync_write_run(apm_file_fd(&file->pub), file->pub.inode, pieces, (int)count, run->begin, durable);
}

/* durable: each run with RWF_DSYNC; else the pages are left to be synced. */
static void run_writes(struct apm_file_full *file, struct span *spans, uint32_t count, bool durable,
                       struct apm_round_counts *counts) {
    for (uint32_t i = 0, next; i < count && !apm_file_failure(&file->pub); i = next) {
        bool wrote = false;
        next = run_end(spans, i, count);
        if (!spans[i].record->job.map->by_pwrite) {
            spans[i].record->code = apm_sync_store(spans[i].record);
            spans[i].record->needs_sync = spans[i].record->code == 0;
            continue;
        }
        int result = write_run(file, spans + i, next - i, durable, &wrote);
        counts->sync_calls += durable;
        bool with_sync = durable;
        if (result < 0 && durable && wrote && apm_sync_unsupported(-result) && !file->dsync_works) {
            with_sync = false; /* no RWF_DSYNC here (law 16): write, and let the pages be synced */
            result = write_run(file, spans + i, next - i, false, &wrote);
        } else if (result == 0 && durable) {
            file->dsync_works = true;
        }
        settle_run(file, spans + i, next - i, result, with_sync, wrote);
    }
}

/* ---- syncing -------------------------------------------------------------------------------------------------------- */

static bool wants_sync(const struct apm_record *record) {
    return record->code == 0 && record->job.size != 0 && (!is_write(record) || record->needs_sync);
}

/* The pages of a job, as addresses. */
static struct span pages_of(struct apm_record *record) {
    const uint64_t mask = apm_page_size() - 1;
    uint64_t address = record->job.map->address + record->job.offset;
    return (struct span){address & ~mask, (address + record->job.size + mask) & ~mask, record};
}

/* The same in the file. */
static struct span file_pages_of(struct apm_record *record) {
    const uint64_t mask = apm_page_size() - 1;
    return (struct span){(apm_record_end(record) - record->job.size) & ~mask, (apm_record_end(record) + mask) & ~mask, record};
}

/* Where the run of pages that begins at spans[i] ends; *end: its last page. Nothing in between is added (law 11). */
static uint32_t pages_end(const struct span *spans, uint32_t i, uint32_t count, uint64_t *end) {
    uint32_t next = i + 1;
    *end = spans[i].end;
    for (; next < count && spans[next].begin <= *end; next++)
        if (spans[next].end > *end)
            *end = spans[next].end;
    return next;
}

/* One merged run could not be synced because part of it is not mapped any more: that says nothing about the file, and
 * nothing about neighbours. Each job is asked by itself. */
static void sync_one_by_one(struct apm_file_full *file, struct span *run, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct span pages = pages_of(run[i].record);
        int result = apm_sync_is_mapped(pages.begin, pages.end) ? apm_sync_mapping(&file->pub, pages.begin, pages.end)
                                                                : APM_E_NOT_MAPPED;
        if (result < 0 && result != APM_E_NOT_MAPPED)
            apm_file_fail(&file->pub, result);
        run[i].record->code = result;
    }
}

/* Each run of pages by an msync of its own. */
static void sync_each(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    struct span spans[APM_ROUND_JOBS_MAX];
    uint32_t count = 0;
    for (struct apm_record *record = jobs; record; record = record->next)
        if (wants_sync(record))
            spans[count++] = pages_of(record);
    sort_spans(spans, count);
    for (uint32_t i = 0, next; i < count && !apm_file_failure(&file->pub); i = next) {
        uint64_t end;
        next = pages_end(spans, i, count, &end);
        int result = apm_sync_mapping(&file->pub, spans[i].begin, end);
        counts->sync_calls++;
        if (result == -ENOMEM && !apm_sync_is_mapped(spans[i].begin, end)) /* else it is the write-back that failed, told once */
            sync_one_by_one(file, spans + i, next - i);
        else if (result < 0)
            apm_file_fail(&file->pub, result);
    }
}

/* A range call said result: 1 when there is no such call here, and nothing was lost by trying; else result. */
static int ranges(struct apm_file_full *file, int result) {
    file->no_ranges = result < 0 && !file->ranges_work && apm_sync_unsupported(-result);
    return file->no_ranges ? 1 : result;
}

/* The adopted map of spans[i], unless a later span is of the same one: each must be asked once, through its own mapping, for
 * that reports to a description which is not ours (law 13). */
static bool asks_last(const struct span *spans, uint32_t i, uint32_t count) {
    const struct apm_map *map = spans[i].record->job.map;
    bool asked = map->adopted;
    for (uint32_t later = i + 1; asked && later < count; later++)
        asked = spans[later].record->job.map != map;
    return asked;
}

/* All runs of pages with one flush of the device, on file systems where that is enough. 0; 1: it cannot be done, sync each;
 * or the error that fails the file. */
static int sync_together(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    struct span spans[APM_ROUND_JOBS_MAX];
    uint32_t count = 0, next;
    uint64_t end;
    int result = 0;
    for (struct apm_record *record = jobs; record; record = record->next) {
        struct span pages = pages_of(record);
        if (wants_sync(record) && record->job.map->adopted && !apm_sync_is_mapped(pages.begin, pages.end))
            record->code = APM_E_NOT_MAPPED;
        if (wants_sync(record))
            spans[count++] = file_pages_of(record);
    }
    sort_spans(spans, count);
    for (uint32_t i = 0; i < count && result == 0; i = next) {
        next = pages_end(spans, i, count, &end);
        result = ranges(file, apm_sync_begin(&file->pub, spans[i].begin, end - spans[i].begin));
    }
    for (uint32_t i = 0; i < count && result == 0; i = next) {
        next = pages_end(spans, i, count, &end);
        result = ranges(file, apm_sync_written(&file->pub, spans[i].begin, end - spans[i].begin));
    }
    file->ranges_work = file->ranges_work || result == 0;
    for (uint32_t i = 0; i < count && result == 0; i++) {
        if (i != count - 1 && !asks_last(spans, i, count))
            continue;
        struct span pages = pages_of(spans[i].record);
        result = apm_sync_mapping(&file->pub, pages.begin, pages.end);
        counts->sync_calls++;
        if (result == -ENOMEM && !apm_sync_is_mapped(pages.begin, pages.end))
            result = 1; /* its owner has just unmapped it, and the others are not yet durable */
    }
    return result;
}

static void sync_pages(struct apm_file_full *file, struct apm_record *jobs, bool together, struct apm_round_counts *counts) {
    const struct apm_record *adopted = NULL;
    bool any = false;
    for (const struct apm_record *record = jobs; record; record = record->next)
        if (wants_sync(record)) {
            any = true;
            adopted = record->job.map->adopted ? record : adopted;
        }
    if (!any)
        return;
    int result = together ? sync_together(file, jobs, counts) : 1;
    if (result == 1) {
        sync_each(file, jobs, counts);
        result = 0;
    }
    if (result == 0 && adopted && !apm_file_failure(&file->pub))
        result = apm_sync_ask(&file->pub, adopted->job.map->offset + adopted->job.offset);
    uint64_t size = UINT64_MAX;
    if (result == 0 && !apm_file_failure(&file->pub))
        result = apm_sync_size_of(&file->pub, &size);
    for (const struct apm_record *record = jobs; record && result == 0; record = record->next)
        if (wants_sync(record) && apm_record_end(record) > size) /* a sync of pages that a truncation took away says "ok" */
            result = APM_E_FILE_SHRANK;
    if (result < 0)
        apm_file_fail(&file->pub, result);
}

/* ---- the round ------------------------------------------------------------------------------------------------------ */

/* Would the plain way flush the device more than once? writes: sorted where that is allowed. */
static bool several(const struct span *writes, uint32_t count, struct apm_record *jobs) {
    struct span spans[APM_ROUND_JOBS_MAX];
    uint32_t flushes = 0, pages = 0;
    for (uint32_t i = 0; i < count && flushes < 2; flushes++)
        i = run_end(writes, i, count);
    for (struct apm_record *record = jobs; record && flushes < 2; record = record->next)
        if (!is_write(record) && record->job.size)
            spans[pages++] = pages_of(record);
    sort_spans(spans, pages);
    for (uint32_t i = 0; i < pages && flushes < 2; flushes++) {
        uint64_t end;
        i = pages_end(spans, i, pages, &end);
    }
    return flushes > 1;
}

/* No write may make the file longer than it is: that would leave a hole where the mapping has bytes. */
static int fits(struct apm_file_full *file, const struct span *writes, uint32_t count) {
    uint64_t size;
    int result = count ? apm_sync_size_of(&file->pub, &size) : 0;
    for (uint32_t i = 0; i < count && result == 0; i++)
        if (writes[i].end > size)
            result = APM_E_FILE_SHRANK;
    return result;
}

static void run(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    struct span writes[APM_ROUND_JOBS_MAX];
    uint32_t count = gather_writes(jobs, writes);
    for (const struct apm_record *record = jobs; record; record = record->next)
        *(is_write(record) ? &counts->bytes_copied : &counts->bytes_persisted) += record->job.size;
    int result = fits(file, writes, count);
    if (result < 0) {
        apm_file_fail(&file->pub, result);
        return;
    }
    bool together = file->pub.one_flush && !file->no_ranges && apm_file_fd(&file->pub) >= 0 && several(writes, count, jobs);
    run_writes(file, writes, count, !together, counts);
    if (!apm_file_failure(&file->pub))
        sync_pages(file, jobs, together, counts);
}

void apm_round_run(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    int failure = apm_file_failure(&file->pub);
    for (struct apm_record *record = jobs; record; record = record->next) {
        record->code = failure ? APM_E_FILE_FAILED : 0;
        record->needs_sync = false;
    }
    if (failure) /* law 4: never tried again */
        return;
    run(file, jobs, counts);
    failure = apm_file_failure(&file->pub);
    if (failure)
        for (struct apm_record *record = jobs; record; record = record->next)
            record->code = failure;
}
