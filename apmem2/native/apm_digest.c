/* apm_digest.c - which sources was this library built from? */
#include "apm_internal.h"

#ifndef APM_SOURCE_DIGEST
#define APM_SOURCE_DIGEST "0000000000000000000000000000000000000000000000000000000000000000"
#endif

const char *apm_source_digest(void) { return APM_SOURCE_DIGEST; }
