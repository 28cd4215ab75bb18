/* test_copy.c - flush, copy and fill: the bytes, and what makes them durable.
 *
 * cc -std=gnu11 -O2 -Wall -Wextra -Werror -I.. -o test_copy test_copy.c -lpthread && ./test_copy
 *
 * True here, for every instruction set that the environment can choose (a child process each):
 *   - the content is what a byte-wise model says, and nothing beside it changes, for every flag, granularity,
 *     size around a boundary, alignment, and overlap either way;
 *   - when a line is flushed, its bytes have been stored; every byte was flushed or put past
 *     the cache; no line is flushed twice; the fence comes last; NOFLUSH does nothing of it;
 *   - the observer is told of stores, flushes that cover the range, and then of the fence.
 * The sources are included, not linked: only so does each word of theirs (flush, stream, fence) report to the trace.
 * The observer is a stub of this file.
 */
#define APM_LINE_TRACE
#include "../apm_cpu.c"
#include "../apm_flush.c"
#include "../apm_copy.c"
#include "../apm_copy_generic.c"
#include "../apm_copy_x86.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LINE_MIN = 64, ROOM = 6 * 16384 };

static uint64_t *checks; /* shared with the children */
static const char *setting = "";

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        ++*checks;                                                                                  \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "%s:%d: [%s] %s\n", __FILE__, __LINE__, setting, #condition);           \
            fprintf(stderr, "  flags %u flush %d size %zu to %zu from %zu\n", now.flags, now.flush, \
                    now.size, now.to, now.from);                                                    \
            _exit(1);                                                                               \
        }                                                                                           \
    } while (0)

static struct {
    uint32_t flags;
    int flush, tracing;
    size_t size, to, from;
} now;

static unsigned char memory[ROOM] __attribute__((aligned(4096)));
static unsigned char model[ROOM];

/* ---- what the copies do, word by word ---------------------------------------------------------------------- */

static unsigned flushed[ROOM / LINE_MIN + 1], streamed[ROOM];
static unsigned fences, after_fence, flushes, streams;

void apm_line_trace(char word, const void *at, size_t size) {
    if (!now.tracing) return;
    if (fences) after_fence++;
    if (word == 'F') {
        fences++;
        return;
    }
    size_t offset = (size_t)((const unsigned char *)at - memory);
    if (word != 'L') {
        streams++;
        for (size_t i = 0; i < size; i++) streamed[offset + i] = word == 'D' ? 2 : 1;
        return;
    }
    flushes++;
    /* It may be any byte of the line. Stores come before: what lies in the range has its last value. */
    size_t begin = offset / LINE_MIN * LINE_MIN, end = begin + LINE_MIN;
    flushed[begin / LINE_MIN]++;
    if (begin < now.to) begin = now.to;
    if (end > now.to + now.size) end = now.to + now.size;
    CHECK(begin < end);
    CHECK(memcmp(memory + begin, model + begin, end - begin) == 0);
}

static void trace_check(void) {
    int needed = now.flush && !(now.flags & APM_F_NOFLUSH);
    CHECK(fences == !(now.flags & (APM_F_NODRAIN | APM_F_NOFLUSH)));
    CHECK(after_fence == 0);
    if (!needed) CHECK(flushes == 0);
    if (now.flags & APM_F_NOFLUSH) CHECK(streams == 0);
    if (!now.flush && !(now.flags & APM_F_NONTEMPORAL)) CHECK(streams == 0);
    if (!(now.flags & (APM_F_NONTEMPORAL | APM_F_WC)) && (now.flags & (APM_F_TEMPORAL | APM_F_WB)))
        CHECK(streams == 0);
    if (!needed || now.size == 0) return;
    for (size_t i = now.to; i < now.to + now.size; i++) {
        int past_cache = streamed[i] == 2 || (streamed[i] == 1 && apm_traits()->streams_evict);
        CHECK(flushed[i / LINE_MIN] == 1 || (flushed[i / LINE_MIN] == 0 && past_cache));
    }
}

static void trace_start(void) {
    fences = after_fence = flushes = streams = 0;
    memset(flushed, 0, sizeof flushed);
    memset(streamed, 0, sizeof streamed);
    now.tracing = 1;
}

/* ---- content ---------------------------------------------------------------------------------------------------- */

static void paint(void) {
    static uint32_t seed = 12345;
    for (size_t i = 0; i < ROOM; i += 4) {
        seed = seed * 1664525 + 1013904223;
        memcpy(memory + i, &seed, 4);
    }
    memcpy(model, memory, ROOM);
}

static void check_copy(size_t to, size_t from, size_t size, uint32_t flags, int flush) {
    now.to = to, now.from = from, now.size = size, now.flags = flags, now.flush = flush;
    if (to <= from)
        for (size_t i = 0; i < size; i++) model[to + i] = model[from + i];
    else
        for (size_t i = size; i-- > 0;) model[to + i] = model[from + i];
    trace_start();
    apm_copy(memory + to, memory + from, size, flags, flush);
    now.tracing = 0;
    trace_check();
    CHECK(memcmp(memory, model, ROOM) == 0);
}

