/* apm_sync.c - how do bytes reach the medium at page granularity? The only file with sync and write calls.
 *
 * The unit is the round: all jobs of one file that waited, run together, one round of a file at a time (law 2). In a
 * round the copies go first, in runs of adjacent bytes, each by one pwritev2(RWF_DSYNC); then the persists, page-rounded,
 * sorted, overlapping and adjacent pages merged and nothing in between added (law 11), each run by one msync. The
 * first error of a sync latches the file, and every job of the round learns of it (law 4).
 *
 * RWF_DSYNC and msync both sync the asked pages only. fdatasync of a whole file is used where a file is new and ours,
 * and as the plain way where sync_file_range is missing. */
#include "apm_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { RUN_PIECES = 1024, PATTERN = 32 * 1024, BOUNCE = 1 << 20 };
/* Bytes of one msync. One call over 256 MiB made a loop of the same process 3 ms late for as long as it ran, calls of this size
 * 0.1 ms, for about a third more time (measured, 2 cores). */
#define SYNC_PIECE ((uint64_t)4 << 20)
static const char zeros[64 * 1024];

/* Was a trick refused because this kernel, file system or sandbox does not have it? (law 16) */
static bool unsupported(int error) {
    return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL || error == EPERM;
}

/* ---- whole files ----------------------------------------------------------------------------------------- */

static int retried(uint32_t call, int fd, int (*function)(int)) {
    int result, tries = 0;
    do {
        APM_OUTSIDE(result, call, fd, 0, 0, function(fd));
    } while (result < 0 && errno == EINTR && ++tries < APM_EINTR_MAX);
    return result < 0 ? -errno : 0;
}

int apm_sync_file(int fd) { return retried(APM_CALL_FSYNC, fd, fsync); }

int apm_sync_data(int fd) { return retried(APM_CALL_FDATASYNC, fd, fdatasync); }

int apm_sync_directory(int fd) {
    int result = retried(APM_CALL_FSYNC_DIRECTORY, fd, fsync);
    return result == -EINVAL ? 0 : result; /* file systems that cannot sync a directory say EINVAL */
}

static void begin_writeback(int fd, uint64_t offset, uint64_t size) {
    int result;
    APM_OUTSIDE(result, APM_CALL_SYNC_FILE_RANGE, fd, offset, size,
                sync_file_range(fd, (off_t)offset, (off_t)size, SYNC_FILE_RANGE_WRITE));
    (void)result; /* it only starts the writing; the sync that follows tells */
}

/* ---- writing: everything through one loop that continues short writes ------------------------------------------ */

/* Drops the first done bytes from the pieces. */
static void advance(struct iovec **pieces, int *count, uint64_t done) {
    while (*count && done >= (*pieces)->iov_len) {
        done -= (*pieces)->iov_len;
        ++*pieces;
        --*count;
    }
    if (done) {
        (*pieces)->iov_base = (char *)(*pieces)->iov_base + done;
        (*pieces)->iov_len -= done;
    }
}

static int write_run(int fd, uint64_t object, struct iovec *pieces, int count, uint64_t offset, bool durable) {
    const uint32_t call = durable ? APM_CALL_PWRITE_DSYNC : APM_CALL_PWRITE;
    int interrupted = 0;
    while (count) {
        uint64_t total = 0, allowed;
        for (int i = 0; i < count; i++)
            total += pieces[i].iov_len;
        allowed = apm_fault_cut(call, total);
        struct iovec cut = {pieces->iov_base, allowed < pieces->iov_len ? allowed : pieces->iov_len};
        struct iovec *now = allowed < total ? &cut : pieces;
        int now_count = allowed < total ? 1 : count;
        ssize_t result;
        APM_OUTSIDE(result, call, object, offset, allowed < total ? cut.iov_len : total,
                    durable ? pwritev2(fd, now, now_count, (off_t)offset, RWF_DSYNC)
                            : pwritev(fd, now, now_count, (off_t)offset));
        if (result < 0) {
            if (errno == EINTR && ++interrupted < APM_EINTR_MAX)
                continue;
            return -errno;
        }
        if (result == 0)
            return -EIO; /* a write of something that takes nothing and gives no reason */
        advance(&pieces, &count, (uint64_t)result);
        offset += (uint64_t)result;
    }
    return 0;
}

