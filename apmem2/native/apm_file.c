/* apm_file.c - which files has this process, and is one of them failed?
 *
 * A write-back error is told once per open file description, and never to one that was opened after others were
 * told (law 13). So each file has one description of its own here, re-opened and never dup'ed from the caller's,
 * shared by all its maps, and one latch (law 4). The table is keyed by (device, inode). A file that failed stays in
 * it as a tombstone after its close: who opens it anew must first get rid of the page cache, which shows bytes that
 * the disk does not have (promise 3).
 *
 * Files are looked at through O_PATH descriptors: opening and closing one of those has no effect on devices and
 * pipes, and, unlike closing any other descriptor, does not drop the fcntl locks of the process. */
#include "apm_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUCKETS = 64, PURGE_TRIES = 3, CREATE_TRIES = 8 };

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
static void discard(int fd, uint64_t inode) {
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
                discard(fd, now.st_ino);
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
    file->pub.durability = is_dup && medium.durability == APM_DURABILITY_POWER_LOSS ? APM_DURABILITY_UNKNOWN
                                                                                    : medium.durability;
    file->pub.file_system = medium.file_system;
    file->pub.is_dup = is_dup;
    probe_identity(&file->pub, about);
}

/* The file behind handle, with one reference for the caller. */
static int obtain(int handle, const struct stat *about, bool must_write, int directory, const char *name,
                  struct apm_file **out, int32_t *cause) {
    bool writable = false, is_dup = false, failed_before = false;
    uint64_t serial_before = 0;
    pthread_mutex_lock(&files_lock);
    struct apm_file_full *file = find(about->st_dev, about->st_ino);
    if (file)
        file->joined = true;
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
    if (fd < 0 && !must_write && !(fcntl(handle, F_GETFL) & O_PATH)) {
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
            discard(fd, about->st_ino);
            *cause = failure;
            return result;
        }
    }
    struct apm_file_full *fresh = apm_allocate(sizeof *fresh);
    if (!fresh) {
        discard(fd, about->st_ino);
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
            file->dsync_works = false;
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
            file->pub.durability = fresh->pub.durability;
        } else {
            spare = fd; /* another thread was faster */
        }
        file->references++;
        file->retained = false;
    }
    pthread_mutex_unlock(&files_lock);
    discard(spare, about->st_ino);
    free(fresh);
    if (result == 0)
        *out = &file->pub;
    return result;
}

static int by_descriptor(struct apm_open_request *request) {
    struct stat about;
    int flags = fcntl(request->fd, F_GETFL);
    if (flags < 0)
        return -errno;
    if ((flags & O_ACCMODE) == O_WRONLY || (flags & O_PATH))
        return APM_E_INVALID_FILE_HANDLE;
    int result;
    APM_OUTSIDE(result, APM_CALL_FSTAT, request->fd, 0, 0, fstat(request->fd, &about));
    if (result < 0)
        return -errno;
    if (!S_ISREG(about.st_mode))
        return APM_E_INVALID_FILE_TYPE;
    request->access = APM_PROT_READ | ((flags & O_ACCMODE) == O_RDWR ? APM_PROT_WRITE : 0u);
    request->file_size = (uint64_t)about.st_size;
    return obtain(request->fd, &about, false, -1, NULL, &request->file, &request->cause);
}

/* One change of size at a time, in this process by a mark, among processes by a lock on a byte that nobody maps. The lock
 * is a description's own (OFD) and never waits: who holds the whole file locked has it refused, not hung. */
static int begin_growing(struct apm_file_full *file, int *lock_fd) {
    char own[64];
    pthread_mutex_lock(&files_lock);
    while (file->growing)
        pthread_cond_wait(&grown, &files_lock);
    file->growing = true;
    file->joined = false;
    pthread_mutex_unlock(&files_lock);
    snprintf(own, sizeof own, "/proc/self/fd/%d", apm_file_fd(&file->pub));
    APM_OUTSIDE(*lock_fd, APM_CALL_OPEN, file->pub.inode, 0, 0, open(own, O_RDWR | O_CLOEXEC));
    struct flock byte = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = INT64_MAX - 1, .l_len = 1};
    if (*lock_fd >= 0 && fcntl(*lock_fd, F_OFD_SETLK, &byte) < 0 && (errno == EAGAIN || errno == EACCES))
        return -EBUSY;
    return 0; /* no /proc, no such locks: only this process is kept out (law 16) */
}

static void end_growing(struct apm_file_full *file, int lock_fd) {
    discard(lock_fd, file->pub.inode);
    pthread_mutex_lock(&files_lock);
    file->growing = false;
    pthread_cond_broadcast(&grown);
    pthread_mutex_unlock(&files_lock);
}

static int size_now(const struct apm_file *file, uint64_t *size) {
    struct stat about;
    int result;
    APM_OUTSIDE(result, APM_CALL_FSTAT, file->fd, 0, 0, fstat(apm_file_fd(file), &about));
    if (result < 0)
        return -errno;
    *size = (uint64_t)about.st_size;
    return 0;
}

