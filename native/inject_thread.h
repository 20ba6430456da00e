/* One thread of another process that ptrace holds: its stops and its registers. */
#ifndef RAMFERRY_INJECT_THREAD_H
#define RAMFERRY_INJECT_THREAD_H

#include "inject_frame.h"

/* A thread that does not stop so long is in the kernel's hands. */
#define THREAD_WAIT_NS UINT64_C(2000000000)

/* What the thread did when it was let go on. */
enum thread_stop {
    STOP_CALL,   /* it is before or after a system call */
    STOP_TRAP,   /* it was interrupted, or its process is being stopped */
    STOP_SIGNAL, /* a signal is about to be delivered */
    STOP_END,    /* it has ended */
    STOP_NONE,   /* nothing, for too long */
};

/* Wait for the next stop, THREAD_WAIT_NS at most; `signal_number` is that of a STOP_SIGNAL, else 0. */
enum thread_stop thread_wait(pid_t thread, int *signal_number);

/* Let it go on to its next stop. A process that is being stopped makes its threads trap, also while
 * they are traced; ours goes on, and stops for that when we leave it. */
enum thread_stop thread_go_on(pid_t thread, int *signal_number);

/* All general registers; `size` tells the mode that the thread is in. 0 or -errno. */
int thread_read_registers(pid_t thread, frame_registers *registers, size_t *size);
int thread_write_registers(pid_t thread, const frame_registers *registers);

#endif
