/* check.h - what a C test needs: a count, and a line that says where it went wrong. */
#ifndef CHECK_H
#define CHECK_H
#include <stdio.h>
#include <stdlib.h>
static long checks;
#define CHECK(condition)                                                                    \
    do {                                                                                    \
        __atomic_add_fetch(&checks, 1, __ATOMIC_RELAXED);                                  \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);       \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)
#endif
