/* How the pages that workload.h describes are written, for the files of the workload alone. Inline: a call
 * for each write made a vCPU that moves 8 words 15 % slower. */
#ifndef RAMFERRY_WORKLOAD_PAGES_H
#define RAMFERRY_WORKLOAD_PAGES_H

#include "workload.h"

#include <string.h>

enum { MAGIC_WORD = 0, INDEX_WORD = 1, COUNTER_WORD = 2, CHECKSUM_WORD = 3 };

/* One step of splitmix64: any state gives good numbers, so any state may be loaded. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline uint64_t mix(uint64_t seed, uint64_t value)
{
    uint64_t state = seed ^ (value * UINT64_C(0xd6e8feb86659fd93));
    return next_random(&state);
}

static inline uint64_t *page_at(const void *ram, uint64_t page)
{
    return (uint64_t *)ram + page * WORKLOAD_PAGE_WORDS;
}

static inline uint64_t weight(unsigned word)
{
    return 2u * (uint64_t)word + 1u;
}

static inline uint64_t seed_part(uint64_t seed)
{
    return mix(seed, UINT64_C(0x636865636b73756d));
}

/* One write: the counter goes up by one, and one window of the body turns by one word, so that what the
 * page is made of stays the same. The checksum gets the difference only (see workload.h). */
static inline void write_page(uint64_t *page, uint64_t index, uint32_t words, uint64_t seed)
{
    if (page[MAGIC_WORD] == 0) { /* kind zero, first write: the body is zero */
        page[MAGIC_WORD] = WORKLOAD_MAGIC | WORKLOAD_ZERO;
        page[INDEX_WORD] = index;
        page[CHECKSUM_WORD] = seed_part(seed) + page[MAGIC_WORD] * weight(MAGIC_WORD) +
                              index * weight(INDEX_WORD);
    }
    uint64_t difference = weight(COUNTER_WORD);
    uint64_t counter = page[COUNTER_WORD]++;
    if (words >= 2) {
        uint64_t *window =
            page + WORKLOAD_HEADER_WORDS + counter % (WORKLOAD_BODY_WORDS / words) * words;
        uint64_t first = window[0], total = 0;
        for (uint32_t i = 0; i < words; i++)
            total += window[i];
        memmove(window, window + 1, (words - 1) * sizeof *window);
        window[words - 1] = first;
        /* All but the first word lose 2 of their weight; the first gains 2 for each word it passed. */
        difference += 2 * (words * first - total);
    }
    page[CHECKSUM_WORD] += difference;
}

#endif