/* count pieces of the same pattern, up to the size of one piece of work. */
static int fill_pieces(struct iovec *pieces, const void *pattern, size_t length, uint64_t size) {
    int count = 0;
    for (uint64_t left = size; left && count < RUN_PIECES; left -= pieces[count++].iov_len)
        pieces[count] = (struct iovec){(void *)(uintptr_t)pattern, left < length ? left : length};
    return count;
}

int apm_sync_zero(int fd, uint64_t from, uint64_t to, const uint32_t *abandoned) {
    while (from < to) {
        if (__atomic_load_n(abandoned, __ATOMIC_ACQUIRE))
            return APM_E_WITHDRAWN;
        struct iovec pieces[RUN_PIECES];
        uint64_t size = to - from < APM_PIECE ? to - from : APM_PIECE;
        int count = fill_pieces(pieces, zeros, sizeof zeros, size);
        int result = write_run(fd, (uint64_t)fd, pieces, count, from, false);
        if (result < 0)
            return result;
        begin_writeback(fd, from, size);
        from += size;
    }
    return 0;
}

/* ---- one copy or fill ----------------------------------------------------------------------------------------------- */

/* The file's size now, or all that there could be when it cannot be asked. By statx, of the size alone: fstat asks for the
 * times as well, and on kernels with multigrain timestamps (6.13 and later) a write after somebody looked at them gives the
 * inode a new one, so that each sync would write the inode too (measured: 8 KiB instead of 4 for a page, and twice the
 * time). */
static int size_of(const struct apm_file *file, uint64_t *size) {
    struct statx about;
    struct stat plain;
    int result = 0, fd = apm_file_fd(file);
    *size = UINT64_MAX;
    if (fd < 0)
        return 0;
    APM_OUTSIDE(result, APM_CALL_FSTAT, file->inode, 0, 0, statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &about));
    if (result == 0) {
        *size = about.stx_size;
        return 0;
    }
    if (!unsupported(errno))
        return -errno;
    APM_OUTSIDE(result, APM_CALL_FSTAT, file->inode, 0, 0, fstat(fd, &plain));
    if (result == 0)
        *size = (uint64_t)plain.st_size;
    return result < 0 ? -errno : 0;
}

/* By way of a buffer of our own, in pieces, from the end that is overwritten last; all at once when the source lies in
 * several mappings, which have no one direction. */
static int write_bounced(const struct apm_record *record, uint64_t from_offset, bool scattered, bool durable, bool *wrote) {
    const struct apm_job *job = &record->job;
    uint64_t to = job->map->offset + job->offset, left = job->size;
    char small[4096]; /* slow, but it cannot be refused in the middle of a round */
    size_t room = left < BOUNCE || scattered ? left : BOUNCE;
    char *large = apm_allocate(room), *buffer = large ? large : small;
    if (!large && scattered)
        return -ENOMEM;
    if (!large)
        room = sizeof small;
    int result = 0;
    *wrote = true;
    for (uint64_t done = 0; result == 0 && left; ) {
        uint64_t size = left < room ? left : room;
        uint64_t at = from_offset < to ? left - size : done; /* backwards when the destination lies behind */
        memcpy(buffer, (const char *)(uintptr_t)job->data + at, size);
        struct iovec piece = {buffer, size};
        result = write_run(apm_file_fd(job->map->file), job->map->file->inode, &piece, 1, to + at, durable);
        done += size;
        left -= size;
    }
    free(large);
    return result;
}

