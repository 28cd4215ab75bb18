/* apm_map.c - how does a range of a file become memory, and when does it stop being that?
 *
 * Owned maps are mapped from the file's one description, because msync reports a failed write-back to the description
 * of the mapping (law 13). An adopted map is somebody else's mapping: it is looked at, never changed, never unmapped.
 * A map outlives its jobs (law 5): pins and the unmapping are counted in apm_pool.c under its lock. */
#include "apm_internal.h"

#include <fcntl.h>
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

uint64_t apm_page_size(void) {
    static uint64_t size;
    if (APM_UNLIKELY(!size))
        size = (uint64_t)sysconf(_SC_PAGESIZE);
    return size;
}

void *apm_sys_mmap(uint32_t call, void *at, size_t length, int protection, int flags, int fd, uint64_t offset) {
    intptr_t result;
    APM_OUTSIDE(result, call, fd, offset, length, (intptr_t)mmap(at, length, protection, flags, fd, (off_t)offset));
    return (void *)result;
}

struct apm_map_full *apm_map_new(void) {
    struct apm_map_full *map = apm_allocate(sizeof *map);
    if (map)
        map->references = 2; /* whoever holds the struct, and the memory */
    return map;
}

static int system_protection(uint32_t protection) {
    return (protection & APM_PROT_READ ? PROT_READ : 0) | (protection & APM_PROT_WRITE ? PROT_WRITE : 0) |
           (protection & APM_PROT_EXEC ? PROT_EXEC : 0);
}

/* What forcing does to a granularity that the kernel granted; *forced when it is finer than granted. */
uint32_t apm_map_force(uint32_t granted, bool *forced) {
    int wanted = apm_forced_granularity();
    *forced = wanted >= 0 && (uint32_t)wanted < granted;
    if (wanted < 0 || (wanted != APM_PAGE && !apm_cpu()->can_flush))
        return granted;
    return (uint32_t)wanted;
}

uint32_t apm_map_durability(const struct apm_file *file, uint32_t sharing, bool forced) {
    if (!file || sharing == APM_PRIVATE)
        return APM_DURABILITY_NONE;
    if (forced && file->durability == APM_DURABILITY_POWER_LOSS)
        return APM_DURABILITY_UNKNOWN; /* nobody syncs, so nothing is known to reach the medium (promise 6) */
    return file->durability;
}

void apm_map_decide_copies(struct apm_map *map) {
    map->by_pwrite = map->file && map->sharing == APM_SHARED && map->granularity == APM_PAGE &&
                     (map->protection & APM_PROT_WRITE) && map->file->writable && map->file->coherent;
}

/* Drops clean cached pages, so that large folios that writing or read-ahead left behind do not turn a one-page persist
 * into a megabyte of writing. Dirty and mapped pages stay; no error matters. */
