/* apm_sync.c - which calls write and sync? The only file that has them; which of them a round makes: apm_round.c.
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

enum { PATTERN = 32 * 1024, BOUNCE = 1 << 20 };
/* Bytes of one msync. One call over 256 MiB made a loop of the same process 3 ms late for as long as it ran, calls of this size
 * 0.1 ms, for about a third more time (measured, 2 cores). */
#define SYNC_PIECE ((uint64_t)4 << 20)
#define QUICK_NS 1000000 /* a piece that took less had little to write: the next may be twice as long */
static const char zeros[64 * 1024];

/* Was a trick refused because this kernel, file system or sandbox does not have it? (law 16) */
bool apm_sync_unsupported(int error) {
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

static int range_sync(uint32_t call, int fd, uint64_t object, uint64_t offset, uint64_t size, unsigned flags) {
    int result, tries = 0;
    do {
        APM_OUTSIDE(result, call, object, offset, size, sync_file_range(fd, (off_t)offset, (off_t)size, flags));
    } while (result < 0 && errno == EINTR && ++tries < APM_EINTR_MAX);
    return result < 0 ? -errno : 0;
}

int apm_sync_begin(const struct apm_file *file, uint64_t offset, uint64_t size) {
    return range_sync(APM_CALL_SYNC_FILE_RANGE, apm_file_fd(file), file->inode, offset, size, SYNC_FILE_RANGE_WRITE);
}

/* The first pass skips pages that were being written when they were dirtied again; with all three flags they are waited for,
 * written, and waited for again. */
int apm_sync_written(const struct apm_file *file, uint64_t offset, uint64_t size) {
    for (uint64_t piece; size; offset += piece, size -= piece) {
        piece = size < SYNC_PIECE ? size : SYNC_PIECE;
        int result = range_sync(APM_CALL_RANGE_WRITTEN, apm_file_fd(file), file->inode, offset, piece,
                                SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        if (result < 0)
            return result;
    }
    return 0;
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

int apm_sync_write_run(int fd, uint64_t object, struct iovec *pieces, int count, uint64_t offset, bool durable) {
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
    for (uint64_t left = size; left && count < APM_RUN_PIECES; left -= pieces[count++].iov_len)
        pieces[count] = (struct iovec){(void *)(uintptr_t)pattern, left < length ? left : length};
    return count;
}

int apm_sync_zero(int fd, uint64_t from, uint64_t to, const uint32_t *abandoned) {
    while (from < to) {
        if (__atomic_load_n(abandoned, __ATOMIC_ACQUIRE))
            return APM_E_WITHDRAWN;
        struct iovec pieces[APM_RUN_PIECES];
        uint64_t size = to - from < APM_PIECE ? to - from : APM_PIECE;
        int count = fill_pieces(pieces, zeros, sizeof zeros, size);
        int result = apm_sync_write_run(fd, (uint64_t)fd, pieces, count, from, false);
        if (result < 0)
            return result;
        /* it only starts the writing; the sync that follows tells */
        (void)range_sync(APM_CALL_SYNC_FILE_RANGE, fd, (uint64_t)fd, from, size, SYNC_FILE_RANGE_WRITE);
        from += size;
    }
    return 0;
}

/* ---- one copy or fill ----------------------------------------------------------------------------------------------- */

/* The file's size now, or all that there could be when it cannot be asked. By statx, of the size alone: fstat asks for the
 * times as well, and on kernels with multigrain timestamps (6.13 and later) a write after somebody looked at them gives the
 * inode a new one, so that each sync would write the inode too (measured: 8 KiB instead of 4 for a page, and twice the
 * time). */
int apm_sync_size_of(const struct apm_file *file, uint64_t *size) {
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
    if (!apm_sync_unsupported(errno))
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
        result = apm_sync_write_run(apm_file_fd(job->map->file), job->map->file->inode, &piece, 1, to + at, durable);
        done += size;
        left -= size;
    }
    free(large);
    return result;
}

/* *wrote: the file was touched, so an error may be that of a write-back. */
int apm_sync_write_one(const struct apm_record *record, bool durable, bool *wrote) {
    const struct apm_job *job = &record->job;
    const struct apm_file *file = job->map->file;
    uint64_t to = job->map->offset + job->offset, from_offset = 0;
    struct iovec pieces[APM_RUN_PIECES];
    bool scattered = false;
    int result = 0;
    *wrote = job->kind == APM_JOB_FILL;
    if (job->kind == APM_JOB_FILL) {
        char pattern[PATTERN];
        memset(pattern, (int)job->data, sizeof pattern);
        for (uint64_t at = 0; result == 0 && at < job->size; at += APM_PIECE) {
            uint64_t size = job->size - at < APM_PIECE ? job->size - at : APM_PIECE;
            int count = fill_pieces(pieces, pattern, sizeof pattern, size);
            result = apm_sync_write_run(apm_file_fd(file), file->inode, pieces, count, to + at, durable);
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
        int asked = apm_sync_size_of(file, &size);
        if (asked < 0 || from_offset + job->size > size)
            return asked < 0 ? asked : -EFAULT;
    }
    if (result == 1)
        return write_bounced(record, from_offset, scattered, durable, wrote);
    *wrote = true;
    for (uint64_t at = 0; result == 0 && at < job->size; at += APM_PIECE) {
        uint64_t size = job->size - at < APM_PIECE ? job->size - at : APM_PIECE;
        pieces[0] = (struct iovec){(char *)(uintptr_t)job->data + at, size};
        result = apm_sync_write_run(apm_file_fd(file), file->inode, pieces, 1, to + at, durable);
    }
    return result;
}

/* Errors of a plain write that say: the bytes never reached the page cache. They are the caller's alone (law 4). */
bool apm_sync_refused(int code) {
    return code == -EFAULT || code == -EFBIG || code == -ENOSPC || code == -EDQUOT || code == -EINTR;
}

/* Through the mapping, where write() and the mapping are not known to agree: may fault here, on a thread of the pool. */
int apm_sync_store(const struct apm_record *record) {
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

int apm_sync_write_plain(const struct apm_record *record) {
    if (!record->job.map->by_pwrite)
        return apm_sync_store(record);
    uint64_t size;
    int result = apm_sync_size_of(record->job.map->file, &size);
    if (result == 0 && apm_record_end(record) > size)
        result = APM_E_FILE_SHRANK; /* a write would grow the file again and leave a hole */
    if (result < 0)
        return result;
    bool wrote;
    result = apm_sync_write_one(record, false, &wrote);
    if (result < 0 && wrote && !apm_sync_refused(result))
        apm_file_fail(record->job.map->file, result);
    return result;
}

/* ---- syncing a range ------------------------------------------------------------------------------------------ */

static int msync_once(const struct apm_file *file, uint64_t begin, uint64_t size) {
    int result, tries = 0;
    do {
        APM_OUTSIDE(result, APM_CALL_MSYNC, file->inode, begin, size, msync((void *)(uintptr_t)begin, size, MS_SYNC));
    } while (result < 0 && errno == EINTR && ++tries < APM_EINTR_MAX);
    return result < 0 ? -errno : 0;
}

/* In pieces, which grow while there is little to write in them. */
int apm_sync_mapping(const struct apm_file *file, uint64_t begin, uint64_t end) {
    uint64_t piece = SYNC_PIECE;
    int result = 0;
    while (begin < end && result == 0) {
        uint64_t size = end - begin < piece ? end - begin : piece, began = size < end - begin ? apm_now_ns() : 0;
        result = msync_once(file, begin, size);
        begin += size;
        if (began)
            piece = apm_now_ns() - began < QUICK_NS ? piece * 2 : SYNC_PIECE;
    }
    return result;
}

bool apm_sync_is_mapped(uint64_t begin, uint64_t end) {
    const uint64_t page = apm_page_size();
    unsigned char vector[256];
    for (uint64_t at = begin; at < end; at += sizeof vector * page) {
        uint64_t size = end - at < sizeof vector * page ? end - at : sizeof vector * page;
        if (mincore((void *)(uintptr_t)at, size, vector) < 0 && errno == ENOMEM)
            return false;
    }
    return true;
}

/* An adopted mapping reports to its own description, which we do not have; ours is asked as well (law 13). A range sync
 * over a page that is clean by now only looks at the error mark. */
int apm_sync_ask(const struct apm_file *file, uint64_t offset) {
    int result;
    if (file->fd < 0)
        return 0;
    if (!file->range_sync) /* an overlay's own inode has no pages and no mark: only a real sync goes through it */
        return apm_sync_data(apm_file_fd(file));
    result = range_sync(APM_CALL_SYNC_FILE_RANGE, apm_file_fd(file), file->inode, offset, 1, SYNC_FILE_RANGE_WAIT_BEFORE);
    return apm_sync_unsupported(-result) || result == -ESPIPE ? apm_sync_data(apm_file_fd(file)) : result;
}
