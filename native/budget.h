/* The bandwidth budget: three words in memory shared by all workers. */
#ifndef RAMFERRY_BUDGET_H
#define RAMFERRY_BUDGET_H

#include <stdint.h>

struct budget {
    _Atomic uint64_t rate_bytes_per_s; /* 0: unlimited; written by the control process */
    _Atomic uint64_t sold_until_ns;    /* monotonic time up to which bandwidth is sold */
    _Atomic uint64_t generation;       /* counts the rates that were set */
};

_Static_assert(sizeof(struct budget) == 24, "three words that all processes agree on");

/* Set the rate and take back all that was sold; one process only.
 *
 * Who bought before or meanwhile sees another generation than the one that it read *before* it
 * bought, and buys again: what it bought may be at either rate, but is in no account any more. */
void budget_set_rate(struct budget *budget, uint64_t rate_bytes_per_s, uint64_t now_ns);

/* Buy bandwidth for `byte_count` bytes; return the monotonic time when they may go, at least
 * `now_ns`. Lock-free (GCRA): bandwidth is sold in sequence, and what was unsold for longer than
 * `burst_ns` is lost. Times past the end of 64 bits stay there. */
uint64_t budget_take(struct budget *budget, uint64_t byte_count, uint64_t now_ns,
                     uint64_t burst_ns);

#endif
