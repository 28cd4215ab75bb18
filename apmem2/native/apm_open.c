/* apm_open.c - how does a path or a descriptor become a file of this process?
 *
 * Files are looked at through O_PATH descriptors first: opening and closing one of those has no effect on devices and
 * pipes, and does not drop the fcntl locks of the process. What is accepted is found in the table of apm_file.c or opened
 * anew; what is missing is made by apm_create.c; and whatever it is, its size and name are durable before anybody promises
 * anything under them (law 15). */
#include "apm_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CREATE_TRIES = 8 };

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
    return apm_file_obtain(request->fd, &about, false, -1, NULL, &request->file, &request->cause);
}

/* fsync, by a description of its own: the one that the rounds use must not have its error mark taken away by somebody who is
 * not in the round, for the round would then say "durable" (laws 4, 13). An error here fails the file as well. */
static int sync_apart(struct apm_file *file) {
    char own[64];
    int fd;
    snprintf(own, sizeof own, "/proc/self/fd/%d", apm_file_fd(file));
    APM_OUTSIDE(fd, APM_CALL_OPEN, file->inode, 0, 0, open(own, O_RDONLY | O_CLOEXEC));
    int result = apm_sync_file(fd >= 0 ? fd : apm_file_fd(file));
    if (fd >= 0)
        apm_file_discard(fd, file->inode);
    if (result < 0)
        apm_file_fail(file, result);
    return result;
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
    int lock_fd, result = apm_file_begin_growing(request->file, &lock_fd);
    uint64_t before = 0;
    if (result == 0)
        result = size_now(request->file, &before);
    if (result == 0 && before < request->size) {
        result = apm_extend_file(apm_file_fd(request->file), before, request);
        if (result == 0) {
            result = sync_apart(request->file);
        } else {
            /* Blocks that were reserved are given back while nobody has seen the file longer. Once it is longer it stays
             * so: others, of other processes too, may have mapped the new bytes and made some of them durable. */
            uint64_t now;
            if (size_now(request->file, &now) == 0 && now == before)
                apm_cut_file(apm_file_fd(request->file), before);
        }
    }
    apm_file_end_growing(request->file, lock_fd);
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

/* Who made the file may have died, or never asked, before it and its name were durable; the promises that are made under
 * it from now on must not hang on that (law 15). The file once, the name each time: it may be another one. */
static int sync_name(struct apm_file *pub, int directory) {
    if (!apm_file_is_synced(pub)) {
        int result = sync_apart(pub);
        if (result < 0)
            return result;
        apm_file_mark_synced(pub);
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
    result = apm_file_obtain(handle, &about, must_write, directory, name, &request->file, &request->cause);
    if (result < 0)
        return result;
    request->access = APM_PROT_READ | (request->file->writable ? APM_PROT_WRITE : 0u);
    if (made && about.st_ino == made)
        apm_file_mark_synced(request->file);
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
