/* apm_cpu.c - what this processor can do for durability: asked once, then constant.
 *
 * CPUID (and XGETBV, because a register file that the system does not save is not there) on x86-64, the
 * auxiliary vector and CTR_EL0 on aarch64. Everywhere else page granularity is all there is.
 *
 * Do non-temporal stores put a cached line out of the cache? Intel's optimization manual allows both, updating in
 * place and evicting; its software developer's manual says evicting for all but old processors, and libpmem2 is
 * built on that, so we follow it for Intel with clflushopt (not measured by us). On an AMD EPYC of family 26
 * (Zen 5), measured: a non-temporal store of any width to a line in the L1, with its sfence, took no time beyond the
 * timer's, and a load afterwards hit the L1; to a line not cached it took 100 ns and the load missed. From that we
 * conclude (no power was cut) that such bytes stay in the cache and are not durable after the fence. So we believe
 * only those who promise it, and flush after non-temporal stores everywhere else. libpmem2 does not.
 * APM_STREAMS_EVICT=1 or 0 overrides, for measuring and for processors that are known to.
 * movdir64b writes past the cache by definition (and did, by the same measurement), and needs no flush.
 *
 * The widest vectors are taken. On Zen 5 non-temporal stores of 16, 32 and 64 bytes are equally fast; temporal copies
 * of 1 and 4 KiB take about 7.5 and 25 ns with 64, 10 and 32 with 32, 17 and 55 with 16; up to 128 bytes they are
 * equal. Not measured where AVX-512 slows the clock: PMEM_AVX512F=0 is for there.
 *
 * Thresholds (bytes, from which on a copy without a hint is non-temporal):
 *   evicting streams    256: what libpmem2 found on Intel; not measured by us (8 where they are said to evict
 *                       elsewhere: 100 ns against 160 on Zen 5)
 *   movdir64b            64: one whole line; measured on Zen 5: 100 ns against 160 for store and flush
 *   stream, then flush  APM_STREAM_FLUSH_FROM: measured on Zen 5 (tests/benchmarks/native/pmem2_compare.c)
 */
#include "apm_line.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define APM_STREAM_FLUSH_FROM 4096

static struct apm_cpu cpu;
static struct apm_traits traits;
static pthread_once_t once = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
#include <cpuid.h>

static int environment_is(const char *name, const char *value) {
    const char *found = getenv(name);
    return found && strcmp(found, value) == 0;
}

/* The register files that the system saves; 0 when it does not say. */
static uint32_t saved_registers(uint32_t leaf1_ecx) {
    if (!(leaf1_ecx & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static void choose_flush(uint32_t leaf1_edx, uint32_t leaf7_ebx) {
    if (leaf1_edx & (1u << 19)) traits.line = APM_LINE_CLFLUSH;
    if ((leaf7_ebx & bit_CLFLUSHOPT) && !environment_is("PMEM_NO_CLFLUSHOPT", "1")) traits.line = APM_LINE_CLFLUSHOPT;
    if ((leaf7_ebx & bit_CLWB) && !environment_is("PMEM_NO_CLWB", "1")) traits.line = APM_LINE_CLWB;
    static const char *const names[] = {"none", "clflush", "clflushopt", "clwb"};
    cpu.flush_name = names[traits.line];
    cpu.can_flush = traits.line != APM_LINE_NONE;
}

static void choose_copy(uint32_t registers, uint32_t leaf7_ebx, uint32_t leaf7_ecx) {
    const uint32_t ymm = 0x06, zmm = 0xe6; /* XCR0: SSE and AVX state; and the three of AVX-512 */
    /* The copies know lines of 64 bytes, as every x86-64 has them. */
    if (cpu.line_size != 64 || environment_is("PMEM_NO_MOVNT", "1")) return;
    traits.simd = APM_SIMD_SSE2;
    if ((leaf7_ebx & bit_AVX2) && (registers & ymm) == ymm && !environment_is("PMEM_AVX", "0"))
        traits.simd = APM_SIMD_AVX2;
    if ((leaf7_ebx & bit_AVX512F) && (registers & zmm) == zmm && !environment_is("PMEM_AVX512F", "0"))
        traits.simd = APM_SIMD_AVX512F;
    static const char *const names[] = {"plain", "sse2", "avx2", "avx512f"};
    static const uint32_t widths[] = {0, 16, 32, 64};
    cpu.copy_name = names[traits.simd];
    cpu.copy_width = widths[traits.simd];
    /* "force" is for tests where a hypervisor hides the instruction. */
    cpu.has_movdir64b = environment_is("PMEM_MOVDIR64B", "force") ||
                        ((leaf7_ecx & (1u << 28)) && !environment_is("PMEM_MOVDIR64B", "0"));
    if (cpu.has_movdir64b) cpu.copy_width = 64;
}

static void detect(void) {
    uint32_t eax, ebx, ecx, edx, maximum;
    uint32_t leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx;
    if (!__get_cpuid(0, &maximum, &ebx, &ecx, &edx)) return;
    uint32_t intel = ebx == signature_INTEL_ebx && ecx == signature_INTEL_ecx && edx == signature_INTEL_edx;
    if (maximum >= 7) __cpuid_count(7, 0, eax, leaf7_ebx, leaf7_ecx, leaf7_edx);
    __cpuid(1, eax, ebx, ecx, edx);
    if (edx & (1u << 19)) cpu.line_size = ((ebx >> 8) & 0xff) * 8;
    if (cpu.line_size == 0) cpu.line_size = 64;

    choose_flush(edx, leaf7_ebx);
    choose_copy(saved_registers(ecx), leaf7_ebx, leaf7_ecx);

    traits.streams_evict = intel && (leaf7_ebx & bit_CLFLUSHOPT);
    if (environment_is("APM_STREAMS_EVICT", "1")) traits.streams_evict = 1;
    if (environment_is("APM_STREAMS_EVICT", "0")) traits.streams_evict = 0;
    cpu.movnt_threshold = cpu.has_movdir64b ? 64 : traits.streams_evict ? (intel ? 256 : 8) : APM_STREAM_FLUSH_FROM;
    const char *threshold = getenv("PMEM_MOVNT_THRESHOLD");
    if (threshold) {
        long long bytes = atoll(threshold);
        if (bytes >= 0) cpu.movnt_threshold = (uint64_t)bytes;
    }
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

#ifndef HWCAP_DCPOP
#define HWCAP_DCPOP (1ul << 16)
#endif

static void detect(void) {
    uint64_t cache_type;
    __asm__("mrs %0, ctr_el0" : "=r"(cache_type));
    cpu.line_size = 4u << ((cache_type >> 16) & 15); /* DminLine: log2 of words */
    /* To the point of persistence where the processor knows one, else to the point of coherency. */
    int persistence = (getauxval(AT_HWCAP) & HWCAP_DCPOP) != 0;
    traits.line = persistence ? APM_LINE_CVAP : APM_LINE_CVAC;
    cpu.flush_name = persistence ? "dc cvap" : "dc cvac";
    cpu.can_flush = 1;
}

#else

static void detect(void) {}

#endif

static void detect_once(void) {
    cpu.line_size = 64;
    cpu.flush_name = "none";
    cpu.copy_name = "plain";
    cpu.movnt_threshold = UINT64_MAX;
    detect();
}

const struct apm_cpu *apm_cpu(void) {
    pthread_once(&once, detect_once);
    return &cpu;
}

const struct apm_traits *apm_traits(void) {
    pthread_once(&once, detect_once);
    return &traits;
}
