/* Would a thread's seccomp filters let it make a system call? */
#ifndef RAMFERRY_SECCOMP_FILTER_H
#define RAMFERRY_SECCOMP_FILTER_H

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Run one filter (classic BPF, as seccomp takes it); what it returns. A program that is not one
 * kills, as the kernel would have refused it. */
uint32_t seccomp_filter_run(const struct sock_filter *program, size_t count,
                            const struct seccomp_data *call);

/* Whether all filters of the thread, which we trace and which is stopped, allow the call. 1, 0, or
 * -errno when they cannot be read (reading takes CAP_SYS_ADMIN). */
int seccomp_allows(pid_t thread, long number, uint64_t argument, uint64_t instruction);

/* What /proc says: 0 none, 1 strict, 2 filters; -errno. */
int seccomp_mode(pid_t thread);

#endif
