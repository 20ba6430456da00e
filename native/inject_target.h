/* What /proc tells the injector of a process: its threads, its code, its stacks. */
#ifndef RAMFERRY_INJECT_TARGET_H
#define RAMFERRY_INJECT_TARGET_H

#include "inject_frame.h"

#define TARGET_THREADS_MAX ((size_t)4096)

/* Find both instructions in the process's code: its C library first. 0, -ENOENT when it has none,
 * -ENOEXEC for a 32-bit program, or -errno. */
int target_find_code(pid_t pid, struct frame_code *code);

/* List the threads: those that wait in a system call, the first of the process before others, and then
 * the rest; a thread may have gone on when this returns. Their count, or -errno. */
int target_threads(pid_t pid, pid_t *threads, size_t threads_max);

/* Whether the thread is in the kernel and can not be stopped now: it waits for a disk, say. 1 or 0. */
int target_is_uninterruptible(pid_t pid, pid_t thread);

/* Whether [low, high) is within one stack that ends in a guard: below it is nobody's memory. The
 * stack of a handler or a coroutine may have something below it that is in use. 1, 0, -errno. */
int target_is_stack(pid_t pid, uint64_t low, uint64_t high);

/* Copy from and to the process's memory, as its own instructions could. 0 or -errno. */
int target_read(pid_t pid, uint64_t address, void *bytes, size_t size);
int target_write(pid_t pid, uint64_t address, const void *bytes, size_t size);

/* Who traces the thread: a process id, 0, or -errno. */
int target_tracer(pid_t thread);

/* Whether descriptor `number` of the process is our `fd`. 1, 0, -errno. */
int target_has_descriptor(pid_t pid, int number, int fd);

#endif
