/* apm_file.c - which files has this process, and is one of them failed?
 *
 * A write-back error is told once per open file description, and never to one that was opened after others were
 * told (law 13). So each file has one description of its own here, re-opened and never dup'ed from the caller's,
 * shared by all its maps, and one latch (law 4). The table is keyed by (device, inode). A file that failed stays in
 * it as a tombstone after its close: who opens it anew must first get rid of the page cache, which shows bytes that
 * the disk does not have (promise 3).
 */
#include "apm_internal.h"

#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUCKETS = 64, PURGE_TRIES = 3 };

static pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static struct apm_file_full *buckets[BUCKETS]; /* files_lock */
static uint64_t serials;                       /* files_lock */
static pthread_cond_t grown = PTHREAD_COND_INITIALIZER; /* some file's growing has ended; files_lock */

static struct apm_file_full **bucket_of(uint64_t device, uint64_t inode) {
    return &buckets[(device * 31 + inode) % BUCKETS];
}

static struct apm_file_full *find(uint64_t device, uint64_t inode) { /* files_lock held */
    for (struct apm_file_full *file = *bucket_of(device, inode); file; file = file->next)
        if (file->pub.device == device && file->pub.inode == inode)
            return file;
    return NULL;
}

void apm_file_fail(struct apm_file *file, int code) {
    int32_t none = 0;
    __atomic_compare_exchange_n(&file->failed, &none, code, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Closing any descriptor of a file drops every fcntl lock that this process holds on it: SQLite's or LMDB's. When
 * that cannot be ruled out the answer is yes. */
static bool has_posix_lock(uint64_t inode) {
    FILE *stream = fopen("/proc/locks", "re");
    if (!stream)
        return true;
    char *line = NULL;
    size_t room = 0;
    bool held = false;
    while (!held && getline(&line, &room, stream) > 0) {
        char kind[16];
        long pid;
        unsigned long long number;
        /* "1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"; the device is not compared: btrfs shows another one */
        if (sscanf(line, "%*d: %15s %*s %*s %ld %*x:%*x:%llu", kind, &pid, &number) == 3)
            held = strcmp(kind, "POSIX") == 0 && pid == (long)getpid() && number == inode;
    }
    free(line);
    fclose(stream);
    return held;
}

static void close_fd(int fd) {
    int result;
    APM_OUTSIDE(result, APM_CALL_CLOSE, fd, 0, 0, close(fd));
    (void)result; /* the descriptor is gone whatever close says; errors of writes were asked for by a sync */
}

/* A description that nobody needs: closed, or left open until the process ends where closing it would do harm. */
void apm_file_discard(int fd, uint64_t inode) {
    if (fd >= 0 && !has_posix_lock(inode))
        close_fd(fd);
}

/* In the pool: the last user has gone. */
static void close_file(struct apm_work *work) {
    struct apm_file_full *file =
        (struct apm_file_full *)((char *)work - offsetof(struct apm_file_full, close_work));
    bool keep = has_posix_lock(file->pub.inode);
    int fds[5], count = 0;
    pthread_mutex_lock(&files_lock);
    file->close_work.run = NULL;
    if (file->references > 0) {
        pthread_mutex_unlock(&files_lock); /* found again in the meantime */
        return;
    }
    if (keep) {
        file->retained = true;
        pthread_mutex_unlock(&files_lock);
        return;
    }
    if (file->pub.fd >= 0)
        fds[count++] = file->pub.fd;
    for (uint32_t i = 0; i < file->old_count; i++)
        fds[count++] = file->old_fds[i];
    file->pub.fd = -1;
    file->old_count = 0;
    if (!apm_file_failure(&file->pub)) {
        struct apm_file_full **at = bucket_of(file->pub.device, file->pub.inode);
        while (*at != file)
            at = &(*at)->next;
        *at = file->next;
        free(file);
    } /* else: a tombstone, so that opening anew knows */
    pthread_mutex_unlock(&files_lock);
    while (count)
        close_fd(fds[--count]);
}

void apm_file_hold_for_map(struct apm_file *pub) {
    pthread_mutex_lock(&files_lock);
    ((struct apm_file_full *)pub)->references++;
    ((struct apm_file_full *)pub)->maps++;
    pthread_mutex_unlock(&files_lock);
}

/* Was this the last reference, and nobody about to close? */
static bool drop_reference(struct apm_file_full *file, bool of_map) {
    bool last = false;
    pthread_mutex_lock(&files_lock);
    file->maps -= of_map;
    if (--file->references == 0 && !file->close_work.run) {
        file->close_work.run = close_file;
        last = true;
    }
    pthread_mutex_unlock(&files_lock);
    return last;
}

void apm_file_release(struct apm_file *file) {
    if (file && !apm_is_forked() && drop_reference((struct apm_file_full *)file, false))
        apm_pool_schedule(&((struct apm_file_full *)file)->close_work);
}

void apm_file_drop_for_map(struct apm_file *file) {
    if (file && drop_reference((struct apm_file_full *)file, true))
        close_file(&((struct apm_file_full *)file)->close_work);
}

/* After a failed write-back: are the file's cached pages gone? Nothing may be believed before they are. */
static int purge(int fd) {
    struct stat about;
    int result = apm_sync_data(fd);
    if (result < 0)
        return result;
    APM_OUTSIDE(result, APM_CALL_FSTAT, fd, 0, 0, fstat(fd, &about));
    if (result < 0)
        return -errno;
    const uint64_t page = apm_page_size(), piece = (uint64_t)1 << 28;
    unsigned char *resident = apm_allocate(piece / page);
    if (!resident)
        return -ENOMEM;
    int tries = 0;
    bool clean = false;
    while (!clean && tries++ < PURGE_TRIES) {
        APM_OUTSIDE(result, APM_CALL_FADVISE, fd, 0, 0, posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
        clean = true;
        for (uint64_t at = 0; clean && at < (uint64_t)about.st_size; at += piece) {
            uint64_t size = (uint64_t)about.st_size - at < piece ? (uint64_t)about.st_size - at : piece;
            void *window = apm_sys_mmap(APM_CALL_MMAP, NULL, size, PROT_READ, MAP_SHARED, fd, at);
            if (window == MAP_FAILED) {
                result = -errno;
                free(resident);
                return result;
            }
            APM_OUTSIDE(result, APM_CALL_MINCORE, fd, at, size, mincore(window, size, resident));
            clean = result == 0;
            for (uint64_t i = 0; clean && i < (size + page - 1) / page; i++)
                clean = !(resident[i] & 1);
            munmap(window, size);
        }
    }
    free(resident);
    return clean ? 0 : APM_E_CACHE_NOT_DROPPED;
}

/* A description of our own for what handle refers to: *writable tells which. With a directory and name as the plain
 * way where there is no /proc. */
static int reopen(int handle, const struct stat *about, bool must_write, int directory, const char *name,
                  bool *writable) {
    char own[64];
    snprintf(own, sizeof own, "/proc/self/fd/%d", handle);
    for (int write = 1; write >= 0; write--) {
        int fd, flags = (write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY;
        APM_OUTSIDE(fd, APM_CALL_OPEN, about->st_ino, 0, 0, open(own, flags));
        if (fd < 0 && (errno == ENOENT || errno == ELOOP) && name)
            APM_OUTSIDE(fd, APM_CALL_OPEN, about->st_ino, 0, 0, openat(directory, name, flags | O_NOFOLLOW));
        if (fd >= 0) {
            struct stat now;
            if (fstat(fd, &now) != 0 || now.st_ino != about->st_ino || now.st_dev != about->st_dev) {
                apm_file_discard(fd, about->st_ino);
                return -ESTALE; /* somebody put another file under this name */
            }
            *writable = write;
            return fd;
        }
        int error = errno;
        bool forbidden = error == EACCES || error == EPERM || error == EROFS || error == ETXTBSY;
        if (must_write || !forbidden)
            return -error;
    }
    return -EACCES;
}

/* What the kernel's table shows for a mapping of fd. Asked, not derived: on btrfs it is not st_dev. */
static void probe_identity(struct apm_file *file, const struct stat *about) {
    struct apm_vma vma;
    file->vma_device = about->st_dev;
    file->vma_inode = about->st_ino;
    size_t page = apm_page_size();
    void *probe = apm_sys_mmap(APM_CALL_MMAP, NULL, page, PROT_READ, MAP_SHARED, file->fd, 0);
    if (probe == MAP_FAILED)
        return;
    if (apm_vma_at((uintptr_t)probe, &vma) == 0) {
        file->vma_device = vma.device;
        file->vma_inode = vma.inode;
    }
    munmap(probe, page);
}

static void fill_in(struct apm_file_full *file, const struct stat *about, int fd, bool writable, bool is_dup) {
    struct apm_medium medium;
    apm_medium_of(fd, &medium);
    file->pub.device = about->st_dev;
    file->pub.inode = about->st_ino;
    file->pub.fd = fd;
    file->pub.writable = writable;
    file->pub.coherent = medium.coherent && !is_dup;
    file->pub.range_sync = medium.range_sync;
    file->pub.one_flush = medium.one_flush && !is_dup;
    file->pub.durability = is_dup && medium.durability == APM_DURABILITY_POWER_LOSS ? APM_DURABILITY_UNKNOWN
                                                                                    : medium.durability;
    if (about->st_nlink == 0)
        file->pub.durability = APM_DURABILITY_NONE; /* no name leads to it, so nobody will read it after a cut */
    file->pub.file_system = medium.file_system;
    file->pub.is_dup = is_dup;
    probe_identity(&file->pub, about);
}

/* The file behind handle, with one reference for the caller. */
int apm_file_obtain(int handle, const struct stat *about, bool must_write, int directory, const char *name,
                  struct apm_file **out, int32_t *cause) {
    bool writable = false, is_dup = false, failed_before = false;
    uint64_t serial_before = 0;
    pthread_mutex_lock(&files_lock);
    struct apm_file_full *file = find(about->st_dev, about->st_ino);
    int failure = file ? apm_file_failure(&file->pub) : 0;
    if (failure && file->maps > 0) {
        pthread_mutex_unlock(&files_lock);
        *cause = failure;
        return APM_E_FILE_FAILED;
    }
    failed_before = failure != 0;
    serial_before = file ? file->pub.serial : 0;
    if (file && !failed_before && file->pub.fd >= 0 && (file->pub.writable || file->pub.is_dup)) {
        file->references++;
        file->retained = false;
        bool enough = file->pub.writable || !must_write;
        pthread_mutex_unlock(&files_lock);
        if (!enough) {
            apm_file_release(&file->pub);
            return -EACCES;
        }
        *out = &file->pub;
        return 0;
    }
    pthread_mutex_unlock(&files_lock);

    int fd = reopen(handle, about, must_write, directory, name, &writable);
    bool may_not = fd == -EACCES || fd == -EPERM || fd == -ENOENT;
    if (may_not && !must_write && !(fcntl(handle, F_GETFL) & O_PATH)) {
        /* better a shared memory of errors than none; durability is UNKNOWN then */
        fd = fcntl(handle, F_DUPFD_CLOEXEC, 0);
        if (fd < 0)
            return -errno;
        is_dup = true;
        writable = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
    }
    if (fd < 0)
        return fd;
    if (failed_before) {
        int result = purge(fd);
        if (result < 0) {
            apm_file_discard(fd, about->st_ino);
            *cause = failure;
            return result;
        }
    }
    struct apm_file_full *fresh = apm_allocate(sizeof *fresh);
    if (!fresh) {
        apm_file_discard(fd, about->st_ino);
        return -ENOMEM;
    }
    fill_in(fresh, about, fd, writable, is_dup);

    int result = 0, spare = -1;
    pthread_mutex_lock(&files_lock);
    file = find(about->st_dev, about->st_ino);
    failure = file ? apm_file_failure(&file->pub) : 0;
    if (!file) {
        struct apm_file_full **bucket = bucket_of(about->st_dev, about->st_ino);
        fresh->references = 1;
        fresh->pub.serial = ++serials;
        fresh->next = *bucket;
        *bucket = fresh;
        file = fresh;
        fresh = NULL;
    } else if (failure && file->maps > 0) {
        *cause = failure;
        result = APM_E_FILE_FAILED;
        spare = fd;
    } else if (failure && (!failed_before || file->pub.serial != serial_before)) {
        /* failed and closed while we opened: only a new look may believe */
        *cause = failure;
        result = APM_E_FILE_FAILED;
        spare = fd;
    } else {
        bool in_use = file->references > 0;
        if (failure || file->references == 0) {
            file->pub.serial = ++serials;
            __atomic_store_n(&file->pub.failed, 0, __ATOMIC_RELEASE);
            file->synced = false;
            file->dsync_works = file->ranges_work = false;
        }
        const uint32_t places = sizeof file->old_fds / sizeof *file->old_fds;
        if (in_use && file->pub.fd >= 0 && file->old_count == places) {
            spare = fd; /* no place for another; the one there has been told of what failed */
        } else if (failure || file->pub.fd < 0 || (writable && !file->pub.writable)) {
            if (in_use && file->pub.fd >= 0)
                file->old_fds[file->old_count++] = file->pub.fd; /* kept to the end: somebody may be using it */
            else
                spare = file->pub.fd;
            __atomic_store_n(&file->pub.fd, fd, __ATOMIC_RELEASE);
            __atomic_store_n(&file->pub.writable, writable, __ATOMIC_RELEASE);
            file->pub.is_dup = is_dup;
            file->pub.coherent = fresh->pub.coherent;
            file->pub.range_sync = fresh->pub.range_sync;
            file->pub.one_flush = fresh->pub.one_flush;
            file->pub.durability = fresh->pub.durability;
        } else {
            spare = fd; /* another thread was faster */
        }
        file->references++;
        file->retained = false;
    }
    pthread_mutex_unlock(&files_lock);
    apm_file_discard(spare, about->st_ino);
    free(fresh);
    if (result == 0)
        *out = &file->pub;
    return result;
}

/* ---- changes of size, and what is durable of a file: the marks are the table's ------------------------------------ */

static struct flock growth_byte(short type) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = INT64_MAX - 1, .l_len = 1};
}

/* One change of size at a time, in this process by a mark, among processes by a lock on a byte that nobody maps. The lock
 * is a description's own (OFD) and never waits: who holds the whole file locked has it refused, not hung. */
int apm_file_begin_growing(struct apm_file *pub, int *lock_fd) {
    struct apm_file_full *file = (struct apm_file_full *)pub;
    char own[64];
    pthread_mutex_lock(&files_lock);
    while (file->growing)
        pthread_cond_wait(&grown, &files_lock);
    file->growing = true;
    pthread_mutex_unlock(&files_lock);
    snprintf(own, sizeof own, "/proc/self/fd/%d", apm_file_fd(&file->pub));
    APM_OUTSIDE(*lock_fd, APM_CALL_OPEN, file->pub.inode, 0, 0, open(own, O_RDWR | O_CLOEXEC));
    struct flock byte = growth_byte(F_WRLCK);
    if (*lock_fd >= 0 && fcntl(*lock_fd, F_OFD_SETLK, &byte) < 0 && (errno == EAGAIN || errno == EACCES))
        return -EBUSY;
    return 0; /* no /proc, no such locks: only this process is kept out (law 16) */
}

void apm_file_end_growing(struct apm_file *pub, int lock_fd) {
    struct apm_file_full *file = (struct apm_file_full *)pub;
    struct flock byte = growth_byte(F_UNLCK); /* given back by name: the descriptor may have to stay open */
    if (lock_fd >= 0)
        (void)fcntl(lock_fd, F_OFD_SETLK, &byte);
    apm_file_discard(lock_fd, file->pub.inode);
    pthread_mutex_lock(&files_lock);
    file->growing = false;
    pthread_cond_broadcast(&grown);
    pthread_mutex_unlock(&files_lock);
}

bool apm_file_is_synced(const struct apm_file *file) {
    pthread_mutex_lock(&files_lock);
    bool synced = ((const struct apm_file_full *)file)->synced;
    pthread_mutex_unlock(&files_lock);
    return synced;
}

void apm_file_mark_synced(struct apm_file *file) {
    pthread_mutex_lock(&files_lock);
    ((struct apm_file_full *)file)->synced = true;
    pthread_mutex_unlock(&files_lock);
}

/* Memory that no name leads to: anonymous shared memory, or a file that cannot be reached any more. */
int apm_file_without_descriptor(const struct apm_vma *vma, struct apm_file **out, int32_t *cause) {
    static const char *const volatile_names[] = {"/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "/anon_hugepage",
                                                 "/i915", "[anon_shmem"};
    const uint64_t device = vma->device | (uint64_t)1 << 63; /* a key that no st_dev has */
    struct apm_file_full *fresh = apm_allocate(sizeof *fresh);
    if (!fresh)
        return -ENOMEM;
    fresh->pub = (struct apm_file){.device = device, .inode = vma->inode, .fd = -1,
                                   .durability = APM_DURABILITY_UNKNOWN, .vma_device = vma->device,
                                   .vma_inode = vma->inode};
    for (size_t i = 0; i < sizeof volatile_names / sizeof *volatile_names; i++)
        if (strncmp(vma->name, volatile_names[i], strlen(volatile_names[i])) == 0)
            fresh->pub.durability = APM_DURABILITY_NONE;
    int result = 0;
    pthread_mutex_lock(&files_lock);
    struct apm_file_full *file = find(device, vma->inode);
    int failure = file ? apm_file_failure(&file->pub) : 0;
    if (failure) { /* without a descriptor the page cache cannot be dropped: it stays failed */
        *cause = failure;
        result = APM_E_FILE_FAILED;
    } else if (file) {
        file->references++;
        *out = &file->pub;
    } else {
        struct apm_file_full **bucket = bucket_of(device, vma->inode);
        fresh->references = 1;
        fresh->pub.serial = ++serials;
        fresh->next = *bucket;
        *bucket = fresh;
        *out = &fresh->pub;
        fresh = NULL;
    }
    pthread_mutex_unlock(&files_lock);
    free(fresh);
    return result;
}