static void check_fill(size_t to, size_t size, uint32_t flags, int flush) {
    static uint32_t value;
    value = value * 5 + 131;
    now.to = to, now.from = 0, now.size = size, now.flags = flags, now.flush = flush;
    for (size_t i = 0; i < size; i++) model[to + i] = (unsigned char)value;
    trace_start();
    apm_fill(memory + to, (int)value, size, flags, flush);
    now.tracing = 0;
    trace_check();
    CHECK(memcmp(memory, model, ROOM) == 0);
}

static const size_t sizes[] = {
    0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 56, 63, 64, 65, 72, 95, 96, 97, 100,
    127, 128, 129, 191, 192, 193, 200, 255, 256, 257, 319, 320, 321, 511, 512, 513, 1000, 1023,
    1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 4160, 8191, 8192, 8200, 12345,
};
#define SIZES (sizeof sizes / sizeof *sizes)

/* The ways that differ: hints alone, with and without the fence; then every combination at fewer places. */
static const uint32_t hints[] = {0, APM_F_NONTEMPORAL, APM_F_TEMPORAL, APM_F_NOFLUSH, APM_F_NODRAIN | APM_F_WC};

static void check_places(void) {
    static const size_t to_at[] = {0, 1, 4, 8, 15, 16, 31, 33, 48, 57, 63, 64}, from_at[] = {0, 1, 8, 31, 63};
    for (size_t s = 0; s < SIZES; s++) {
        paint();
        for (size_t h = 0; h < sizeof hints / sizeof *hints; h++)
            for (size_t t = 0; t < sizeof to_at / sizeof *to_at; t++) {
                for (size_t f = 0; f < sizeof from_at / sizeof *from_at; f++)
                    check_copy(1024 + to_at[t], 16384 + 8192 + from_at[f], sizes[s], hints[h], 1);
                check_copy(16384 + to_at[t], 64, sizes[s], hints[h], 0);
                check_fill(1024 + to_at[t], sizes[s], hints[h], (int)(t & 1));
                check_fill(16384 + to_at[t], sizes[s], hints[h], !(t & 1));
            }
    }
}

static void check_flags(void) {
    for (uint32_t flags = 0; flags < 64; flags++)
        for (size_t s = 0; s < SIZES; s += 2) {
            paint();
            for (int flush = 0; flush < 2; flush++) {
                check_copy(1024 + flags % 3 * 5, 16384, sizes[s], flags, flush);
                check_fill(1024 + flags % 5 * 8, sizes[s], flags, flush);
            }
        }
}

static void check_overlaps(void) {
    static const size_t shifts[] = {0, 1, 7, 8, 16, 31, 63, 64, 65, 128, 200, 256, 257, 1000, 4096, 5000};
    for (size_t s = 0; s < SIZES; s++) {
        paint();
        for (size_t d = 0; d < sizeof shifts / sizeof *shifts; d++)
            for (size_t h = 0; h < sizeof hints / sizeof *hints; h++)
                for (size_t align = 0; align < 64; align += 21) {
                    check_copy(8192 + align, 8192 + align + shifts[d], sizes[s], hints[h], 1);
                    check_copy(8192 + align + shifts[d], 8192 + align, sizes[s], hints[h], 1);
                }
    }
}

/* Beyond the bounds at which apm_copy_x86.c changes its ways for good. */
static void check_large(void) {
    static const size_t large[] = {16384, 16385, 16448, 20000, 32767, 32768, 32769, 33000};
    for (size_t s = 0; s < sizeof large / sizeof *large; s++) {
        paint();
        for (size_t h = 0; h < sizeof hints / sizeof *hints; h++)
            for (size_t align = 0; align < 64; align += 13) {
                check_copy(1024 + align, 50000, large[s], hints[h], 1);
                check_copy(1024 + align, 50000, large[s], hints[h], 0);
                check_copy(8192 + align, 8192 + align * 100 + 1, large[s], hints[h], 1);
                check_copy(8192 + align * 100 + 1, 8192 + align, large[s], hints[h], 1);
                check_fill(1024 + align, large[s], hints[h], 1);
                check_fill(1024 + align, large[s], hints[h], 0);
            }
    }
}

static void check_flush(void) {
    for (size_t s = 0; s < SIZES; s++)
        for (size_t at = 0; at <= 64; at += 3) {
            now.to = 4096 + at, now.size = sizes[s], now.flags = 0, now.flush = 1;
            trace_start();
            apm_flush(memory + now.to, now.size);
            now.flags = APM_F_NODRAIN;
            trace_check();
            apm_fence();
            now.tracing = 0;
            now.flags = 0;
            trace_check();
            CHECK(memcmp(memory, model, ROOM) == 0);
        }
}

/* ---- the observer ------------------------------------------------------------------------------------------------ */

