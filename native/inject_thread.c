#define _GNU_SOURCE
#include "inject_thread.h"

#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "clock.h"

#define PROMPT_NS UINT64_C(10000000) /* what takes longer waits for a processor, or for the kernel */
#define LOOK_NS 20000 /* between two looks; the thread needs the processor meanwhile */
#define LATE_LOOK_NS 500000 /* and when it has not been prompt */
#define TRAPS_MAX 16 /* a process is not stopped more often than that within a millisecond */

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

static enum thread_stop sort(int status, int *signal_number)
{
    if (!WIFSTOPPED(status))
        return STOP_END;
    *signal_number = 0;
    if (status >> 16 == PTRACE_EVENT_STOP)
        return STOP_TRAP;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80))
        return STOP_CALL;
    *signal_number = WSTOPSIG(status);
    return STOP_SIGNAL;
}

enum thread_stop thread_wait(pid_t thread, int *signal_number)
{
    const uint64_t began_ns = monotonic_ns();

    for (uint64_t waited_ns = 0; waited_ns < THREAD_WAIT_NS;
         waited_ns = monotonic_ns() - began_ns) {
        int status;
        pid_t found = waitpid(thread, &status, __WALL | WNOHANG);

        if (found == thread)
            return sort(status, signal_number);
        if (found < 0 && errno != EINTR)
            return STOP_END;
        nanosleep(&(struct timespec){0, waited_ns < PROMPT_NS ? LOOK_NS : LATE_LOOK_NS}, NULL);
    }
    return STOP_NONE;
}

int thread_read_registers(pid_t thread, frame_registers *registers, size_t *size)
{
    struct iovec vector = {registers, sizeof *registers};

    if (ptrace(PTRACE_GETREGSET, thread, (void *)(uintptr_t)NT_PRSTATUS, &vector) < 0)
        return -errno;
    *size = vector.iov_len;
    return 0;
}

int thread_write_registers(pid_t thread, const frame_registers *registers)
{
    struct iovec vector = {(void *)(uintptr_t)registers, sizeof *registers};

    return ptrace(PTRACE_SETREGSET, thread, (void *)(uintptr_t)NT_PRSTATUS, &vector) < 0 ? -errno
                                                                                         : 0;
}

enum thread_stop thread_go_on(pid_t thread, int *signal_number)
{
    for (int i = 0; i < TRAPS_MAX; ++i) {
        enum thread_stop stop;

        if (ptrace(PTRACE_SYSCALL, thread, NULL, NULL) < 0)
            return STOP_END;
        stop = thread_wait(thread, signal_number);
        if (stop != STOP_TRAP)
            return stop;
    }
    return STOP_NONE;
}
