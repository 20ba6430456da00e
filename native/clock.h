/* The one clock that durations and deadlines are told by. */
#ifndef RAMFERRY_CLOCK_H
#define RAMFERRY_CLOCK_H

#include <stdint.h>

#define SECOND_NS UINT64_C(1000000000)

/* CLOCK_MONOTONIC. */
uint64_t monotonic_ns(void);

#endif
