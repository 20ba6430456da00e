/* Children of the tests of injections: they end with the test, tell of themselves in /proc, and one of them
 * is an injector that is killed at a system call of its own. */
#ifndef RAMFERRY_INJECT_CHILDREN_H
#define RAMFERRY_INJECT_CHILDREN_H

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "inject.h"
#include "linux_abi.h"

#define GET_SYSCALL_INFO 0x420e /* PTRACE_GET_SYSCALL_INFO, a name that old headers lack */
#define PAGE ((size_t)4096)
#define WAIT_NS INT64_C(20000000000) /* also on a machine that others keep busy */
#define ANSWER_WAIT_MS 60000

/* In a child: do not outlive the test. */
static inline void die_with(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

static inline int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void await_more(const _Atomic uint32_t *counter, uint32_t than)
{
    const int64_t deadline_ns = now_ns() + (int64_t)ANSWER_WAIT_MS * 1000000;

    while (*counter == than) {
        CHECK(now_ns() < deadline_ns);
        nanosleep(&(struct timespec){0, 20000}, NULL);
    }
}

/* A number, or the first letter, that /proc/PID/status has after `name`. */
static inline int status_of(pid_t pid, const char *name)
{
    char path[64], line[256];
    int value = -1;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    status = fopen(path, "re");
    CHECK(status != NULL);
    while (fgets(line, sizeof line, status))
        if (strncmp(line, name, strlen(name)) == 0) {
            const char *text = line + strlen(name) + strspn(line + strlen(name), ":\t ");

            value = *text >= 'A' ? *text : atoi(text);
        }
    fclose(status);
    return value;
}

static inline int is_traced(pid_t pid)
{
    return status_of(pid, "TracerPid") != 0;
}

static inline pid_t start_injector(pid_t pid, int go)
{
    const pid_t parent = getpid();
    pid_t injector = fork();

    if (injector == 0) {
        struct injection injection;
        uint8_t byte;

        die_with(parent);
        if (read(go, &byte, 1) != 1)
            _exit(2);
        _exit(inject_userfaultfd(pid, UFFD_USER_MODE_ONLY_FLAG, 0, WAIT_NS, &injection) ==
                      INJECT_DONE ? 0 : 1);
    }
    return injector;
}

/* Whether the thread, at a stop before or after a system call, looks again and again whether another
 * one has stopped: how often it does that depends on how busy the machine is. */
static inline int is_look(pid_t thread, int was_look)
{
    uint64_t info[16] = {0}; /* struct ptrace_syscall_info: the first byte says what is told */

    ptrace(GET_SYSCALL_INFO, thread, (void *)sizeof info, info);
    if ((uint8_t)info[0] != 1) /* behind the call */
        return was_look;
    return info[3] == SYS_wait4 || info[3] == SYS_nanosleep || info[3] == SYS_clock_nanosleep;
}

/* Run an injector and kill it at the stop before or after its `calls`th system call, in whatever
 * thread, looks one after the other being one call; whether it was killed. */
static inline int run_and_kill(pid_t pid, unsigned calls)
{
    const long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
    int go[2], status, is_killed = 0, looks = 0;
    pid_t injector, thread;

    CHECK(pipe2(go, O_CLOEXEC) == 0);
    injector = start_injector(pid, go[0]);
    CHECK(ptrace(PTRACE_SEIZE, injector, NULL, (void *)options) == 0);
    CHECK(ptrace(PTRACE_INTERRUPT, injector, NULL, NULL) == 0);
    CHECK(write(go[1], "!", 1) == 1);
    while ((thread = waitpid(-1, &status, __WALL)) > 0) {
        int pass = 0;

        if (!WIFSTOPPED(status)) {
            if (thread == injector)
                break;
            continue;
        }
        if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
            const int looked = looks;

            looks = is_look(thread, looked);
            if (!(looked && looks) && calls-- == 0) {
                kill(injector, SIGKILL);
                is_killed = 1;
                continue;
            }
        } else if (status >> 16 == 0)
            pass = WSTOPSIG(status);
        ptrace(PTRACE_SYSCALL, thread, NULL, (void *)(intptr_t)pass);
    }
    CHECK(thread == injector);
    CHECK(is_killed ? WIFSIGNALED(status) : WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close(go[0]);
    close(go[1]);
    return is_killed;
}

#endif