/* Makes the file as long as was asked for. What others have put into it meanwhile stays. */
static int grow(struct apm_open_request *request) {
    struct apm_file_full *file = (struct apm_file_full *)request->file;
    int lock_fd, result = begin_growing(file, &lock_fd);
    uint64_t before = 0;
    if (result == 0)
        result = size_now(request->file, &before);
    if (result == 0 && before < request->size) {
        result = apm_extend_file(apm_file_fd(request->file), before, request);
        if (result == 0) {
            result = apm_sync_file(apm_file_fd(request->file));
            if (result < 0) /* the description is shared: nobody else will be told of this one (laws 4, 13) */
                apm_file_fail(request->file, result);
        }
        if (result < 0) { /* back to what it was, unless somebody has seen it longer by now */
            pthread_mutex_lock(&files_lock);
            bool joined = file->joined;
            pthread_mutex_unlock(&files_lock);
            if (!joined)
                apm_cut_file(apm_file_fd(request->file), before);
        }
    }
    end_growing(file, lock_fd);
    return result < 0 ? result : size_now(request->file, &request->file_size);
}

/* size is asked for and the file has another one: grow it, or say so. */
static int match_size(struct apm_open_request *request) {
    int result = size_now(request->file, &request->file_size);
    if (result == 0 && request->size > request->file_size && (request->flags & APM_OPEN_GROW))
        result = grow(request);
    if (result == 0 && request->size != 0 && request->size != request->file_size)
        result = APM_E_SIZE_MISMATCH;
    return result;
}

static void mark_synced(struct apm_file *file) {
    pthread_mutex_lock(&files_lock);
    ((struct apm_file_full *)file)->synced = true;
    pthread_mutex_unlock(&files_lock);
}

/* Who made the file may have died, or never asked, before it and its name were durable; the promises that are made under
 * it from now on must not hang on that (law 15). The file once, the name each time: it may be another one. */
static int sync_name(struct apm_file *pub, int directory) {
    struct apm_file_full *file = (struct apm_file_full *)pub;
    pthread_mutex_lock(&files_lock);
    bool synced = file->synced;
    pthread_mutex_unlock(&files_lock);
    if (!synced) {
        int result = apm_sync_file(apm_file_fd(pub));
        if (result < 0) {
            apm_file_fail(pub, result);
            return result;
        }
        mark_synced(pub);
    }
    return apm_sync_directory(directory);
}

/* What may be opened by path: a regular file of this user, unless others are asked for. */
static int acceptable(const struct apm_open_request *request, const struct stat *about) {
    if (S_ISLNK(about->st_mode))
        return -ELOOP;
    if (S_ISDIR(about->st_mode))
        return -EISDIR;
    if (!S_ISREG(about->st_mode))
        return APM_E_INVALID_FILE_TYPE;
    bool own_only = !(request->flags & APM_OPEN_FOREIGN_OWNER);
    return own_only && about->st_uid != geteuid() ? APM_E_FOREIGN_OWNER : 0;
}

/* made: the inode of a file that was made just now and is durable with its name, or 0. */
static int open_existing(struct apm_open_request *request, int handle, int directory, const char *name, uint64_t made) {
    struct stat about;
    int result;
    APM_OUTSIDE(result, APM_CALL_FSTAT, handle, 0, 0, fstat(handle, &about));
    result = result < 0 ? -errno : acceptable(request, &about);
    if (result < 0)
        return result;
    bool must_write = !(request->flags & APM_OPEN_READ_ENOUGH);
    result = obtain(handle, &about, must_write, directory, name, &request->file, &request->cause);
    if (result < 0)
        return result;
    request->access = APM_PROT_READ | (request->file->writable ? APM_PROT_WRITE : 0u);
    if (made && about.st_ino == made)
        mark_synced(request->file);
    else
        result = sync_name(request->file, directory);
    if (result == 0)
        result = match_size(request);
    if (result < 0) {
        apm_file_release(request->file);
        request->file = NULL;
    }
    return result;
}

/* A new file is made whole and visible, and then opened like any other: the description that made it would be known to the
 * kernel by no name for ever. */
static int open_in(struct apm_open_request *request, int directory, const char *name) {
    uint64_t made = 0;
    for (int tries = 0; tries < CREATE_TRIES; tries++) {
        int handle, result;
        APM_OUTSIDE(handle, APM_CALL_OPEN, directory, 0, 0,
                    openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC));
        if (handle >= 0) {
            result = open_existing(request, handle, directory, name, made);
            close(handle);
            return result;
        }
        if (errno != ENOENT || !(request->flags & APM_OPEN_CREATE) || request->size == 0)
            return -errno;
        result = apm_create_file(directory, name, request, &made);
        if (result < 0 && result != -EEXIST) /* else somebody was faster: theirs it is */
            return result;
        request->created = result == 0;
    }
    return -EEXIST;
}

