/* apm_round.c - how do the jobs of a file that waited become durable together?
 *
 * The unit is the round: all jobs of one file that waited, run together, one round of a file at a time (law 2). In a
 * round the copies go first, in runs of adjacent bytes, each by one pwritev2(RWF_DSYNC); then the persists, page-rounded,
 * sorted, overlapping and adjacent pages merged and nothing in between added (law 11), each run by one msync. The
 * first error of a sync latches the file, and every job of the round learns of it (law 4). */
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

/* One written run has ended with result: who learns what. */
static void settle_run(struct apm_file_full *file, struct span *run, uint32_t count, int result, bool wrote) {
    for (uint32_t i = 0; i < count; i++) {
        run[i].record->code = result;
        run[i].record->needs_sync = false;
    }
    if (result < 0 && wrote && !callers_alone(result))
        apm_file_fail(&file->pub, result);
}

/* The plain way of a durable copy: write, and let the persists of this round sync the pages. What a plain write refuses is
 * the caller's alone. */
static void write_then_sync(struct apm_file_full *file, struct span *run, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        bool wrote;
        int result = apm_sync_write_one(run[i].record, false, &wrote);
        run[i].record->code = result;
        run[i].record->needs_sync = result == 0;
        if (result < 0 && wrote && !apm_sync_refused(result))
            apm_file_fail(&file->pub, result);
    }
}

static bool mergeable(const struct apm_record *record) {
    return record->job.kind == APM_JOB_COPY && record->job.map->by_pwrite && (record->job.flags & APM_F_SOURCE_OWNED) &&
           record->job.size < APM_PIECE;
}

static void run_writes(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    struct span spans[APM_ROUND_JOBS_MAX];
    uint32_t count = 0;
    bool overlap = false, all_merge = true;
    uint64_t size = 0;
    for (struct apm_record *record = jobs; record; record = record->next)
        if (is_write(record))
            spans[count++] = (struct span){apm_record_end(record) - record->job.size, apm_record_end(record), record};
    if (!count)
        return;
    int result = apm_sync_size_of(&file->pub, &size);
    for (uint32_t i = 0; i < count; i++) {
        counts->bytes_copied += spans[i].record->job.size;
        if (result == 0 && spans[i].end > size)
            result = APM_E_FILE_SHRANK;
        all_merge = all_merge && mergeable(spans[i].record);
    }
    if (result < 0) {
        apm_file_fail(&file->pub, result);
        return;
    }
    if (all_merge) { /* any order will do as long as no two touch the same byte */
        struct span sorted[APM_ROUND_JOBS_MAX];
        memcpy(sorted, spans, count * sizeof *spans);
        sort_spans(sorted, count);
        for (uint32_t i = 1; i < count; i++)
            overlap = overlap || sorted[i].begin < sorted[i - 1].end;
        if (!overlap)
            memcpy(spans, sorted, count * sizeof *spans);
    }
    for (uint32_t i = 0, next; i < count; i = next) {
        struct apm_record *record = spans[i].record;
        bool wrote;
        next = i + 1;
        if (!record->job.map->by_pwrite) {
            record->code = apm_sync_store(record);
            record->needs_sync = record->code == 0;
            continue;
        }
        if (mergeable(record)) {
            struct iovec pieces[APM_RUN_PIECES];
            uint64_t total = record->job.size;
            pieces[0] = (struct iovec){(void *)(uintptr_t)record->job.data, record->job.size};
            while (next < count && next - i < APM_RUN_PIECES && spans[next].begin == spans[next - 1].end &&
                   mergeable(spans[next].record) && total < APM_PIECE) {
                const struct apm_job *job = &spans[next].record->job;
                pieces[next - i] = (struct iovec){(void *)(uintptr_t)job->data, job->size};
                total += job->size;
                next++;
            }
            result = apm_sync_write_run(apm_file_fd(&file->pub), file->pub.inode, pieces, (int)(next - i), spans[i].begin, true);
            wrote = true;
        } else {
            result = apm_sync_write_one(record, true, &wrote);
        }
        counts->sync_calls++;
        file->dsync_works = file->dsync_works || result == 0;
        if (result < 0 && wrote && apm_sync_unsupported(-result) && !file->dsync_works)
            write_then_sync(file, spans + i, next - i); /* no RWF_DSYNC here (law 16) */
        else
            settle_run(file, spans + i, next - i, result, wrote);
        if (apm_file_failure(&file->pub))
            return;
    }
}

static struct span pages_of(struct apm_record *record) {
    const uint64_t mask = apm_page_size() - 1;
    uint64_t address = record->job.map->address + record->job.offset;
    return (struct span){address & ~mask, (address + record->job.size + mask) & ~mask, record};
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

static void run_persists(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    struct span spans[APM_ROUND_JOBS_MAX];
    struct apm_record *adopted = NULL;
    uint32_t count = 0;
    for (struct apm_record *record = jobs; record; record = record->next) {
        if (record->code != 0 || (is_write(record) && !record->needs_sync) || record->job.size == 0)
            continue;
        if (record->job.map->adopted)
            adopted = record;
        counts->bytes_persisted += record->job.size;
        spans[count++] = pages_of(record);
    }
    sort_spans(spans, count);
    for (uint32_t i = 0, next; i < count; i = next) {
        uint64_t begin = spans[i].begin, end = spans[i].end;
        for (next = i + 1; next < count && spans[next].begin <= end; next++)
            if (spans[next].end > end)
                end = spans[next].end;
        int result = apm_sync_mapping(&file->pub, begin, end);
        counts->sync_calls++;
        if (result == -ENOMEM && !apm_sync_is_mapped(begin, end)) /* else it is the write-back that failed, and it is told once */
            sync_one_by_one(file, spans + i, next - i);
        else if (result < 0)
            apm_file_fail(&file->pub, result);
        if (apm_file_failure(&file->pub))
            return;
    }
    if (adopted) {
        int result = apm_sync_ask(&file->pub, adopted->job.map->offset + adopted->job.offset);
        if (result < 0) {
            apm_file_fail(&file->pub, result);
            return;
        }
    }
    uint64_t size;
    int result = count ? apm_sync_size_of(&file->pub, &size) : 0;
    for (uint32_t i = 0; result == 0 && i < count; i++) /* msync of pages that a truncation took away says "ok" */
        if (apm_record_end(spans[i].record) > size)
            result = APM_E_FILE_SHRANK;
    if (result < 0)
        apm_file_fail(&file->pub, result);
}

void apm_round_run(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
    int failure = apm_file_failure(&file->pub);
    for (struct apm_record *record = jobs; record; record = record->next) {
        record->code = failure ? APM_E_FILE_FAILED : 0;
        record->needs_sync = false;
    }
    if (failure) /* law 4: never tried again */
        return;
    run_writes(file, jobs, counts);
    if (!apm_file_failure(&file->pub))
        run_persists(file, jobs, counts);
    failure = apm_file_failure(&file->pub);
    if (failure)
        for (struct apm_record *record = jobs; record; record = record->next)
            record->code = failure;
}