int apm_observing;
static struct {
    uint32_t call;
    uint64_t offset, size;
} notes[8];
static unsigned noted;

void apm_observe_note(uint32_t call, uint64_t object, uint64_t offset, uint64_t size) {
    CHECK(object == 0);
    CHECK(noted < 8);
    notes[noted].call = call, notes[noted].offset = offset, notes[noted].size = size;
    noted++;
}

static void check_notes(void) {
    apm_observing = 1;
    for (uint32_t flags = 0; flags < 64; flags++)
        for (int flush = 0; flush < 2; flush++)
            for (int fill = 0; fill < 2; fill++) {
                uint64_t at = (uint64_t)(uintptr_t)(memory + 1000);
                now.flags = flags, now.flush = flush, now.size = 300, now.to = 1000;
                noted = 0;
                if (fill) apm_fill(memory + 1000, 1, 300, flags, flush);
                else apm_copy(memory + 1000, memory, 300, flags, flush);
                unsigned i = 0;
                CHECK(notes[i].call == APM_CALL_STORE && notes[i].offset == at && notes[i].size == 300);
                i++;
                if (flush && !(flags & APM_F_NOFLUSH)) {
                    CHECK(notes[i].call == APM_CALL_FLUSH && notes[i].offset == at && notes[i].size == 300);
                    i++;
                }
                if (!(flags & (APM_F_NOFLUSH | APM_F_NODRAIN))) {
                    CHECK(notes[i].call == APM_CALL_FENCE);
                    i++;
                }
                CHECK(noted == i);
            }
    noted = 0;
    apm_flush(memory + 7, 99);
    apm_fence();
    CHECK(noted == 2);
    CHECK(notes[0].call == APM_CALL_FLUSH && notes[0].size == 99);
    CHECK(notes[0].offset == (uint64_t)(uintptr_t)(memory + 7));
    CHECK(notes[1].call == APM_CALL_FENCE);
    apm_observing = 0;
    noted = 0;
    apm_flush(memory, 64);
    apm_fence();
    apm_copy(memory, memory + 64, 64, 0, 1);
    CHECK(noted == 0);
}

/* ---- every instruction set ------------------------------------------------------------------------------------- */

static void check_cpu(void) {
    const struct apm_cpu *cpu = apm_cpu();
    CHECK(cpu == apm_cpu());
    CHECK(cpu->line_size >= 4 && (cpu->line_size & (cpu->line_size - 1)) == 0);
    CHECK(cpu->flush_name && cpu->copy_name);
    CHECK(cpu->can_flush == (strcmp(cpu->flush_name, "none") != 0));
    if (strstr(setting, "PMEM_NO_MOVNT=1")) CHECK(strcmp(cpu->copy_name, "plain") == 0);
    if (strstr(setting, "PMEM_AVX512F=0")) CHECK(strcmp(cpu->copy_name, "avx512f") != 0);
    if (strstr(setting, "PMEM_NO_CLWB=1")) CHECK(strcmp(cpu->flush_name, "clwb") != 0);
    if (strstr(setting, "THRESHOLD=0") && cpu->copy_width) CHECK(cpu->movnt_threshold == 0);
}

static void run(const char *environment) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        setting = environment;
        char copy[256];
        snprintf(copy, sizeof copy, "%s", environment);
        for (char *pair = strtok(copy, " "); pair; pair = strtok(NULL, " ")) {
            char *equals = strchr(pair, '=');
            *equals = 0;
            setenv(pair, equals + 1, 1);
        }
        check_cpu();
        check_notes();
        paint();
        check_flush();
        check_flags();
        check_places();
        check_overlaps();
        check_large();
        _exit(0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child) exit(1);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGILL && strstr(environment, "force")) {
        printf("test_copy: no movdir64b here, that part is skipped\n");
        return;
    }
    if (status != 0) {
        fprintf(stderr, "test_copy: failed with [%s], status %x\n", environment, (unsigned)status);
        exit(1);
    }
}

int main(void) {
    checks = mmap(NULL, sizeof *checks, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (checks == MAP_FAILED) return 1;
    run("");
#if defined(__x86_64__)
    run("APM_STREAMS_EVICT=1");
    run("PMEM_MOVNT_THRESHOLD=0 APM_STREAMS_EVICT=0");
    run("PMEM_AVX512F=0 PMEM_NO_CLWB=1 APM_STREAMS_EVICT=1");
    run("PMEM_AVX512F=0 APM_STREAMS_EVICT=0");
    run("PMEM_AVX512F=0 PMEM_AVX=0 PMEM_NO_CLWB=1 PMEM_NO_CLFLUSHOPT=1");
    run("PMEM_AVX512F=0 PMEM_AVX=0 APM_STREAMS_EVICT=1 PMEM_MOVNT_THRESHOLD=0");
    run("PMEM_NO_MOVNT=1");
    run("PMEM_MOVDIR64B=force");
#endif
    printf("test_copy: %llu checks\n", (unsigned long long)*checks);
    return 0;
}
