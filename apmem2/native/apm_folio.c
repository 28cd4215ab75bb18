/* apm_folio.c - in which pieces does the page cache hold a file, and how do they come to be, and stay, single pages?
 *
 * The cache holds a file in folios of one page up to 2 MiB, and a store through a mapping makes the whole folio dirty: a
 * one-page persist then writes all of it. Reading large folios is fast, above all where the device takes few scattered
 * pieces of memory in one request; writing wants single pages. So what is read in here is read as large folios and split
 * in memory, where nothing is read or written for it: MADV_COLD on a part of a folio splits it (linux, mm/madvise.c). That
 * is a side effect, which no manual promises. It is therefore looked at: a folio of a file that is split leaves the page
 * tables, which /proc/self/pagemap shows to everybody. Where it is not seen to work, single pages are read ahead.
 *
 * Splitting drops nothing: the bytes, dirty or not, stay in the cache. A dirty folio is mostly not split. */
#include "apm_internal.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define BLOCK ((uint64_t)2 << 20)       /* the largest folio, and the unit of everything here */
#define AHEAD (4 * BLOCK)               /* how far the device is asked ahead of the faults */
#define WILLNEED_PIECE ((uint64_t)128 << 10) /* a longer request may be cut short without a word: to read_ahead_kb */
enum { PAGES_MAX = 512 };               /* of a block; with larger pages there are fewer */

/* file->large_reads, one word for a file's life: nobody minds if two threads find the same out. */
enum { NOT_TRIED = 0, LARGE_READS_WORK = 1, LARGE_READS_DO_NOT = 2 };

static int advise(uint64_t at, uint64_t size, int advice) {
    int result;
    APM_OUTSIDE(result, APM_CALL_MADVISE, 0, at, size, madvise((void *)(uintptr_t)at, size, advice));
    return result;
}

static bool refused(int error) {
    return error == EINVAL || error == ENOSYS || error == EPERM || error == EOPNOTSUPP;
}

/* A mapping of ours beside the map, of a part of its file, and the kernel's view of what is in the page tables. */
struct window {
    uint64_t address, offset, length; /* offset in the file, of address */
    int pagemap;                      /* -1: cannot be read */
};

static void close_window(struct window *window) {
    if (window->length)
        munmap((void *)(uintptr_t)window->address, window->length);
    if (window->pagemap >= 0)
        close(window->pagemap);
}

