/* apm_create.c - how does a new file become whole, durable and visible, in that order?
 *
 * Creation is invisible until it is whole (law 15): an unnamed file (O_TMPFILE), or one under a temporary name, is
 * allocated, written once so that no later round pays for allocation, synced, and only then linked under its name;
 * then the directory is synced. Until the link nobody can see it, and whatever fails leaves nothing behind. */
#include "apm_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Cancelled until here, a creation leaves nothing; from the link on there is a whole file. */
static int still_wanted(const struct apm_open_request *request) {
    return __atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE) ? APM_E_WITHDRAWN : 0;
}

/* Does a trick not exist here, in this kernel, file system or sandbox? (law 16) */
static bool refused(int result) {
    return result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL || result == -EPERM;
}

/* finish: from the first zero on it goes to the end, cancelled or not. */
static int allocate(int fd, uint64_t from, const struct apm_open_request *request, bool finish) {
    static const uint32_t never = 0;
    int result;
    uint64_t to = request->size;
    if (to > INT64_MAX)
        return -EFBIG;
    if (request->flags & APM_OPEN_SPARSE) {
        APM_OUTSIDE(result, APM_CALL_FTRUNCATE, fd, 0, to, ftruncate(fd, (off_t)to));
        return result < 0 ? -errno : 0;
    }
    /* The blocks first, the size with the zeros: at no moment are there bytes inside the file that zeros will still be
     * written over, so whoever opens a file that is growing loses nothing. */
    APM_OUTSIDE(result, APM_CALL_FALLOCATE, fd, from, to - from,
                fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(to - from)));
    if (result < 0 && !refused(-errno))
        return -errno;
    /* Where fallocate is unknown, the writing itself allocates (law 16). */
    result = still_wanted(request);
    return result < 0 ? result : apm_sync_zero(fd, from, to, finish ? &never : &request->abandoned);
}

int apm_extend_file(int fd, uint64_t from, const struct apm_open_request *request) {
    return allocate(fd, from, request, true);
}

void apm_cut_file(int fd, uint64_t size) {
    int result;
    APM_OUTSIDE(result, APM_CALL_FTRUNCATE, fd, 0, size, ftruncate(fd, (off_t)size));
    (void)result; /* it was a kindness */
}

static int unlink_name(int directory, const char *name) {
    int result;
    APM_OUTSIDE(result, APM_CALL_UNLINK, directory, 0, 0, unlinkat(directory, name, 0));
    return result < 0 ? -errno : 0;
}

static int open_unnamed(int directory, uint32_t mode) {
    int fd;
    APM_OUTSIDE(fd, APM_CALL_TMPFILE, directory, 0, 0,
                openat(directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, (mode_t)mode));
    return fd < 0 ? -errno : fd;
}

static int link_unnamed(int fd, int directory, const char *name) {
    char own[64];
    int result;
    snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
    APM_OUTSIDE(result, APM_CALL_LINK, fd, 0, 0, linkat(AT_FDCWD, own, directory, name, AT_SYMLINK_FOLLOW));
    return result < 0 ? -errno : 0;
}

/* A visible file: its link count belongs to it (ext4 without a journal wrote 0 links with the sync before; seen), and its
 * name to the directory. What cannot be made to last is taken back. */
static int settle_name(int fd, int directory, const char *name, uint64_t *inode) {
    struct stat about;
    int result = apm_sync_file(fd);
    *inode = fstat(fd, &about) == 0 ? about.st_ino : 0;
    if (result == 0)
        result = apm_sync_directory(directory);
    if (result < 0)
        (void)unlink_name(directory, name);
    return result;
}

/* Whole and durable, under no name or a temporary one. */
static int fill(int fd, const struct apm_open_request *request) {
    int result = allocate(fd, 0, request, false);
    if (result == 0)
        result = apm_sync_file(fd);
    return result == 0 ? still_wanted(request) : result;
}

/* The plain way: a temporary name, linked to the final one. link() and not rename(): it never replaces a file that
 * somebody else made in the meantime. */
static int create_named(int directory, const char *name, const struct apm_open_request *request, uint64_t *inode) {
    static uint32_t counter;
    char temporary[64];
    snprintf(temporary, sizeof temporary, ".apmem2-%ld-%u-%llx.tmp", (long)getpid(),
             __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED), (unsigned long long)apm_now_ns());
    int fd;
    APM_OUTSIDE(fd, APM_CALL_OPEN, directory, 0, 0,
                openat(directory, temporary, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                       (mode_t)request->mode));
    if (fd < 0)
        return -errno;
    bool renamed = false;
    int result = fill(fd, request);
    if (result == 0) {
        APM_OUTSIDE(result, APM_CALL_LINK, fd, 0, 0, linkat(directory, temporary, directory, name, 0));
        if (result < 0)
            result = -errno;
        if (refused(result)) { /* no hard links on this file system */
            APM_OUTSIDE(result, APM_CALL_LINK, fd, 0, 0,
                        renameat2(directory, temporary, directory, name, RENAME_NOREPLACE));
            result = result < 0 ? -errno : 0;
            renamed = result == 0;
        }
    }
    if (!renamed)
        (void)unlink_name(directory, temporary);
    if (result == 0)
        result = settle_name(fd, directory, name, inode);
    close(fd);
    return result;
}

int apm_create_file(int directory, const char *name, const struct apm_open_request *request, uint64_t *inode) {
    int fd = open_unnamed(directory, request->mode);
    if (refused(fd) || fd == -EISDIR || fd == -ENOENT)
        return create_named(directory, name, request, inode); /* kernels and file systems without O_TMPFILE */
    if (fd < 0)
        return fd;
    int result = fill(fd, request);
    bool linked = false;
    if (result == 0) {
        result = link_unnamed(fd, directory, name);
        linked = result == 0;
    }
    if (linked)
        result = settle_name(fd, directory, name, inode);
    close(fd);
    if (!linked && (result == -ENOENT || refused(result))) /* no /proc to link through, or not allowed to */
        return create_named(directory, name, request, inode);
    return result;
}