/* *wrote: the file was touched, so an error may be that of a write-back. */
static int write_one(const struct apm_record *record, bool durable, bool *wrote) {
    const struct apm_job *job = &record->job;
    const struct apm_file *file = job->map->file;
    uint64_t to = job->map->offset + job->offset, from_offset = 0;
    struct iovec pieces[RUN_PIECES];
    bool scattered = false;
    int result = 0;
    *wrote = job->kind == APM_JOB_FILL;
    if (job->kind == APM_JOB_FILL) {
        char pattern[PATTERN];
        memset(pattern, (int)job->data, sizeof pattern);
        for (uint64_t at = 0; result == 0 && at < job->size; at += APM_PIECE) {
            uint64_t size = job->size - at < APM_PIECE ? job->size - at : APM_PIECE;
            int count = fill_pieces(pieces, pattern, sizeof pattern, size);
            result = write_run(apm_file_fd(file), file->inode, pieces, count, to + at, durable);
        }
        return result;
    }
    if (!(job->flags & APM_F_SOURCE_OWNED))
        result = apm_vma_overlaps(file, job->data, job->size, to, &from_offset, &scattered);
    if (result == -EFAULT)
        return result;
    if (result < 0) /* the table cannot be read: as if it overlapped in the worst way (law 16) */
        result = scattered = true;
    if (result == 1 && !scattered) { /* what the mapping has beyond the end of the file cannot be read */
        uint64_t size;
        int asked = size_of(file, &size);
        if (asked < 0 || from_offset + job->size > size)
            return asked < 0 ? asked : -EFAULT;
    }
    if (result == 1)
        return write_bounced(record, from_offset, scattered, durable, wrote);
    *wrote = true;
    for (uint64_t at = 0; result == 0 && at < job->size; at += APM_PIECE) {
        uint64_t size = job->size - at < APM_PIECE ? job->size - at : APM_PIECE;
        pieces[0] = (struct iovec){(char *)(uintptr_t)job->data + at, size};
        result = write_run(apm_file_fd(file), file->inode, pieces, 1, to + at, durable);
    }
    return result;
}

/* Errors of a plain write that say: the bytes never reached the page cache. They are the caller's alone (law 4). */
static bool refused_before_the_cache(int code) {
    return code == -EFAULT || code == -EFBIG || code == -ENOSPC || code == -EDQUOT || code == -EINTR;
}

/* Through the mapping, where write() and the mapping are not known to agree: may fault here, on a thread of the pool. */
static int store_one(const struct apm_record *record) {
    const struct apm_job *job = &record->job;
    void *to = (void *)(uintptr_t)(job->map->address + job->offset), *copy = NULL;
    const void *source = NULL;
    int result = job->kind == APM_JOB_FILL ? 0 : apm_map_source(job, &source, &copy);
    if (result < 0)
        return result;
    if (APM_UNLIKELY(__atomic_load_n(&apm_observing, __ATOMIC_RELAXED)))
        apm_observe_note(APM_CALL_STORE, job->map->file ? job->map->file->inode : 0, (uintptr_t)to, job->size);
    if (job->kind == APM_JOB_FILL)
        memset(to, (int)job->data, job->size);
    else
        memmove(to, source, job->size);
    free(copy);
    return 0;
}

static uint64_t end_in_file(const struct apm_record *record) {
    return record->job.map->offset + record->job.offset + record->job.size;
}

int apm_sync_write_plain(const struct apm_record *record) {
    if (!record->job.map->by_pwrite)
        return store_one(record);
    uint64_t size;
    int result = size_of(record->job.map->file, &size);
    if (result == 0 && end_in_file(record) > size)
        result = APM_E_FILE_SHRANK; /* a write would grow the file again and leave a hole */
    if (result < 0)
        return result;
    bool wrote;
    result = write_one(record, false, &wrote);
    if (result < 0 && wrote && !refused_before_the_cache(result))
        apm_file_fail(record->job.map->file, result);
    return result;
}

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
        int result = write_one(run[i].record, false, &wrote);
        run[i].record->code = result;
        run[i].record->needs_sync = result == 0;
        if (result < 0 && wrote && !refused_before_the_cache(result))
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
            spans[count++] = (struct span){end_in_file(record) - record->job.size, end_in_file(record), record};
    if (!count)
        return;
    int result = size_of(&file->pub, &size);
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
            record->code = store_one(record);
            record->needs_sync = record->code == 0;
            continue;
        }
        if (mergeable(record)) {
            struct iovec pieces[RUN_PIECES];
            uint64_t total = record->job.size;
            pieces[0] = (struct iovec){(void *)(uintptr_t)record->job.data, record->job.size};
            while (next < count && next - i < RUN_PIECES && spans[next].begin == spans[next - 1].end &&
                   mergeable(spans[next].record) && total < APM_PIECE) {
                const struct apm_job *job = &spans[next].record->job;
                pieces[next - i] = (struct iovec){(void *)(uintptr_t)job->data, job->size};
                total += job->size;
                next++;
            }
            result = write_run(apm_file_fd(&file->pub), file->pub.inode, pieces, (int)(next - i), spans[i].begin, true);
            wrote = true;
        } else {
            result = write_one(record, true, &wrote);
        }
        counts->sync_calls++;
        file->dsync_works = file->dsync_works || result == 0;
        if (result < 0 && wrote && unsupported(-result) && !file->dsync_works)
            write_then_sync(file, spans + i, next - i); /* no RWF_DSYNC here (law 16) */
        else
            settle_run(file, spans + i, next - i, result, wrote);
        if (apm_file_failure(&file->pub))
            return;
    }
}