static void open_pagemap(struct window *window) {
    APM_OUTSIDE(window->pagemap, APM_CALL_OPEN, 0, 0, 0, open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

/* Random advice keeps the kernel from reading on by itself, beyond what is asked for. */
static bool open_window(struct window *window, const struct apm_file *file, uint64_t offset, uint64_t length) {
    void *memory = apm_sys_mmap(APM_CALL_MMAP, NULL, length, PROT_READ, MAP_SHARED, apm_file_fd(file), offset);
    if (memory == MAP_FAILED)
        return false;
    *window = (struct window){(uintptr_t)memory, offset, length, window->pagemap};
    return advise(window->address, length, MADV_RANDOM) == 0;
}

/* Which of the pages from address on are in the page tables? Their number, or -1 when it cannot be known. */
static int pages_present(const struct window *window, uint64_t address, uint64_t size, bool *present) {
    const uint64_t page = apm_page_size();
    uint64_t entries[PAGES_MAX];
    size_t count = size / page;
    int found = 0;
    if (window->pagemap < 0 || count > PAGES_MAX ||
        pread(window->pagemap, entries, count * sizeof *entries, (off_t)(address / page * sizeof *entries)) !=
            (ssize_t)(count * sizeof *entries))
        return -1;
    for (size_t i = 0; i < count; i++) {
        present[i] = entries[i] >> 63;
        found += present[i];
    }
    return found;
}

/* Splits the large folios among the pages of one block, as far as they are in the page tables: every second page is asked
 * for, which is a part of whatever it lies in. Pages of a folio that was split leave the tables, so the next one of them
 * costs a call and does nothing. Returns how many pages left, or -1 when it cannot be known; -errno - 1 when refused. */
static int split_block(const struct window *window, uint64_t address, uint64_t size) {
    const uint64_t page = apm_page_size();
    bool before[PAGES_MAX], after[PAGES_MAX];
    int found = pages_present(window, address, size, before);
    for (uint64_t at = 0; found != 0 && at < size; at += 2 * page) {
        if (found > 0 && !before[at / page])
            continue;
        if (advise(address + at, page, MADV_COLD) < 0)
            return -errno - 1;
        if (at == 0 && pages_present(window, address, size, after) == 0)
            return found; /* it was one folio */
    }
    if (found <= 0)
        return found;
    int left = pages_present(window, address, size, after);
    return left < 0 || left > found ? -1 : found - left;
}

/* ---- reading in ------------------------------------------------------------------------------------------------------ */

static void read_ahead(const struct apm_map *map, uint64_t offset, uint64_t size) {
    int result;
    for (uint64_t at = 0; at < size; at += WILLNEED_PIECE) {
        uint64_t piece = size - at < WILLNEED_PIECE ? size - at : WILLNEED_PIECE;
        APM_OUTSIDE(result, APM_CALL_FADVISE, map->file->inode, offset + at, piece,
                    posix_fadvise(apm_file_fd(map->file), (off_t)(offset + at), (off_t)piece, POSIX_FADV_WILLNEED));
    }
    (void)result; /* advice: the faults read what it did not */
}

/* How much of the block does the cache hold? 0 nothing, 1 all, -1 some, or not to be known. Only a file that we may write
 * tells; others are said to be there. */
static int block_cached(uint64_t address, uint64_t size) {
    unsigned char resident[PAGES_MAX];
    size_t count = size / apm_page_size(), found = 0;
    int result;
    APM_OUTSIDE(result, APM_CALL_MINCORE, 0, address, size, mincore((void *)(uintptr_t)address, size, resident));
    if (result < 0 || count > PAGES_MAX)
        return -1;
    for (size_t i = 0; i < count; i++)
        found += resident[i] & 1;
    return found == 0 ? 0 : found == count ? 1 : -1;
}

static uint32_t large_reads(const struct apm_map *map) {
    return __atomic_load_n(&((struct apm_file_full *)map->file)->large_reads, __ATOMIC_RELAXED);
}

static void set_large_reads(const struct apm_map *map, uint32_t word) {
    __atomic_store_n(&((struct apm_file_full *)map->file)->large_reads, word, __ATOMIC_RELAXED);
}

/* Reads one block, of which the cache holds nothing, as large folios and splits them. When that is not seen to work the
 * first time, what was read is dropped again, and this file is read in single pages from then on. (A store in between
 * makes the folio dirty, and it stays large until somebody splits it.) */
static void read_block_large(const struct apm_map *map, const struct window *window, uint64_t offset) {
    const uint64_t page = apm_page_size(), at = window->address + (offset - window->offset);
    bool there = advise(at, page, MADV_POPULATE_READ) == 0 && block_cached(at, BLOCK) == 1 &&
                 advise(at, BLOCK, MADV_POPULATE_READ) == 0;
    int pages = there ? split_block(window, at, BLOCK) : 0;
    if (pages > 0) {
        set_large_reads(map, LARGE_READS_WORK);
    } else if (pages < 0 || large_reads(map) != LARGE_READS_WORK) { /* else: no memory for a large folio this time */
        int result;
        set_large_reads(map, LARGE_READS_DO_NOT);
        (void)advise(at, BLOCK, MADV_DONTNEED); /* of our own window */
        APM_OUTSIDE(result, APM_CALL_FADVISE, map->file->inode, offset, BLOCK,
                    posix_fadvise(apm_file_fd(map->file), (off_t)offset, (off_t)BLOCK, POSIX_FADV_DONTNEED));
        (void)result;
        read_ahead(map, offset, BLOCK);
    }
}

/* A window for reading large, over the whole blocks of [begin, end) in the file; false: read in single pages. */
static bool open_large_window(const struct apm_map *map, uint64_t begin, uint64_t end, struct window *window) {
    uint64_t first = (begin + BLOCK - 1) & ~(BLOCK - 1), last = end & ~(BLOCK - 1);
    if (first >= last || !map->file->writable || map->granularity != APM_PAGE || large_reads(map) == LARGE_READS_DO_NOT)
        return false;
    open_pagemap(window);
    return window->pagemap >= 0 && open_window(window, map->file, first, last - first) &&
           advise(window->address, window->length, MADV_HUGEPAGE) == 0;
}

static uint64_t next_block(uint64_t at, uint64_t end) {
    uint64_t next = (at & ~(BLOCK - 1)) + BLOCK;
    return next < end ? next : end;
}

static bool is_mine(uint64_t at, uint32_t flags) { return !flags || (flags & (at / BLOCK % 2 ? 2 : 1)); }

static int fault_in(const struct apm_map *map, uint64_t address, uint64_t size, uint64_t end_in_map) {
    int result = advise(address, size, MADV_POPULATE_READ);
    if (result < 0 && refused(errno)) {
        /* before 5.14: only read ahead, which is advice, and no error when it is not taken */
        (void)advise(address, size, MADV_WILLNEED);
        return 0;
    }
    if (result < 0 && errno == EFAULT) { /* SIGBUS to whoever touches it: no such page, or the device cannot read it */
        if (map->file && apm_file_holds(map->file, map->offset, end_in_map) == APM_E_MAP_RANGE)
            return APM_E_FILE_SHRANK;
        return -EIO;
    }
    if (result < 0)
        return errno == ENOMEM ? APM_E_NOT_MAPPED : -errno;
    return 0;
}

int apm_populate_run(const struct apm_map *map, uint64_t offset, uint64_t size, uint32_t flags) {
    _Static_assert(APM_POPULATE_EVEN == 1 && APM_POPULATE_ODD == 2, "is_mine");
    const uint64_t page = apm_page_size();
    /* In the file, or, without one, in memory; base is added to get an address. */
    bool by_file = map->file && map->file->fd >= 0;
    uint64_t base = by_file ? map->address - map->offset : 0, start = map->address + offset - base;
    uint64_t begin = start & ~(page - 1), end = (start + size + page - 1) & ~(page - 1), advised = begin;
    struct window window = {.pagemap = -1};
    bool large = by_file && open_large_window(map, begin, end, &window);
    int result = 0;
    for (uint64_t at = begin, next; result == 0 && at < end; at = next) {
        next = next_block(at, end);
        if (!is_mine(at, flags))
            continue;
        bool by_large = large && large_reads(map) != LARGE_READS_DO_NOT, whole = by_large && next - at == BLOCK;
        int cached = whole ? block_cached(base + at, BLOCK) : -1;
        if (whole && cached == 0) {
            read_block_large(map, &window, at);
        } else if (by_file && cached != 1) {
            uint64_t until = by_large ? next : at + AHEAD; /* what will be read large must not be there in single pages */
            for (advised = advised < at ? at : advised; advised < until && advised < end;
                 advised = next_block(advised, end))
                if (is_mine(advised, flags))
                    read_ahead(map, advised, next_block(advised, end) - advised);
        }
        result = fault_in(map, base + at, next - at, offset + size);
    }
    close_window(&window);
    return result;
}

/* ---- the cure, and the measure ------------------------------------------------------------------------------------------ */

/* Runs of pages that the cache holds are brought into the window's page tables, so that their folios can be split there. */
static void touch_cached(uint64_t address, uint64_t size) {
    const uint64_t page = apm_page_size();
    unsigned char resident[PAGES_MAX];
    int result;
    size_t count = size / page;
    APM_OUTSIDE(result, APM_CALL_MINCORE, 0, address, size, mincore((void *)(uintptr_t)address, size, resident));
    for (size_t i = 0, next; result == 0 && i < count; i = next) {
        for (next = i + 1; next < count && (resident[next] & 1) == (resident[i] & 1); next++)
            ;
        if (resident[i] & 1)
            (void)advise(address + i * page, (next - i) * page, MADV_POPULATE_READ);
    }
}

static void count(struct apm_split_request *request, int pages) {
    if (pages > 0)
        request->bytes += (uint64_t)pages * apm_page_size();
}

/* First in a window of ours, where all that is cached can be looked at; then in the map's own page tables, because kernels
 * before 6.15 split only what is mapped once. Nothing of the map is changed but, when asked for, its advice. */
int apm_split_run(const struct apm_map *map, uint64_t offset, uint64_t size, struct apm_split_request *request) {
    const uint64_t page = apm_page_size();
    request->bytes = 0;
    if (!map->file || map->sharing != APM_SHARED || map->granularity != APM_PAGE)
        return 0;
    uint64_t base = map->address - map->offset, start = map->offset + offset;
    uint64_t begin = start & ~(page - 1), end = (start + size + page - 1) & ~(page - 1);
    struct window window = {.pagemap = -1};
    int result = 0;
    if ((request->flags & APM_SPLIT_RANDOM) && advise(base + begin, end - begin, MADV_RANDOM) < 0 && !refused(errno))
        return errno == ENOMEM ? APM_E_NOT_MAPPED : -errno;
    open_pagemap(&window);
    bool mapped = map->file->writable && open_window(&window, map->file, begin, end - begin);
    for (uint64_t at = begin, next; at < end; at = next) {
        next = next_block(at, end);
        if (mapped) {
            uint64_t here = window.address + (at - begin);
            touch_cached(here, next - at);
            count(request, split_block(&window, here, next - at));
            (void)advise(here, next - at, MADV_DONTNEED); /* of the window: what stays mapped here is mapped twice */
        }
        int pages = split_block(&window, base + at, next - at);
        count(request, pages);
        if (pages < -1 && !refused(-pages - 1)) { /* refused: before 5.4, or locked in memory */
            result = pages == -ENOMEM - 1 ? APM_E_NOT_MAPPED : pages + 1;
            break;
        }
    }
    close_window(&window);
    return result;
}

/* The kernel charges a thread for what it makes dirty, in blocks of 512 bytes, when a clean folio becomes dirty
 * (ru_oublock): so the thread that makes one page writable, as a store would, learns how large its folio is. The bytes are
 * not changed, and there is no SIGBUS. */
static int dirty_page(uint64_t address, uint64_t *bytes) {
    struct rusage before, after;
    if (getrusage(RUSAGE_THREAD, &before) < 0)
        return -errno;
    if (advise(address, apm_page_size(), MADV_POPULATE_WRITE) < 0)
        return -errno;
    if (getrusage(RUSAGE_THREAD, &after) < 0)
        return -errno;
    *bytes = (uint64_t)(after.ru_oublock - before.ru_oublock) * 512;
    return 0;
}

int apm_measure_run(const struct apm_map *map, uint64_t offset, uint64_t size, struct apm_measure_request *request) {
    const uint64_t page = apm_page_size(), mask = page - 1;
    uint64_t begin = (map->address + offset) & ~mask, end = (map->address + offset + size + mask) & ~mask;
    uint64_t pages = (end - begin) / page, samples = request->samples < pages ? request->samples : pages;
    request->bytes = request->measured = 0;
    if (!map->file || map->sharing != APM_SHARED || map->granularity != APM_PAGE)
        return 0;
    for (uint64_t i = 0; i < samples; i++) {
        uint64_t bytes = 0;
        int result = dirty_page(begin + pages * i / samples * page, &bytes);
        if (result < 0 && refused(-result))
            return 0; /* before 5.14: not known */
        if (result == -EFAULT)
            return apm_file_holds(map->file, map->offset, offset + size) == APM_E_MAP_RANGE ? APM_E_FILE_SHRANK : -EIO;
        if (result < 0)
            return result == -ENOMEM ? APM_E_NOT_MAPPED : result;
        request->bytes += bytes;
        request->measured += bytes != 0;
    }
    return 0;
}
