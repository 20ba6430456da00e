/* How soon a thread that was woken gets a processor. */
#ifndef RAMFERRY_SCHEDULE_H
#define RAMFERRY_SCHEDULE_H

#include <stdint.h>

/* Ask for turns of `slice_ns` in the caller's normal scheduling: a short one comes sooner, and needs no
 * privilege. Kernels before Linux 6.12 take no notice. Returns 0 or -errno. */
int schedule_slice(uint64_t slice_ns);

#endif