static int sync_mapping(const struct apm_file *file, uint64_t begin, uint64_t end) {
    int result, tries = 0;
    while (end - begin > SYNC_PIECE) { /* at most one level deep: a piece is not cut again */
        result = sync_mapping(file, begin, begin + SYNC_PIECE);
        if (result < 0)
            return result;
        begin += SYNC_PIECE;
    }
    do {
        APM_OUTSIDE(result, APM_CALL_MSYNC, file->inode, begin, end - begin,
                    msync((void *)(uintptr_t)begin, end - begin, MS_SYNC));
    } while (result < 0 && errno == EINTR && ++tries < APM_EINTR_MAX);
    return result < 0 ? -errno : 0;
}

static bool is_mapped(uint64_t begin, uint64_t end) {
    const uint64_t page = apm_page_size();
    unsigned char vector[256];
    for (uint64_t at = begin; at < end; at += sizeof vector * page) {
        uint64_t size = end - at < sizeof vector * page ? end - at : sizeof vector * page;
        if (mincore((void *)(uintptr_t)at, size, vector) < 0 && errno == ENOMEM)
            return false;
    }
    return true;
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
        int result = is_mapped(pages.begin, pages.end) ? sync_mapping(&file->pub, pages.begin, pages.end)
                                                       : APM_E_NOT_MAPPED;
        if (result < 0 && result != APM_E_NOT_MAPPED)
            apm_file_fail(&file->pub, result);
        run[i].record->code = result;
    }
}

/* An adopted mapping reports to its own description, which we do not have; ours is asked as well (law 13). A range sync
 * over a page that is clean by now only looks at the error mark. */
static int ask_own_description(const struct apm_file *file, uint64_t offset) {
    int result;
    if (file->fd < 0)
        return 0;
    if (!file->range_sync) /* an overlay's own inode has no pages and no mark: only a real sync goes through it */
        return apm_sync_data(apm_file_fd(file));
    APM_OUTSIDE(result, APM_CALL_SYNC_FILE_RANGE, file->inode, offset, 1,
                sync_file_range(apm_file_fd(file), (off_t)offset, 1, SYNC_FILE_RANGE_WAIT_BEFORE));
    if (result == 0)
        return 0;
    if (unsupported(errno) || errno == ESPIPE)
        return apm_sync_data(apm_file_fd(file));
    return -errno;
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
        int result = sync_mapping(&file->pub, begin, end);
        counts->sync_calls++;
        if (result == -ENOMEM && !is_mapped(begin, end)) /* else it is the write-back that failed, and it is told once */
            sync_one_by_one(file, spans + i, next - i);
        else if (result < 0)
            apm_file_fail(&file->pub, result);
        if (apm_file_failure(&file->pub))
            return;
    }
    if (adopted) {
        int result = ask_own_description(&file->pub, adopted->job.map->offset + adopted->job.offset);
        if (result < 0) {
            apm_file_fail(&file->pub, result);
            return;
        }
    }
    uint64_t size;
    int result = count ? size_of(&file->pub, &size) : 0;
    for (uint32_t i = 0; result == 0 && i < count; i++) /* msync of pages that a truncation took away says "ok" */
        if (end_in_file(spans[i].record) > size)
            result = APM_E_FILE_SHRANK;
    if (result < 0)
        apm_file_fail(&file->pub, result);
}

void apm_sync_round(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts) {
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
