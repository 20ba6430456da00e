/* How soon a thread that was woken gets a processor. */
#ifndef RAMFERRY_SCHEDULE_H
#define RAMFERRY_SCHEDULE_H

#include <poll.h>
#include <stdint.h>

/* Ask for turns of `slice_ns` in the caller's normal scheduling: a short one comes sooner, and needs no
 * privilege. What it starts has normal ones. Kernels before Linux 6.12 take no notice. Returns 0 or -errno. */
int schedule_slice(uint64_t slice_ns);

/* How long `poll_soon` may look again and again here: 0 where there is one processor only. */
uint64_t spin_ns_here(void);

/* As poll(2), but looks for `spin_ns` before it sleeps: a sleep's end costs 20 us and more where the
 * processor is virtual. */
int poll_soon(struct pollfd *polled, nfds_t count, int wait_ms, uint64_t spin_ns);

#endif
