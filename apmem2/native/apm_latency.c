/* apm_latency.c - how long did they take? A histogram with two steps to each doubling, so that counting is a few instructions
 * and no memory. The idea of steps within a power of two is HdrHistogram's (Gil Tene). */
#include "apm_internal.h"

/* The step of a time: 0 below a microsecond. */
static uint32_t step_of(uint64_t took_ns) {
    uint64_t us = took_ns / 1000;
    if (us == 0)
        return 0;
    uint32_t power = 63 - (uint32_t)__builtin_clzll(us);
    uint32_t step = 1 + 2 * power + (power ? (us >> (power - 1)) & 1 : 0);
    return step < APM_LATENCY_STEPS ? step : APM_LATENCY_STEPS - 1;
}

/* Where a step ends, in nanoseconds. */
static double end_of(uint32_t step) {
    double power = step ? (double)((uint64_t)1000 << ((step - 1) / 2)) : 1000;
    return step == 0 ? 1000 : step == 1 ? 2000 : step % 2 ? power * 1.5 : power * 2;
}

void apm_latency_add(struct apm_latency *latency, uint64_t took_ns) {
    latency->count++;
    latency->total_ns += took_ns;
    latency->steps[step_of(took_ns)]++;
    if (took_ns > latency->max_ns)
        latency->max_ns = took_ns;
}

double apm_latency_at(const struct apm_latency *latency, double share) {
    uint64_t below = 0;
    for (uint32_t step = 0; step < APM_LATENCY_STEPS; step++) {
        below += latency->steps[step];
        if (below == 0 || (double)below < share * (double)latency->count)
            continue;
        double end = end_of(step);
        return step == APM_LATENCY_STEPS - 1 || end > (double)latency->max_ns ? (double)latency->max_ns : end;
    }
    return 0;
}
