/* How soon a thread that was woken gets a processor. */
#ifndef RAMFERRY_SCHEDULE_H
#define RAMFERRY_SCHEDULE_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

/* Ask for turns of `slice_ns` in the caller's normal scheduling: a short one comes sooner, and needs no
 * privilege. What it starts has normal ones. Kernels before Linux 6.12 take no notice. Returns 0 or -errno. */
int schedule_slice(uint64_t slice_ns);

/* How long `poll_soon` may look again and again here: 0 where there is one processor only. */
uint64_t spin_ns_here(void);

/* As poll(2), but looks for `spin_ns` before it sleeps: a sleep's end costs 20 us and more where the
 * processor is virtual. */
int poll_soon(struct pollfd *polled, nfds_t count, int wait_ms, uint64_t spin_ns);

/* One that spins only as long as it does not share its processor. All zero at first, but for `spin_ns`. */
struct spinner {
    uint64_t spin_ns;
    unsigned spins, disturbed; /* of this window */
    uint64_t rest_ns, rests_until_ns;
};

/* As poll_soon. But a spinner that was made to give way in many of its spins leaves its processor, and sleeps at once
 * for the next 1 ms, and twice as long each time in a row, up to 32 ms: who shares its processor waits for it, and it
 * loses the right to be woken soon. */
int poll_modestly(struct spinner *spinner, struct pollfd *polled, nfds_t count, int wait_ms);

/* Its decision: a spin has ended, in which it was made to give way or not. Returns whether it shares its processor,
 * and was just seen to. */
bool spinner_judge(struct spinner *spinner, bool was_disturbed, uint64_t now_ns);

/* Have the calling thread go on on another of its processors, whichever the kernel gives, if it has two to four:
 * there (two processors of a virtual machine, without a common cache) it is woken where it was, beside whoever is there,
 * though another one is idle. Its affinity is the processors that it had; who adds one to its cpuset later, or sets
 * its affinity in this very moment, is not heard. */
void leave_processor(void);

#endif