static void drop_clean_cache(const struct apm_file *file, uint64_t offset, uint64_t length) {
    int result;
    APM_OUTSIDE(result, APM_CALL_FADVISE, file->inode, offset, length,
                posix_fadvise(apm_file_fd(file), (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED));
    (void)result;
}

int apm_map_run(struct apm_map_request *request) {
    struct apm_file *file = request->file;
    const uint64_t page = apm_page_size();
    request->map = NULL;
    if (request->sharing != APM_SHARED && request->sharing != APM_PRIVATE)
        return APM_E_INVALID_SHARING_VALUE;
    if (request->length == 0)
        return APM_E_LENGTH_OUT_OF_RANGE;
    if (request->offset % page)
        return APM_E_OFFSET_UNALIGNED;
    uint64_t rounded = (request->length + page - 1) & ~(page - 1);
    if (rounded < request->length)
        return APM_E_LENGTH_OUT_OF_RANGE;
    if (file) {
        struct stat about;
        int result;
        int failure = apm_file_failure(file);
        if (failure)
            return APM_E_FILE_FAILED;
        APM_OUTSIDE(result, APM_CALL_FSTAT, file->fd, 0, 0, fstat(apm_file_fd(file), &about));
        if (result < 0)
            return -errno;
        if (about.st_size == 0)
            return APM_E_SOURCE_EMPTY;
        if (request->offset >= (uint64_t)about.st_size)
            return APM_E_OFFSET_OUT_OF_RANGE;
        if (request->length > (uint64_t)about.st_size - request->offset)
            return APM_E_MAP_RANGE;
    }
    struct apm_map_full *map = apm_map_new();
    if (!map)
        return -ENOMEM;
    bool shared_file = file && request->sharing == APM_SHARED;
    int protection = system_protection(request->protection), fd = file ? apm_file_fd(file) : -1;
    void *memory = MAP_FAILED;
    bool map_sync = false;
    if (shared_file) { /* MAP_SYNC is granted only where stores reach the medium without the kernel: real DAX */
        memory = apm_sys_mmap(APM_CALL_MMAP_SYNC, NULL, rounded, protection, MAP_SHARED_VALIDATE | MAP_SYNC, fd,
                              request->offset);
        map_sync = memory != MAP_FAILED;
    }
    uint32_t granted = shared_file ? apm_granted_granularity(map_sync) : APM_BYTE;
    bool forced = false;
    uint32_t granularity = shared_file ? apm_map_force(granted, &forced) : APM_BYTE;
    request->granularity = granularity;
    if (granularity > request->required_granularity) {
        if (map_sync)
            munmap(memory, rounded);
        free(map);
        return APM_E_GRANULARITY_NOT_SUPPORTED;
    }
    bool cares_for_cache = shared_file && !map_sync && granularity == APM_PAGE &&
                           (request->protection & APM_PROT_WRITE) && !(request->flags & APM_MAP_KEEP_CACHE);
    if (cares_for_cache)
        drop_clean_cache(file, request->offset, rounded);
    if (memory == MAP_FAILED) {
        int flags = (request->sharing == APM_SHARED ? MAP_SHARED : MAP_PRIVATE) | (file ? 0 : MAP_ANONYMOUS);
        memory = apm_sys_mmap(APM_CALL_MMAP, NULL, rounded, protection, flags, fd, file ? request->offset : 0);
    }
    if (memory == MAP_FAILED) {
        int error = errno;
        free(map);
        return error == EACCES || error == EPERM ? APM_E_NO_ACCESS : -error;
    }
    if (cares_for_cache) { /* before the first fault: no read-ahead, so no large folios */
        int result;
        APM_OUTSIDE(result, APM_CALL_MADVISE, file->inode, request->offset, rounded,
                    madvise(memory, rounded, MADV_RANDOM));
        (void)result;
    }
    map->pub = (struct apm_map){.address = (uintptr_t)memory, .length = request->length, .offset = request->offset,
                                .file = file, .granularity = granularity,
                                .durability = apm_map_durability(file, request->sharing, forced),
                                .sharing = request->sharing, .protection = request->protection,
                                .forced = forced, .map_sync = map_sync};
    apm_map_decide_copies(&map->pub);
    map->mapped_length = rounded;
    if (file)
        apm_file_hold_for_map(file);
    request->map = &map->pub;
    return 0;
}

int apm_overlap_run(const struct apm_map *map, struct apm_overlap_request *request) {
    uint64_t from, to = map->address + request->offset;
    bool scattered;
    request->overlaps = request->data < to + request->size && to < request->data + request->size;
    if (!request->overlaps && map->file)
        request->overlaps = apm_vma_overlaps(map->file, request->data, request->size, map->offset + request->offset, &from,
                                             &scattered) != 0;
    return 0;
}

int apm_map_source(const struct apm_job *job, const void **source, void **copy) {
    const struct apm_map *map = job->map;
    uint64_t from;
    bool scattered;
    *source = (const void *)(uintptr_t)job->data;
    *copy = NULL;
    if ((job->flags & APM_F_SOURCE_OWNED) || !map->file || map->sharing == APM_PRIVATE)
        return 0;
    int result = apm_vma_overlaps(map->file, job->data, job->size, map->offset + job->offset, &from, &scattered);
    bool same_mapping = job->data + job->size > map->address && job->data < map->address + map->length;
    if (result == -EFAULT || result == 0 || (result == 1 && same_mapping && !scattered))
        return result == -EFAULT ? result : 0; /* within one mapping the addresses show the overlap */
    *copy = apm_allocate(job->size);
    if (!*copy)
        return -ENOMEM;
    *source = memcpy(*copy, *source, job->size);
    return 0;
}

void apm_map_unmap(struct apm_map_full *map) {
    if (map->mapped_length) {
        int result;
        APM_OUTSIDE(result, APM_CALL_MUNMAP, map->pub.file ? map->pub.file->inode : 0, map->pub.address,
                    map->mapped_length, munmap((void *)(uintptr_t)map->pub.address, map->mapped_length));
        (void)result; /* only a bad argument can fail */
    }
    apm_file_drop_for_map(map->pub.file); /* whoever waits for the unmapping finds the descriptor closed as well */
}

void apm_map_drop(struct apm_map_full *map) {
    if (__atomic_sub_fetch(&map->references, 1, __ATOMIC_ACQ_REL) == 0)
        free(map);
}

void apm_map_release(struct apm_map *map) {
    if (map && !apm_is_forked())
        apm_map_drop((struct apm_map_full *)map);
}

/* ---- inline work: no system call, so no pool ---------------------------------------------------------- */

static int check_inline(const struct apm_map *map, uint64_t offset, uint64_t size) {
    if (APM_UNLIKELY(apm_is_forked()))
        return APM_E_FORKED;
    if (map->granularity == APM_PAGE)
        return APM_E_NOSUPP;
    if (map->file && APM_UNLIKELY(apm_file_failure(map->file)))
        return APM_E_FILE_FAILED;
    if (offset > map->length || size > map->length - offset)
        return APM_E_LENGTH_OUT_OF_RANGE;
    return 0;
}

int apm_map_persist(struct apm_map *map, uint64_t offset, uint64_t size) {
    int result = check_inline(map, offset, size);
    if (result == 0 && size) {
        if (map->granularity == APM_CACHE_LINE)
            apm_flush((const void *)(uintptr_t)(map->address + offset), size);
        apm_fence(); /* law 1: on the thread that flushed, before this call returns */
    }
    return result;
}

int apm_map_copy(struct apm_map *map, uint64_t offset, const void *from, uint64_t size, uint32_t flags) {
    int result = check_inline(map, offset, size);
    if (result == 0 && size) {
        apm_copy((void *)(uintptr_t)(map->address + offset), from, size, flags & ~(uint32_t)APM_F_NODRAIN,
                 map->granularity == APM_CACHE_LINE); /* NODRAIN is fenced all the same (law 1) */
    }
    return result;
}

int apm_map_fill(struct apm_map *map, uint64_t offset, int value, uint64_t size, uint32_t flags) {
    int result = check_inline(map, offset, size);
    if (result == 0 && size)
        apm_fill((void *)(uintptr_t)(map->address + offset), value, size, flags & ~(uint32_t)APM_F_NODRAIN,
                 map->granularity == APM_CACHE_LINE);
    return result;
}
