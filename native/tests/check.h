/* The least that a C test needs: a check that tells where it failed, and numbers that repeat. */
#ifndef RAMFERRY_CHECK_H
#define RAMFERRY_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define SKIPPED 77 /* exit code: a part could not be tested here, the rest held */

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__,            \
                    #condition);                                                                  \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

/* xorshift64*: the same numbers on every run and machine. */
static inline uint64_t random_word(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

/* 0 <= result < bound */
static inline uint64_t random_below(uint64_t *state, uint64_t bound)
{
    return (random_word(state) >> 11) % bound;
}

#endif