static int by_path(struct apm_open_request *request) {
    char *path = strdup(request->path);
    if (!path)
        return -ENOMEM;
    char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path, *parent = slash == path ? "/" : slash ? path : ".";
    if (slash)
        *slash = 0;
    int result;
    if (!*name || strcmp(name, ".") == 0 || strcmp(name, "..") == 0) {
        result = request->path[0] ? -EISDIR : -ENOENT;
    } else {
        int directory;
        APM_OUTSIDE(directory, APM_CALL_OPEN, 0, 0, 0, open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (directory < 0) {
            result = -errno;
        } else {
            result = open_in(request, directory, name);
            close(directory);
        }
    }
    free(path);
    return result;
}

int apm_file_open(struct apm_open_request *request) {
    request->file = NULL;
    int result = request->path ? by_path(request) : by_descriptor(request);
    if (result == 0 && __atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE)) {
        apm_file_release(request->file); /* nobody is there to take it */
        request->file = NULL;
        return APM_E_WITHDRAWN;
    }
    return result;
}

/* The kernel's table shows a file by two numbers, which on btrfs are the same for equal inode numbers in two subvolumes.
 * There the mapping's own link is looked at, or, where that is not allowed, its name. */
bool apm_file_is_mapped(const struct apm_file *file, const struct apm_vma *vma) {
    static const uint64_t btrfs = 0x9123683E;
    if (file->vma_device != vma->device || file->vma_inode != vma->inode)
        return false;
    if ((uint32_t)file->file_system != btrfs || file->fd < 0)
        return true;
    char path[96], name[sizeof vma->name];
    struct stat about;
    int handle;
    snprintf(path, sizeof path, "/proc/self/map_files/%llx-%llx", (unsigned long long)vma->start,
             (unsigned long long)vma->end);
    APM_OUTSIDE(handle, APM_CALL_OPEN, vma->inode, 0, 0, open(path, O_PATH | O_CLOEXEC));
    if (handle >= 0) {
        bool same = fstat(handle, &about) == 0 && about.st_dev == file->device && about.st_ino == file->inode;
        close(handle);
        return same;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", apm_file_fd(file));
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length < 0)
        return false;
    name[length] = 0;
    return strcmp(name, vma->name) == 0;
}

/* Is the file behind this handle the one that the kernel shows for vma? */
static int try_file(int handle, const struct stat *about, const struct apm_vma *vma, struct apm_file **out,
                    int32_t *cause) {
    int result = obtain(handle, about, false, -1, NULL, out, cause);
    if (result == 0 && !apm_file_is_mapped(*out, vma)) {
        apm_file_release(*out);
        *out = NULL;
        return -ENOENT;
    }
    return result;
}

static int try_path(const char *path, const struct apm_vma *vma, struct apm_file **out, int32_t *cause) {
    struct stat about;
    int handle, result = -ENOENT;
    APM_OUTSIDE(handle, APM_CALL_OPEN, vma->inode, 0, 0, open(path, O_PATH | O_CLOEXEC));
    if (handle < 0)
        return -errno;
    if (fstat(handle, &about) == 0 && S_ISREG(about.st_mode))
        result = try_file(handle, &about, vma, out, cause);
    close(handle);
    return result;
}

static int try_own_descriptors(const struct apm_vma *vma, struct apm_file **out, int32_t *cause) {
    DIR *directory = opendir("/proc/self/fd");
    if (!directory)
        return -ENOENT;
    int result = -ENOENT;
    struct dirent *entry;
    while (result == -ENOENT && (entry = readdir(directory)) != NULL) {
        struct stat about;
        int number = atoi(entry->d_name);
        if (entry->d_name[0] == '.' || fstat(number, &about) != 0 || about.st_ino != vma->inode ||
            !S_ISREG(about.st_mode))
            continue;
        result = try_file(number, &about, vma, out, cause);
        if (result < 0 && result != APM_E_FILE_FAILED && result != APM_E_CACHE_NOT_DROPPED)
            result = -ENOENT;
    }
    closedir(directory);
    return result;
}

/* Memory that no name leads to: anonymous shared memory, or a file that cannot be reached any more. */
static int without_descriptor(const struct apm_vma *vma, struct apm_file **out, int32_t *cause) {
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

int apm_file_of_vma(const struct apm_vma *vma, struct apm_file **out, int32_t *cause) {
    static const char deleted[] = " (deleted)";
    char path[96];
    snprintf(path, sizeof path, "/proc/self/map_files/%llx-%llx", (unsigned long long)vma->start,
             (unsigned long long)vma->end);
    int result = try_path(path, vma, out, cause); /* exact, where we are allowed to */
    size_t length = strlen(vma->name);
    bool gone = length >= sizeof deleted - 1 && strcmp(vma->name + length - (sizeof deleted - 1), deleted) == 0;
    if (result < 0 && result != APM_E_FILE_FAILED && result != APM_E_CACHE_NOT_DROPPED && vma->name[0] == '/' && !gone)
        result = try_path(vma->name, vma, out, cause);
    if (result < 0 && result != APM_E_FILE_FAILED && result != APM_E_CACHE_NOT_DROPPED)
        result = try_own_descriptors(vma, out, cause);
    if (result < 0 && result != APM_E_FILE_FAILED && result != APM_E_CACHE_NOT_DROPPED)
        result = without_descriptor(vma, out, cause);
    return result;
}
