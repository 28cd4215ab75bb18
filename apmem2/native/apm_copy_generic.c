/* apm_copy_generic.c - copies made of the C library's, for machines (or settings) without non-temporal stores.
 *
 * Temporal stores, then one flush of the range. The hints say nothing here.
 */
#include "apm_line.h"

#include <string.h>

static void plain_copy(char *to, const char *from, size_t size, uint32_t flags, int flush) {
    memmove(to, from, size);
    if (flush && !(flags & APM_F_NOFLUSH)) apm_flush_lines(to, size);
}

static void plain_fill(char *to, int value, size_t size, uint32_t flags, int flush) {
    memset(to, value, size);
    if (flush && !(flags & APM_F_NOFLUSH)) apm_flush_lines(to, size);
}

const struct apm_copy_ways apm_copy_plain = {plain_copy, plain_fill};

#if !defined(__x86_64__)
const struct apm_copy_ways *apm_copy_simd(const struct apm_traits *traits) {
    (void)traits;
    return NULL;
}
#endif
