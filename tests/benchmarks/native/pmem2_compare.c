/* pmem2_compare.c - our flush, copy and fill against libpmem2's, in one run, call for call.
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -Werror -I../../../apmem2/native -o pmem2_compare pmem2_compare.c \
 *      ../../../apmem2/native/apm_{cpu,flush,copy,copy_generic,copy_x86}.c -lpmem2 -lpthread -lm
 *   ./pmem2_compare [--quick] [--sizes N,N,...] [--op NAME] [directory, default /dev/shm] [runs, default 9]
 *
 * One line per cell: op flag size ours_ns theirs_ns ratio (theirs / ours: above 1 we are faster), medians of the
 * runs, in which both take turns. Then the worst cell and geometric means. Calls walk through one half of a mapping,
 * the other side through the other, and the halves change hands: where the pages lie makes 10 % at some sizes. Before
 * each timed pass goes one over the same bytes, so that each side meets the lines as it leaves them.
 *
 * libpmem2 takes a non-temporal store and a fence for durable on every processor. Where we do not (apm_cpu.c) the
 * cells in which it streams compare a durable copy with one that may not be; they are marked * and have means of their
 * own. APM_STREAMS_EVICT=1 makes the same assumption for us and compares like with like.
 */
#include "apm_line.h"

#include <fcntl.h>
#include <libpmem2.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Linked without apm_observe.c, nobody records. */
__attribute__((weak)) int apm_observing;
__attribute__((weak)) void apm_observe_note(uint32_t call, uint64_t object, uint64_t offset, uint64_t size) {
    (void)call, (void)object, (void)offset, (void)size;
}

enum { RUNS_MAX = 101, MIB = 1 << 20, HALF = 32 * MIB };

static pmem2_flush_fn their_flush;
static pmem2_persist_fn their_persist;
static pmem2_memcpy_fn their_copy;
static pmem2_memset_fn their_fill;

/* Through pointers, as theirs: neither side is inlined into the loop. */
static void (*volatile our_flush)(const void *, size_t) = apm_flush;
static void (*volatile our_fence)(void) = apm_fence;
static void (*volatile our_copy)(void *, const void *, size_t, uint32_t, int) = apm_copy;
static void (*volatile our_fill)(void *, int, size_t, uint32_t, int) = apm_fill;

enum op { FLUSH, PERSIST, MEMCPY, MEMSET, OPS };
static const char *const op_names[] = {"flush", "persist", "memcpy", "memset"};

static const struct {
    const char *name;
    uint32_t flags;
} flag_sets[] = {
    {"0", 0},
    {"NODRAIN", APM_F_NODRAIN},
    {"NONTEMPORAL", APM_F_NONTEMPORAL},
    {"NONTEMPORAL|NODRAIN", APM_F_NONTEMPORAL | APM_F_NODRAIN},
    {"TEMPORAL", APM_F_TEMPORAL},
    {"TEMPORAL|NODRAIN", APM_F_TEMPORAL | APM_F_NODRAIN},
    {"WC", APM_F_WC},
    {"WB", APM_F_WB},
    {"NOFLUSH", APM_F_NOFLUSH},
};
#define FLAG_SETS (sizeof flag_sets / sizeof *flag_sets)

static const size_t all_sizes[] = {
    8,    16,   24,   32,    64,    100,   128,    200,    256,    512,     1024,    2048,
    4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304,
};
static const size_t quick_sizes[] = {8, 24, 64, 100, 256, 1024, 4096, 65536, 1048576};

static char *half[2], *source;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* What a flush is for: each line was stored into. */
static inline void dirty(char *at, size_t size) {
    for (size_t i = 0; i < size; i += 64) *(volatile char *)(at + i) = 1;
}

struct walk {
    size_t at, step, end;
};

static inline char *next(struct walk *walk, char *base) {
    char *at = base + walk->at;
    walk->at += walk->step;
    if (walk->at >= walk->end) walk->at = 0;
    return at;
}

