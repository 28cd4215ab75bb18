/* apm_adopt.c - may this memory, which somebody else mapped, be persisted, and of which file is it?
 *
 * The kernel's table is walked over the whole range: mapped, shared, one file, going on in memory as in the file. The file is
 * the given source's, compared with what the table shows for a mapping of that, or it is found: by the mapping's own link, by
 * its name, among the descriptors of this process. Nothing of the mapping is changed. */
#include "apm_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MAP_SYNC
#define MAP_SYNC 0x80000
#endif
#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 3
#endif

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
    int result = apm_file_obtain(handle, about, false, -1, NULL, out, cause);
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
        result = apm_file_without_descriptor(vma, out, cause);
    return result;
}

/* Walks the kernel's table over [address, end): one file, shared, each mapping going on where the last ended, in memory
 * and in the file. */
static int inspect(struct apm_adopt_request *request, struct apm_vma *first, uint32_t *protection) {
    uint64_t end = request->address + request->length, at = request->address;
    *protection = APM_PROT_READ | APM_PROT_WRITE;
    while (at < end) {
        struct apm_vma vma;
        request->bad_address = at;
        int result = apm_vma_at(at, &vma);
        if (result < 0)
            return result;
        if (!vma.shared || vma.inode == 0)
            return APM_E_PRIVATE_MEMORY;
        if (at == request->address)
            *first = vma;
        else if (vma.inode != first->inode || vma.device != first->device || strcmp(vma.name, first->name) != 0)
            return APM_E_OTHER_FILE;
        else if (vma.offset + (at - vma.start) != first->offset + (at - first->start))
            return APM_E_NOT_CONTIGUOUS;
        *protection &= (vma.readable ? APM_PROT_READ : 0u) | (vma.writable ? APM_PROT_WRITE : 0u);
        at = vma.end;
    }
    return 0;
}

/* The bytes of a last page beyond the end of the file never reach it. */
int apm_file_holds(const struct apm_file *file, uint64_t offset, uint64_t length) {
    struct stat about;
    int result;
    if (file->fd < 0)
        return 0;
    APM_OUTSIDE(result, APM_CALL_FSTAT, file->inode, 0, 0, fstat(apm_file_fd(file), &about));
    if (result < 0)
        return -errno;
    return offset + length > (uint64_t)about.st_size ? APM_E_MAP_RANGE : 0;
}

/* CACHE_LINE wants MAP_SYNC on all of this very mapping; only where the file could have it is the slow table read. */
static bool is_synchronous(const struct apm_file *file, uint64_t address, uint64_t length) {
    if (file->fd < 0)
        return false;
    void *probe = apm_sys_mmap(APM_CALL_MMAP_SYNC, NULL, apm_page_size(), PROT_READ, MAP_SHARED_VALIDATE | MAP_SYNC,
                               apm_file_fd(file), 0);
    if (probe == MAP_FAILED)
        return false;
    munmap(probe, apm_page_size());
    for (uint64_t at = address; at < address + length; ) {
        struct apm_vma vma;
        if (apm_vma_is_synchronous(at) != 1 || apm_vma_at(at, &vma) < 0)
            return false;
        at = vma.end;
    }
    return true;
}

int apm_adopt_run(struct apm_adopt_request *request) {
    struct apm_vma vma;
    uint32_t protection;
    request->map = NULL;
    request->path[0] = 0;
    request->granularity = APM_PAGE;
    if (request->length == 0 || request->address + request->length < request->address)
        return APM_E_LENGTH_OUT_OF_RANGE;
    if (request->address == 0)
        return APM_E_ADDRESS_NULL;
    int result = inspect(request, &vma, &protection);
    if (result < 0)
        return result;
    strcpy(request->path, vma.name);
    struct apm_file *file = request->file;
    if (file) {
        if (!apm_file_is_mapped(file, &vma))
            return APM_E_OTHER_FILE;
        request->cause = apm_file_failure(file);
        if (request->cause)
            return APM_E_FILE_FAILED;
    } else {
        result = apm_file_of_vma(&vma, &file, &request->cause);
        if (result < 0)
            return result;
    }
    result = apm_file_holds(file, vma.offset + (request->address - vma.start), request->length);
    if (result < 0) {
        if (!request->file)
            apm_file_release(file);
        return result;
    }
    bool map_sync = is_synchronous(file, request->address, request->length);
    bool forced;
    uint32_t granularity = apm_map_force(apm_granted_granularity(map_sync), &forced);
    request->granularity = granularity;
    struct apm_map_full *map = NULL;
    if (request->claimed >= 0 && (uint32_t)request->claimed < granularity)
        result = APM_E_GRANULARITY_NOT_SUPPORTED;
    else if ((map = apm_map_new()) == NULL)
        result = -ENOMEM;
    if (result == 0)
        apm_file_hold_for_map(file);
    if (!request->file)
        apm_file_release(file); /* what looking for it took */
    if (result < 0)
        return result;
    if (request->claimed >= 0)
        granularity = (uint32_t)request->claimed; /* coarser than granted is allowed: it only costs */
    map->pub = (struct apm_map){.address = request->address, .length = request->length,
                                .offset = vma.offset + (request->address - vma.start), .file = file,
                                .granularity = granularity, .durability = apm_map_durability(file, APM_SHARED, forced),
                                .sharing = APM_SHARED, .adopted = 1, .forced = forced, .map_sync = map_sync,
                                .protection = protection};
    apm_map_decide_copies(&map->pub);
    request->map = &map->pub;
    return 0;
}

int apm_check_run(const struct apm_map *map, struct apm_check_request *request) {
    uint64_t at = map->address, end = at + map->length;
    request->still_there = 0;
    while (at < end) {
        struct apm_vma vma;
        int result = apm_vma_at(at, &vma);
        if (result == APM_E_NOT_MAPPED)
            return 0;
        if (result < 0)
            return result;
        if (!vma.shared || !apm_file_is_mapped(map->file, &vma) ||
            vma.offset + (at - vma.start) != map->offset + (at - map->address))
            return 0;
        at = vma.end;
    }
    request->still_there = 1;
    return 0;
}
