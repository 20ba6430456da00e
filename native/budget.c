#include "budget.h"

#include <stdatomic.h>

__extension__ typedef unsigned __int128 uint128;

/* Nanoseconds that the bytes take, rounded up: rounding down would sell more than there is. */
static uint64_t duration_ns(uint64_t byte_count, uint64_t rate_bytes_per_s)
{
    uint128 ns = ((uint128)byte_count * 1000000000u + rate_bytes_per_s - 1) / rate_bytes_per_s;

    return ns > UINT64_MAX ? UINT64_MAX : (uint64_t)ns;
}

void budget_set_rate(struct budget *budget, uint64_t rate_bytes_per_s, uint64_t now_ns)
{
    atomic_store(&budget->rate_bytes_per_s, rate_bytes_per_s);
    /* The time now, not 0: a purchase under way at the old rate must find another value. */
    atomic_store(&budget->sold_until_ns, now_ns);
    atomic_fetch_add(&budget->generation, 1);
}

uint64_t budget_take(struct budget *budget, uint64_t byte_count, uint64_t now_ns,
                     uint64_t burst_ns)
{
    uint64_t oldest = now_ns > burst_ns ? now_ns - burst_ns : 0;
    uint64_t sold_until = atomic_load(&budget->sold_until_ns);
    uint64_t rate, start, end, duration;

    do { /* the rate after `sold_until`, so that a new one never goes with the old account */
        rate = atomic_load(&budget->rate_bytes_per_s);
        if (rate == 0)
            return now_ns;
        duration = duration_ns(byte_count, rate);
        start = sold_until > oldest ? sold_until : oldest;
        end = start > UINT64_MAX - duration ? UINT64_MAX : start + duration;
    } while (!atomic_compare_exchange_weak(&budget->sold_until_ns, &sold_until, end));
    return start > now_ns ? start : now_ns;
}
