/* apm_copy_x86.c - copies by SSE2, AVX2 and AVX-512F in one binary, non-temporal where that was asked for or pays.
 *
 * The ways to write whole lines:
 *   STORE_ONLY        temporal, nothing else
 *   STORE_FLUSH       temporal, a few lines stored, then flushed
 *   STORE_THEN_FLUSH  the same in longer pieces: the store queue is not kept waiting
 *   STREAM_ONLY       non-temporal; durable after the fence where such stores evict (apm_cpu.c)
 *   STREAM_FLUSH      non-temporal and flushed, a piece at a time, where they may not
 *   DIRECT            movdir64b: always past the cache
 * Parts of lines at both ends are stored and flushed (durable either way). No way flushes a line twice.
 * The public functions in apm_copy.c make the last fence (law 1).
 *
 * The bounds below are measured on Zen 5 with tests/benchmarks/native/pmem2_compare.c.
 */
#include "apm_line.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

enum way { STORE_ONLY, STORE_FLUSH, STORE_THEN_FLUSH, STREAM_ONLY, STREAM_FLUSH, DIRECT };
enum { /* bytes */
    LINE = 64,
    BLOCK = 256,              /* in registers at once: all sixteen of SSE2 */
    SMALL = 256,              /* up to which nothing is asked but the size */
    PIECE = 4096,             /* written before they are flushed, by the ways that go by pieces */
    STORE_FLUSH_FROM = 16384, /* from here on a copy (not a fill) is faster a few lines at a time */
    MEMMOVE_FROM = 32768,     /* from here on the C library's stores are; below, they take twice as long at times */
    MEMSET_FROM = 8192,       /* likewise for fills */
    /* Streams that must be flushed are no faster than stores below this; and slower where part of a line is stored,
     * because then there are two ways to wait for, one after the other. */
    STREAM_FLUSH_FROM = 1024,
};

/* Bound by apm_copy_simd, before any way is handed out. */
static enum apm_line_kind line_kind;
static uint32_t streams_evict, has_direct;
static uint64_t threshold;
static size_t stream_from; /* below, hints for streams are not followed */

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS void flush_line(const void *line) {
    if (APM_LIKELY(line_kind == APM_LINE_CLWB)) apm_line_clwb(line);
    else if (line_kind == APM_LINE_CLFLUSHOPT) apm_line_clflushopt(line);
    else apm_line_clflush(line);
}

ALWAYS void flush_few(const char *to, size_t size) {
    if (size == 0) return;
    const char *line = (const char *)((uintptr_t)to & ~(uintptr_t)(LINE - 1));
    for (const char *end = to + size; line < end; line += LINE) flush_line(line);
}

/* libpmem2's order: NOFLUSH, then the non-temporal hints, then the temporal ones, then the threshold; without a
 * need to flush only NONTEMPORAL counts. */
ALWAYS int wants_stream(size_t size, uint32_t flags, int flush) {
    if (flags & APM_F_NOFLUSH) return 0;
    if (!flush) return (flags & APM_F_NONTEMPORAL) != 0;
    if (size < stream_from) return 0; /* the hint costs, and buys nothing */
    if (flags & (APM_F_NONTEMPORAL | APM_F_WC)) return 1;
    if (flags & (APM_F_TEMPORAL | APM_F_WB)) return 0;
    return size >= threshold;
}

/* ---- less than a vector ------------------------------------------------------------------------------------ */

typedef uint16_t __attribute__((may_alias, aligned(1))) u16;
typedef uint32_t __attribute__((may_alias, aligned(1))) u32;
typedef uint64_t __attribute__((may_alias, aligned(1))) u64;

/* Both ends of type, loaded before either is stored. */
#define MOVE_ENDS(type)                                            \
    do {                                                           \
        type first_ = *(const type *)from;                         \
        type last_ = *(const type *)(from + size - sizeof(type));  \
        *(type *)to = first_;                                      \
        *(type *)(to + size - sizeof(type)) = last_;               \
    } while (0)
#define FILL_ENDS(type, value_)                                    \
    do {                                                           \
        *(type *)to = (type)(value_);                              \
        *(type *)(to + size - sizeof(type)) = (type)(value_);      \
    } while (0)

ALWAYS void move_16(char *to, const char *from, size_t size) {
    if (size >= 8) MOVE_ENDS(u64);
    else if (size >= 4) MOVE_ENDS(u32);
    else if (size >= 2) MOVE_ENDS(u16);
    else if (size) *to = *from;
}

ALWAYS void fill_16(char *to, int value, size_t size) {
    uint64_t v = (uint8_t)value * 0x0101010101010101u;
    if (size >= 8) FILL_ENDS(u64, v);
    else if (size >= 4) FILL_ENDS(u32, v);
    else if (size >= 2) FILL_ENDS(u16, v);
    else if (size) *to = (char)value;
}

