/* Processes that a userfaultfd cannot be had from, or not at once: why, and that they go on. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>

#include "inject_children.h"
#include "seccomp_filter.h"

static enum inject_obstacle try_for(pid_t pid, int64_t wait_ns)
{
    struct injection injection;
    enum inject_obstacle obstacle = inject_userfaultfd(pid, UFFD_USER_MODE_ONLY_FLAG, 0, wait_ns,
                                                       &injection);

    CHECK((injection.uffd >= 0) == (obstacle == INJECT_DONE));
    if (injection.uffd >= 0)
        close(injection.uffd);
    return obstacle;
}

/* A child that does what `act` says and then waits. */
static pid_t start_waiting(void (*act)(void))
{
    const pid_t parent = getpid();
    int ends[2];
    uint8_t byte;
    pid_t pid;

    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    pid = fork();
    if (pid == 0) {
        die_with(parent);
        act();
        if (write(ends[1], "!", 1) == 1)
            for (;;)
                pause();
        _exit(1);
    }
    close(ends[1]);
    CHECK(read(ends[0], &byte, 1) == 1);
    close(ends[0]);
    return pid;
}

static void reap(pid_t pid)
{
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid);
}

static void filter(uint32_t verdict)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, verdict),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof steps / sizeof steps[0], steps};

    /* All threads: a sanitizer has one of its own, through which a userfaultfd could be had. */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0)
        _exit(1);
}

static void forbid(void) { filter(SECCOMP_RET_KILL_PROCESS); }
static void allow(void) { filter(SECCOMP_RET_ALLOW); }
static void nothing(void) {}
static void hide(void) { prctl(PR_SET_DUMPABLE, 0); }

static void test_filters(void)
{
    pid_t pid = start_waiting(forbid);

    CHECK(try_for(pid, WAIT_NS) == INJECT_FILTERED);
    CHECK(kill(pid, 0) == 0 && waitpid(pid, NULL, WNOHANG) == 0);
    reap(pid);
    pid = start_waiting(allow);
    CHECK(try_for(pid, WAIT_NS) == (geteuid() == 0 ? INJECT_DONE : INJECT_FILTERED));
    reap(pid);
}

static void test_traced_by_another(void)
{
    pid_t pid = start_waiting(nothing);

    CHECK(ptrace(PTRACE_SEIZE, pid, NULL, NULL) == 0);
    CHECK(try_for(pid, WAIT_NS) == INJECT_TRACED);
    reap(pid);
}

static void test_gone(void)
{
    pid_t pid = start_waiting(nothing);

    kill(pid, SIGKILL);
    CHECK(waitid(P_PID, (id_t)pid, &(siginfo_t){0}, WEXITED | WNOWAIT) == 0);
    CHECK(try_for(pid, WAIT_NS) == INJECT_GONE); /* not reaped yet */
    reap(pid);
    CHECK(try_for(pid, WAIT_NS) == INJECT_GONE);
}

/* A process that never waits is taken in mid-computation where that loses nothing. */
static void test_never_waits(void)
{
    const pid_t parent = getpid();
    _Atomic uint32_t *rounds =
        mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pid = fork();

    if (pid == 0) {
        die_with(parent);
        for (double sum = 0;; sum = 0) {
            for (int i = 1; i <= 64; ++i)
                sum += (double)i;
            if (sum != 2080.0)
                _exit(1);
            ++*rounds;
        }
    }
    await_more(rounds, 0);
    for (unsigned i = 0; i < 50; ++i) {
#if defined(__x86_64__)
        CHECK(try_for(pid, WAIT_NS) == INJECT_DONE);
        run_and_kill(pid, i * 4);
#else
        CHECK(try_for(pid, 100000000) == INJECT_NO_SAFE_THREAD);
#endif
        CHECK(!is_traced(pid));
        await_more(rounds, *rounds);
    }
    reap(pid);
    munmap((void *)(uintptr_t)rounds, PAGE);
}

/* Stopped by a signal, as a paused process is: it can be used, and stays stopped. */
static void test_stopped(void)
{
    pid_t pid = start_waiting(nothing);
    int status;

    kill(pid, SIGSTOP);
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    CHECK(try_for(pid, WAIT_NS) == INJECT_DONE);
    for (const int64_t deadline_ns = now_ns() + WAIT_NS; status_of(pid, "State") != 'T';)
        CHECK(now_ns() < deadline_ns);
    kill(pid, SIGCONT);
    reap(pid);
}

/* Another user's process: asked by a child that gives its rights up. */
static void test_not_allowed(void)
{
    pid_t pid = start_waiting(hide), asker;
    int status;

    if (geteuid() == 0) {
        asker = fork();
        if (asker == 0) {
            if (setgid(65534) != 0 || setuid(65534) != 0)
                _exit(100);
            _exit((int)try_for(pid, WAIT_NS));
        }
        CHECK(waitpid(asker, &status, 0) == asker);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == INJECT_NOT_ALLOWED);
    }
    reap(pid);
}

static void test_filter_programs(void)
{
    const struct seccomp_data call = {.nr = 7, .args = {0x500000003}};
    const struct sock_filter by_argument[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 2),
        BPF_STMT(BPF_ST, 3),
        BPF_STMT(BPF_LDX | BPF_MEM, 3),
        BPF_STMT(BPF_MISC | BPF_TXA, 0),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 2, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_filter endless[] = {BPF_STMT(BPF_LD | BPF_IMM, 1)};
    const struct sock_filter outside[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 64)};

    CHECK(seccomp_filter_run(by_argument, 8, &call) == SECCOMP_RET_ALLOW);
    CHECK(seccomp_filter_run(endless, 1, &call) == SECCOMP_RET_KILL_PROCESS);
    CHECK(seccomp_filter_run(outside, 1, &call) == SECCOMP_RET_KILL_PROCESS);
}

int main(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY_FLAG);

    if (uffd < 0)
        return SKIPPED;
    close(uffd);
    test_filter_programs();
    test_filters();
    test_traced_by_another();
    test_gone();
    test_never_waits();
    test_stopped();
    test_not_allowed();
    return 0;
}
