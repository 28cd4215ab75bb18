/* apm_line.h - one cache line: how it is written back, and what the processor promises about it.
 *
 * Shared by apm_cpu.c (decides), apm_flush.c and the copies (do). The instructions are words of inline
 * assembly, so that one binary serves every processor; nobody may run one that apm_cpu.c did not choose.
 */
#ifndef APM_LINE_H
#define APM_LINE_H

#include "apm_internal.h"

enum apm_line_kind {
    APM_LINE_NONE,
    APM_LINE_CLFLUSH,
    APM_LINE_CLFLUSHOPT,
    APM_LINE_CLWB,
    APM_LINE_CVAC,
    APM_LINE_CVAP,
};
enum apm_simd { APM_SIMD_PLAIN, APM_SIMD_SSE2, APM_SIMD_AVX2, APM_SIMD_AVX512F };

/* What only flush and copy need to know of the processor; constant after the first apm_cpu(). */
struct apm_traits {
    enum apm_line_kind line;
    enum apm_simd simd;
    /* A non-temporal store puts a line that is in the cache out of it. Where it does not, the bytes may stay
     * in the cache, and only a flush after the store makes them durable (see apm_cpu.c). */
    uint32_t streams_evict;
};
const struct apm_traits *apm_traits(void);

/* The copies of one instruction set: everything but the last fence. */
typedef void apm_copy_way(char *to, const char *from, size_t size, uint32_t flags, int flush);
typedef void apm_fill_way(char *to, int value, size_t size, uint32_t flags, int flush);
struct apm_copy_ways {
    apm_copy_way *copy;
    apm_fill_way *fill;
};
extern const struct apm_copy_ways apm_copy_plain;
/* NULL: this machine has nothing better than apm_copy_plain. */
const struct apm_copy_ways *apm_copy_simd(const struct apm_traits *traits);

/* apm_flush without the note of the observer. */
void apm_flush_lines(const void *address, size_t size);

/* With APM_LINE_TRACE test/test_copy.c sees each word as it is spoken: 'L' a line flushed, 'S' bytes streamed, 'D' a line
 * stored directly, 'F' a fence. Otherwise nothing is left of it. */
#ifdef APM_LINE_TRACE
void apm_line_trace(char word, const void *at, size_t size);
#else
#define apm_line_trace(word, at, size) ((void)0)
#endif

/* The word that orders flushes and non-temporal stores of this thread before what it does next (law 1). */
static inline __attribute__((always_inline)) void apm_line_fence(void) {
    apm_line_trace('F', NULL, 0);
#if defined(__x86_64__)
    __asm__ volatile("sfence" ::: "memory");
#elif defined(__aarch64__)
    __asm__ volatile("dsb sy" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

#if defined(__x86_64__)
/* The processor orders each of them after earlier stores of this thread to the same line, non-temporal ones
 * included, so that no fence is due between. */
static inline __attribute__((always_inline)) void apm_line_clwb(const void *line) {
    apm_line_trace('L', line, 64);
    __asm__ volatile("clwb %0" : : "m"(*(const char *)line) : "memory");
}
static inline __attribute__((always_inline)) void apm_line_clflushopt(const void *line) {
    apm_line_trace('L', line, 64);
    __asm__ volatile("clflushopt %0" : : "m"(*(const char *)line) : "memory");
}
static inline __attribute__((always_inline)) void apm_line_clflush(const void *line) {
    apm_line_trace('L', line, 64);
    __asm__ volatile("clflush %0" : : "m"(*(const char *)line) : "memory");
}
#endif

#endif
