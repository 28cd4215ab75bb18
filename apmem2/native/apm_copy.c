/* apm_copy.c - memmove and memset into mapped memory, durable on return where the flags do not say less.
 *
 * Here: binding once, the last fence, the notes of the observer. The bytes are moved by the instruction set
 * that apm_cpu.c chose: apm_copy_x86.c, or apm_copy_generic.c.
 *
 * Law 1: the fence is made by the thread that flushed, before its call returns. With APM_F_NODRAIN it is left
 * out, and whoever passes that flag owes it (apm_fence on the same thread) before the C call that it serves
 * returns.
 */
#include "apm_line.h"

#include <pthread.h>

static apm_copy_way copy_first;
static apm_fill_way fill_first;
static apm_copy_way *copy_bound = copy_first;
static apm_fill_way *fill_bound = fill_first;

static pthread_once_t bound = PTHREAD_ONCE_INIT;
static const struct apm_copy_ways *ways;

/* Release, for what apm_copy_simd prepared; who calls the way acquires. */
static void bind_once(void) {
    ways = apm_copy_simd(apm_traits());
    if (!ways) ways = &apm_copy_plain;
    __atomic_store_n(&copy_bound, ways->copy, __ATOMIC_RELEASE);
    __atomic_store_n(&fill_bound, ways->fill, __ATOMIC_RELEASE);
}

static const struct apm_copy_ways *bind(void) {
    pthread_once(&bound, bind_once);
    return ways;
}

static __attribute__((noinline, cold)) void copy_first(char *to, const char *from, size_t size, uint32_t flags,
                                                       int flush) {
    bind()->copy(to, from, size, flags, flush);
}

static __attribute__((noinline, cold)) void fill_first(char *to, int value, size_t size, uint32_t flags, int flush) {
    bind()->fill(to, value, size, flags, flush);
}

/* What the recorder must see, in the order in which it holds. Non-temporal stores count as flushed. */
static __attribute__((noinline, cold)) void note(void *to, size_t size, uint32_t flags, int flush) {
    apm_observe_note(APM_CALL_STORE, 0, (uintptr_t)to, size);
    if (flush && !(flags & APM_F_NOFLUSH)) apm_observe_note(APM_CALL_FLUSH, 0, (uintptr_t)to, size);
}

static inline void finish(void *to, size_t size, uint32_t flags, int flush) {
    int observed = APM_UNLIKELY(__atomic_load_n(&apm_observing, __ATOMIC_RELAXED));
    if (observed) note(to, size, flags, flush);
    if (flags & (APM_F_NODRAIN | APM_F_NOFLUSH)) return;
    apm_line_fence(); /* law 1 */
    if (observed) apm_observe_note(APM_CALL_FENCE, 0, 0, 0);
}

void apm_copy(void *to, const void *from, size_t size, uint32_t flags, int flush) {
    __atomic_load_n(&copy_bound, __ATOMIC_ACQUIRE)(to, from, size, flags, flush);
    finish(to, size, flags, flush);
}

void apm_fill(void *to, int value, size_t size, uint32_t flags, int flush) {
    __atomic_load_n(&fill_bound, __ATOMIC_ACQUIRE)(to, value, size, flags, flush);
    finish(to, size, flags, flush);
}
