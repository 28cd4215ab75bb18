/* limits.c - what does this disk, below this file system, allow at all? Bare loops, nothing around them.
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -Werror -o limits limits.c
 *   ./limits FILE BYTES PREPARATION OPERATION
 *
 * PREPARATION  keep: the page cache as it is, plain mapping.
 *              drop: cached pages dropped, MADV_RANDOM, read in again by pieces: 4 KiB folios, warm.
 * OPERATION    dsync          one page at a random place by pwritev2(RWF_DSYNC)
 *              msync          store into a random page, msync of that page
 *              round:K        K random pages: store into all, then msync of each; one operation is all K
 *              adjacent:K     K adjacent pages at a random place: store into all, one msync; likewise
 *              once:K         K random pages: store into all, start their writing, wait for each, then one msync of the
 *                             last: the same promise with one flush of the device
 *              scan           one byte of each page, in order, cold; one operation is the whole file (PREPARATION is keep)
 *
 * Reads "COUNT SEED" lines, and answers each with one line of JSON: {"count", "mean_ns", "p50_ns", "p99_ns", "ns": [...]}.
 * A measurement of ours can so take turns with it, in small pieces. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum { PAGE = 4096, PIECE = 2 << 20 };

static int fd;
static uint64_t size, pages, random_state;
static char *memory;
static volatile char sink;

static void fail(const char *what) {
    fprintf(stderr, "limits: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t random_number(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void map_file(void) {
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
}

static void drop_cache(void) {
    if (fsync(fd) < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))
        fail("dropping the cache");
}

static void read_in(void) {
    if (madvise(memory, size, MADV_RANDOM) < 0)
        fail("madvise");
    for (uint64_t at = 0; at < size; at += PIECE) {
        uint64_t piece = size - at < PIECE ? size - at : PIECE;
        posix_fadvise(fd, (off_t)at, (off_t)piece, POSIX_FADV_WILLNEED);
        if (madvise(memory + at, piece, MADV_POPULATE_READ) < 0)
            for (uint64_t page = at; page < at + piece; page += PAGE)
                sink = memory[page];
    }
}

static void store(uint64_t page) { memset(memory + page * PAGE, (int)random_number(), PAGE); }

static void sync_pages(uint64_t page, uint64_t count) {
    if (msync(memory + page * PAGE, count * PAGE, MS_SYNC) < 0)
        fail("msync");
}

static void one_dsync(uint64_t unused) {
    static char data[PAGE];
    struct iovec piece = {data, PAGE};
    (void)unused;
    memset(data, (int)random_number(), PAGE);
    if (pwritev2(fd, &piece, 1, (off_t)(random_number() % pages * PAGE), RWF_DSYNC) != PAGE)
        fail("pwritev2");
}

static void one_msync(uint64_t unused) {
    uint64_t page = random_number() % pages;
    (void)unused;
    store(page);
    sync_pages(page, 1);
}

static uint64_t chosen[65536];

static void choose(uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        chosen[i] = random_number() % pages;
}

static void one_round(uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        store(chosen[i]);
    for (uint64_t i = 0; i < count; i++)
        sync_pages(chosen[i], 1);
}

static void one_adjacent(uint64_t count) {
    uint64_t first = chosen[0] % (pages - count + 1);
    for (uint64_t i = 0; i < count; i++)
        store(first + i);
    sync_pages(first, count);
}

/* The first pass skips pages that are under way with older bytes; the second waits, writes what is left, waits. */
static void one_flush(uint64_t count) {
    const unsigned ALL = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    for (uint64_t i = 0; i < count; i++)
        store(chosen[i]);
    for (int wait = 0; wait < 2; wait++)
        for (uint64_t i = 0; i < count; i++)
            if (sync_file_range(fd, (off_t)(chosen[i] * PAGE), PAGE, wait ? ALL : SYNC_FILE_RANGE_WRITE) < 0)
                fail("sync_file_range");
    sync_pages(chosen[count - 1], 1);
}

static void one_scan(uint64_t unused) {
    (void)unused;
    for (uint64_t at = 0; at < size; at += PAGE)
        sink = memory[at];
}

static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void answer(const uint64_t *took, uint64_t count) {
    uint64_t *sorted = malloc(count * sizeof *sorted), total = 0;
    if (!sorted)
        fail("malloc");
    memcpy(sorted, took, count * sizeof *sorted);
    qsort(sorted, count, sizeof *sorted, ascending);
    for (uint64_t i = 0; i < count; i++)
        total += took[i];
    printf("{\"count\": %llu, \"mean_ns\": %llu, \"p50_ns\": %llu, \"p99_ns\": %llu, \"ns\": [", (unsigned long long)count,
           (unsigned long long)(total / count), (unsigned long long)sorted[count / 2],
           (unsigned long long)sorted[(count * 99 + 99) / 100 - 1]);
    for (uint64_t i = 0; i < count; i++)
        printf("%s%llu", i ? "," : "", (unsigned long long)took[i]);
    printf("]}\n");
    fflush(stdout);
    free(sorted);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(uint64_t);
    } operations[] = {{"dsync", one_dsync},       {"msync", one_msync}, {"round", one_round},
                      {"adjacent", one_adjacent}, {"once", one_flush},  {"scan", one_scan}};
    void (*run)(uint64_t) = NULL;
    uint64_t width = 1;
    if (argc != 5) {
        fprintf(stderr, "usage: %s FILE BYTES keep|drop OPERATION[:K]\n", argv[0]);
        return 2;
    }
    char *colon = strchr(argv[4], ':');
    if (colon) {
        *colon = 0;
        width = strtoull(colon + 1, NULL, 10);
    }
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        if (strcmp(argv[4], operations[i].name) == 0)
            run = operations[i].run;
    size = strtoull(argv[2], NULL, 10);
    pages = size / PAGE;
    if (!run || width == 0 || width > sizeof chosen / sizeof *chosen || width > pages)
        return fprintf(stderr, "limits: no such operation, or too many pages\n"), 2;
    fd = open(argv[1], O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(argv[1]);
    if (strcmp(argv[3], "drop") == 0)
        drop_cache();
    if (run != one_dsync && run != one_scan)
        map_file();
    if (strcmp(argv[3], "drop") == 0 && memory)
        read_in();

    char line[128];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long count, seed;
        if (sscanf(line, "%llu %llu", &count, &seed) != 2 || count == 0)
            return fprintf(stderr, "limits: not understood: %s", line), 2;
        uint64_t *took = malloc(count * sizeof *took);
        if (!took)
            fail("malloc");
        random_state = seed;
        for (uint64_t i = 0; i < count; i++) {
            choose(width);
            if (run == one_scan) {
                drop_cache();
                map_file();
            }
            uint64_t began = now_ns();
            run(width);
            took[i] = now_ns() - began;
            if (run == one_scan)
                munmap(memory, size);
        }
        answer(took, count);
        free(took);
    }
    return 0;
}