ALWAYS void move_32(char *to, const char *from, size_t size) {
    __m128i first = _mm_loadu_si128((const __m128i *)from);
    __m128i last = _mm_loadu_si128((const __m128i *)(from + size - 16));
    _mm_storeu_si128((__m128i *)to, first);
    _mm_storeu_si128((__m128i *)(to + size - 16), last);
}

ALWAYS void fill_32(char *to, int value, size_t size) {
    __m128i v = _mm_set1_epi8((char)value);
    _mm_storeu_si128((__m128i *)to, v);
    _mm_storeu_si128((__m128i *)(to + size - 16), v);
}

#define ALWAYS_AVX2 static inline __attribute__((always_inline, target("avx2")))

ALWAYS_AVX2 void move_64(char *to, const char *from, size_t size) {
    __m256i first = _mm256_loadu_si256((const __m256i *)from);
    __m256i last = _mm256_loadu_si256((const __m256i *)(from + size - 32));
    _mm256_storeu_si256((__m256i *)to, first);
    _mm256_storeu_si256((__m256i *)(to + size - 32), last);
}

ALWAYS_AVX2 void fill_64(char *to, int value, size_t size) {
    __m256i v = _mm256_set1_epi8((char)value);
    _mm256_storeu_si256((__m256i *)to, v);
    _mm256_storeu_si256((__m256i *)(to + size - 32), v);
}

ALWAYS void stream_word(char *to, uint64_t word) {
    apm_line_trace('S', to, 8);
    _mm_stream_si64((long long *)to, (long long)word);
}

/* count aligned words, in registers before the first is stored. */
ALWAYS void stream_few(char *to, const char *from, int count) {
    uint64_t words[4];
    _Pragma("GCC unroll 4") for (int i = 0; i < count; i++) words[i] = ((const u64 *)from)[i];
    _Pragma("GCC unroll 4") for (int i = 0; i < count; i++) stream_word(to + i * 8, words[i]);
}

/* Less than a line of aligned words. */
ALWAYS void stream_words(char *to, const char *from, size_t size, int forward) {
    size_t at = forward ? 0 : size;
    _Pragma("GCC unroll 3") for (unsigned piece = 32; piece >= 8; piece /= 2) {
        if (!(size & piece)) continue;
        if (!forward) at -= piece;
        stream_few(to + at, from + at, (int)piece / 8);
        if (forward) at += piece;
    }
}

ALWAYS void fill_stream_words(char *to, int value, size_t size) {
    uint64_t v = (uint8_t)value * 0x0101010101010101u;
    for (size_t i = 0; i < size / 8; i++) stream_word(to + i * 8, v);
}

/* Reads 64 bytes, then writes a line past the cache, whole. */
ALWAYS void direct_line(char *to, const char *from) {
    apm_line_trace('D', to, LINE);
    __asm__ volatile("movdir64b (%1), %0" : : "r"(to), "r"(from) : "memory");
}

ALWAYS void move_direct(char *to, const char *from, size_t size, int forward) {
    if (forward)
        for (size_t at = 0; at < size; at += LINE) direct_line(to + at, from + at);
    else
        for (size_t at = size; at > 0; at -= LINE) direct_line(to + at - LINE, from + at - LINE);
}

/* ---- the three ------------------------------------------------------------------------------------------------ */

#define W 16
#define TARGET
#define NAME(x) sse2_##x
#define VEC __m128i
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define STREAM(p, v) _mm_stream_si128((__m128i *)(p), v)
#define SPREAD(c) _mm_set1_epi8(c)
#include "apm_copy_simd.h"

#define W 32
#define TARGET __attribute__((target("avx2")))
#define NAME(x) avx2_##x
#define VEC __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define STREAM(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define SPREAD(c) _mm256_set1_epi8(c)
#include "apm_copy_simd.h"

#define W 64
#define TARGET __attribute__((target("avx512f,avx2")))
#define NAME(x) avx512f_##x
#define VEC __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define STREAM(p, v) _mm512_stream_si512((__m512i *)(p), v)
#define SPREAD(c) _mm512_set1_epi8(c)
#include "apm_copy_simd.h"

const struct apm_copy_ways *apm_copy_simd(const struct apm_traits *traits) {
    const struct apm_cpu *cpu = apm_cpu();
    line_kind = traits->line;
    streams_evict = traits->streams_evict;
    has_direct = cpu->has_movdir64b;
    threshold = cpu->movnt_threshold;
    stream_from = streams_evict ? 0 : has_direct ? LINE : STREAM_FLUSH_FROM;
    switch (traits->simd) {
    case APM_SIMD_AVX512F: return &avx512f_ways;
    case APM_SIMD_AVX2: return &avx2_ways;
    case APM_SIMD_SSE2: return &sse2_ways;
    default: return NULL;
    }
}
#endif