/* ns of one call */
static double measure(int ours, char *base, enum op op, uint32_t flags, size_t size, size_t calls,
                      struct walk *walk) {
    walk->at = 0;
    double begun = seconds();
    switch (op) {
    case FLUSH:
        for (size_t i = 0; i < calls; i++) {
            char *at = next(walk, base);
            dirty(at, size);
            if (ours) our_flush(at, size);
            else their_flush(at, size);
        }
        break;
    case PERSIST:
        for (size_t i = 0; i < calls; i++) {
            char *at = next(walk, base);
            dirty(at, size);
            if (ours) our_flush(at, size), our_fence();
            else their_persist(at, size);
        }
        break;
    case MEMCPY:
        if (ours)
            for (size_t i = 0; i < calls; i++) our_copy(next(walk, base), source, size, flags, 1);
        else
            for (size_t i = 0; i < calls; i++) their_copy(next(walk, base), source, size, flags);
        break;
    default:
        if (ours)
            for (size_t i = 0; i < calls; i++) our_fill(next(walk, base), (int)i, size, flags, 1);
        else
            for (size_t i = 0; i < calls; i++) their_fill(next(walk, base), (int)i, size, flags);
    }
    double ns = (seconds() - begun) * 1e9 / (double)calls;
    apm_fence(); /* what a cell left pending is not the next one's to wait for */
    return ns;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, ascending);
    return values[count / 2];
}

struct mean {
    double logarithms, least;
    int cells, below;
    char least_name[96];
};

static void mean_add(struct mean *mean, double ratio, const char *name) {
    if (mean->cells++ == 0 || ratio < mean->least) {
        mean->least = ratio;
        snprintf(mean->least_name, sizeof mean->least_name, "%s", name);
    }
    mean->logarithms += log(ratio);
    mean->below += ratio < 0.95;
}

static void mean_print(const char *name, const struct mean *mean) {
    if (mean->cells)
        printf("%s: geometric mean %.3f of %d cells, %d below 0.95, minimum %.3f (%s)\n", name,
               exp(mean->logarithms / mean->cells), mean->cells, mean->below, mean->least, mean->least_name);
}

static double one_cell(enum op op, uint32_t flags, size_t size, int runs, double batch_s, double *ours_ns,
                       double *theirs_ns) {
    double ours[RUNS_MAX], theirs[RUNS_MAX], ratios[RUNS_MAX];
    size_t step = size < 64 ? 64 : (size + 63) / 64 * 64; /* aligned to lines, as structures on media are */
    size_t region = size <= 4096 ? 256 * 1024 : 8 * MIB;
    struct walk walk = {0, step, region / step * step};
    double guess = measure(0, half[0], op, flags, size, 2, &walk);
    guess = measure(0, half[0], op, flags, size, 2, &walk);
    size_t calls = (size_t)(batch_s * 1e9 / guess) + 1;
    for (int run = 0; run < runs; run++) {
        for (int turn = 0; turn < 2; turn++) {
            int side = (run + turn) & 1;
            char *base = half[(side + run / 2) & 1];
            measure(side, base, op, flags, size, calls, &walk);
            (side ? ours : theirs)[run] = measure(side, base, op, flags, size, calls, &walk);
        }
        ratios[run] = theirs[run] / ours[run];
    }
    *ours_ns = median(ours, runs);
    *theirs_ns = median(theirs, runs);
    return median(ratios, runs);
}

/* Does libpmem2 stream in this cell? From 256 bytes without a hint. */
static int they_stream(enum op op, uint32_t flags, size_t size) {
    if (op < MEMCPY || (flags & APM_F_NOFLUSH)) return 0;
    if (flags & (APM_F_NONTEMPORAL | APM_F_WC)) return 1;
    return !(flags & (APM_F_TEMPORAL | APM_F_WB)) && size >= 256;
}

static int open_theirs(const char *directory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/pmem2_compare.XXXXXX", directory);
    int fd = mkstemp(path);
    if (fd < 0 || unlink(path) || posix_fallocate(fd, 0, 2 * HALF)) return perror(path), 1;
    struct pmem2_config *config;
    struct pmem2_source *from;
    struct pmem2_map *map;
    setenv("PMEM2_FORCE_GRANULARITY", "CACHE_LINE", 1);
    if (pmem2_config_new(&config) || pmem2_source_from_fd(&from, fd) ||
        pmem2_config_set_required_store_granularity(config, PMEM2_GRANULARITY_CACHE_LINE) ||
        pmem2_map_new(&map, config, from))
        return fprintf(stderr, "libpmem2: %s\n", pmem2_errormsg()), 1;
    their_flush = pmem2_get_flush_fn(map);
    their_persist = pmem2_get_persist_fn(map);
    their_copy = pmem2_get_memcpy_fn(map);
    their_fill = pmem2_get_memset_fn(map);
    half[0] = pmem2_map_get_address(map);
    half[1] = half[0] + HALF;
    memset(half[0], 1, 2 * HALF);
    return 0;
}

