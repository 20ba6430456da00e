/* A userfaultfd of another process's memory, opened by that process without its help (ptrace).
 *
 * One thread, best one that waits in a system call, is stopped, makes two calls (userfaultfd, close)
 * with an instruction that is in its memory already, and is put back; all others run on. No code is
 * written.
 *
 * Whoever dies, and when: the changed registers lead, without anybody's help, through `rt_sigreturn`
 * and a frame that was laid below the thread's stack before, back to where the thread was. So the
 * death of this process at any instant leaves the target running as before, with at most one unused
 * descriptor more. docs/decisions/0007-injection.md has the proof and its limits. */
#ifndef RAMFERRY_INJECT_H
#define RAMFERRY_INJECT_H

#include <stdint.h>
#include <sys/types.h>

/* What was in the way; the target is as before in all cases. */
enum inject_obstacle {
    INJECT_DONE,
    INJECT_GONE,           /* the process has ended */
    INJECT_NOT_ALLOWED,    /* this user may not trace it */
    INJECT_TRACED,         /* somebody else does */
    INJECT_NOT_64_BIT,     /* it runs in another mode than we do */
    INJECT_FILTERED,       /* its seccomp filter forbids the calls, or cannot be read */
    INJECT_SHADOW_STACK,   /* its thread checks its returns; a frame of ours would kill it */
    INJECT_NO_CODE,        /* nowhere in its code are the instructions that are needed */
    INJECT_NO_SAFE_THREAD, /* none is at rest, on a stack that ends in a guard page */
    INJECT_TOO_OLD,        /* the kernel lacks a system call or flag */
    INJECT_REFUSED,        /* the kernel let the process have none: `error` */
    INJECT_FAILED,         /* a system call of ours failed: `error` */
};

struct injection {
    int uffd;              /* the caller's, close-on-exec; -1 unless INJECT_DONE */
    int left_open;         /* its number in the target, if it could not be closed there, or -1 */
    int error;             /* errno, for some obstacles, or 0 */
    pid_t thread;          /* that was stopped, or 0 */
    int64_t stopped_ns;    /* the longest time that a thread stood */
    uint32_t attempts;     /* a thread that is not at a safe place is let go, and another one tried */
};

/* Have process `pid` call userfaultfd(`flags` | O_CLOEXEC | O_NONBLOCK), fetch the descriptor, and
 * close it there; or, when `keeps`, leave it open there as `left_open`, so that it outlives us. Only
 * pages of the process that `flags` allow can fault; see userfaultfd(2). No other thread of ours may
 * trace the process. Gives up after `wait_ns`.
 *
 * Runs in a thread of its own, because the end of a thread ends all its tracing. */
enum inject_obstacle inject_userfaultfd(pid_t pid, int flags, int keeps, int64_t wait_ns,
                                        struct injection *injection);

/* Have it close its descriptor `number`, if that is our `fd`, which stays open here. `left_open` is -1
 * when that was done, and `number` else. */
enum inject_obstacle inject_close(pid_t pid, int number, int fd, int64_t wait_ns,
                                  struct injection *injection);

#endif
