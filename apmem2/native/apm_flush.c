/* apm_flush.c - writes cache lines back, and orders that.
 *
 * Law 1 lives here: apm_flush and apm_fence are worth something only on one and the same thread, the flush
 * first; a fence elsewhere orders nothing. The instruction is bound once, at the first flush.
 */
#include "apm_line.h"

typedef void flush_way(const void *address, size_t size);

/* Bytes of a line. The 1 is there only until the first flush, and would be right, too. */
static uintptr_t line_step = 1;

#define EVERY_LINE(line)                                                                             \
    uintptr_t step = __atomic_load_n(&line_step, __ATOMIC_RELAXED), end = (uintptr_t)address + size; \
    for (uintptr_t line = size ? (uintptr_t)address & ~(step - 1) : end; line < end; line += step)

static void flush_nothing(const void *address, size_t size) {
    (void)address, (void)size; /* can_flush is 0: nobody relies on it */
}

#if defined(__x86_64__)
static void flush_clwb(const void *address, size_t size) {
    EVERY_LINE(line) apm_line_clwb((const void *)line);
}
static void flush_clflushopt(const void *address, size_t size) {
    EVERY_LINE(line) apm_line_clflushopt((const void *)line);
}
static void flush_clflush(const void *address, size_t size) {
    EVERY_LINE(line) apm_line_clflush((const void *)line);
}
#elif defined(__aarch64__)
/* A clean by address is ordered after this thread's own stores to the line; the barrier orders it after what this
 * thread has seen of others, too (law 1). */
static void flush_cvac(const void *address, size_t size) {
    __asm__ volatile("dmb ish" ::: "memory");
    EVERY_LINE(line) {
        apm_line_trace('L', (const void *)line, step);
        __asm__ volatile("dc cvac, %0" : : "r"(line) : "memory");
    }
}
static void flush_cvap(const void *address, size_t size) {
    __asm__ volatile("dmb ish" ::: "memory");
    EVERY_LINE(line) {
        apm_line_trace('L', (const void *)line, step);
        /* dc cvap by its number, for assemblers that stop at armv8.0 */
        __asm__ volatile("sys #3, c7, c12, #1, %0" : : "r"(line) : "memory");
    }
}
#endif

static flush_way *way_of(enum apm_line_kind kind) {
    switch (kind) {
#if defined(__x86_64__)
    case APM_LINE_CLWB: return flush_clwb;
    case APM_LINE_CLFLUSHOPT: return flush_clflushopt;
    case APM_LINE_CLFLUSH: return flush_clflush;
#elif defined(__aarch64__)
    case APM_LINE_CVAC: return flush_cvac;
    case APM_LINE_CVAP: return flush_cvap;
#endif
    default: return flush_nothing;
    }
}

/* Bound by the first flush. Threads that do it at once store the same values, and a thread that sees the way without
 * its step takes smaller steps. */
static flush_way flush_first;
static flush_way *flush_bound = flush_first;

static __attribute__((noinline, cold)) void flush_first(const void *address, size_t size) {
    __atomic_store_n(&line_step, apm_cpu()->line_size, __ATOMIC_RELAXED);
    flush_way *way = way_of(apm_traits()->line);
    __atomic_store_n(&flush_bound, way, __ATOMIC_RELAXED);
    way(address, size);
}

void apm_flush_lines(const void *address, size_t size) {
    __atomic_load_n(&flush_bound, __ATOMIC_RELAXED)(address, size);
}

static __attribute__((noinline, cold)) void flush_observed(const void *address, size_t size) {
    apm_flush_lines(address, size);
    apm_observe_note(APM_CALL_FLUSH, 0, (uintptr_t)address, size);
}

void apm_flush(const void *address, size_t size) {
    if (APM_UNLIKELY(__atomic_load_n(&apm_observing, __ATOMIC_RELAXED))) flush_observed(address, size);
    else apm_flush_lines(address, size); /* a jump: what follows a flush is the caller's fence */
}

void apm_fence(void) {
    apm_line_fence(); /* law 1 */
    if (APM_UNLIKELY(__atomic_load_n(&apm_observing, __ATOMIC_RELAXED))) apm_observe_note(APM_CALL_FENCE, 0, 0, 0);
}