int main(int count, char **arguments) {
    const char *directory = "/dev/shm", *only_op = NULL;
    const size_t *sizes = all_sizes;
    size_t sizes_count = sizeof all_sizes / sizeof *all_sizes, chosen[64];
    int runs = 9;
    double batch_s = 0.0008;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--quick") == 0) {
            sizes = quick_sizes, sizes_count = sizeof quick_sizes / sizeof *quick_sizes, batch_s = 0.0003;
        } else if (strcmp(arguments[i], "--op") == 0 && i + 1 < count) {
            only_op = arguments[++i];
        } else if (strcmp(arguments[i], "--sizes") == 0 && i + 1 < count) {
            sizes = chosen, sizes_count = 0;
            for (char *s = strtok(arguments[++i], ","); s && sizes_count < 64; s = strtok(NULL, ","))
                chosen[sizes_count++] = strtoul(s, NULL, 0);
        } else if (arguments[i][0] >= '0' && arguments[i][0] <= '9') {
            runs = atoi(arguments[i]);
        } else {
            directory = arguments[i];
        }
    }
    if (runs < 1) runs = 1;
    if (runs > RUNS_MAX) runs = RUNS_MAX;
    if (open_theirs(directory)) return 1;
    source = aligned_alloc(4096, 4 * MIB);
    if (!source) return 1;
    memset(source, 3, 4 * MIB);
    const struct apm_cpu *cpu = apm_cpu();
    int evict = apm_traits()->streams_evict != 0;
    printf("# %s, %s, width %u, threshold %llu, streams %s; %d runs, %s\n", cpu->flush_name, cpu->copy_name,
           cpu->copy_width, (unsigned long long)cpu->movnt_threshold,
           evict ? "are durable" : "are not trusted (*: where libpmem2 does)", runs, directory);

    struct mean all = {0}, same = {0}, streamed = {0}, small = {0}, small_same = {0};
    struct mean by_op[OPS] = {0}, small_by_op[OPS] = {0};
    for (int op = 0; op < OPS; op++) {
        if (only_op && strcmp(only_op, op_names[op]) != 0) continue;
        for (size_t f = 0; f < (op < MEMCPY ? 1 : FLAG_SETS); f++)
            for (size_t s = 0; s < sizes_count; s++) {
                uint32_t flags = flag_sets[f].flags;
                double ours, theirs;
                double ratio = one_cell((enum op)op, flags, sizes[s], runs, batch_s, &ours, &theirs);
                int past_cache = evict || (cpu->has_movdir64b && sizes[s] % 64 == 0); /* only whole lines */
                int unlike = !past_cache && they_stream((enum op)op, flags, sizes[s]);
                char name[96];
                snprintf(name, sizeof name, "%s %s %zu", op_names[op], op < MEMCPY ? "-" : flag_sets[f].name, sizes[s]);
                printf("%s %.1f %.1f %.3f%s\n", name, ours, theirs, ratio, unlike ? " *" : "");
                fflush(stdout);
                mean_add(&all, ratio, name);
                mean_add(&by_op[op], ratio, name);
                mean_add(unlike ? &streamed : &same, ratio, name);
                if (sizes[s] > 256) continue;
                mean_add(&small, ratio, name);
                mean_add(&small_by_op[op], ratio, name);
                if (!unlike) mean_add(&small_same, ratio, name);
            }
    }
    for (int op = 0; op < OPS; op++) {
        mean_print(op_names[op], &by_op[op]);
        char name[64];
        snprintf(name, sizeof name, "%s, 8-256 B", op_names[op]);
        mean_print(name, &small_by_op[op]);
    }
    mean_print("cells marked *", &streamed);
    mean_print("cells not marked", &same);
    mean_print("cells not marked, 8-256 B", &small_same);
    mean_print("all, 8-256 B", &small);
    mean_print("all", &all);
    return 0;
}
