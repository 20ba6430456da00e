#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "inject_frame.h"
#include "inject_target.h"
#include "inject_thread.h"
#include "seccomp_filter.h"

#define SIGNAL_SET_BYTES ((void *)8)
#define GET_SIGNAL_MASK 0x420a /* PTRACE_GETSIGMASK, Linux 3.11 */
#define RETRY_NS 1000000 /* between two tries */
#define STUCK_MAX 16 /* threads that were waited for in vain; each costs THREAD_WAIT_NS */

struct job {
    pid_t pid;
    int flags, pidfd;
    int keeps; /* what is opened stays open there */
    uint64_t deadline_ns;
    struct frame_code code;
    struct injection *result;
    enum inject_obstacle obstacle;
    pid_t stuck[STUCK_MAX]; /* did not stop, and are left alone from then on */
    int stuck_count;
};

/* A thread that we hold. */
struct held {
    pid_t thread;
    frame_registers registers; /* as it was when it stopped */
    struct frame frame;
    uint8_t below[FRAME_BYTES_MAX]; /* what was where the frame is */
    int is_frame_written;
};

/* How one try with one thread ended. */
enum outcome {
    OUTCOME_DONE,
    OUTCOME_AGAIN, /* let go before anything was to be had; another thread or time may do */
    OUTCOME_STUCK, /* it does not stop; only the end of our thread ends the tracing */
    OUTCOME_OBSTACLE,
};

static enum outcome obstacle(struct job *job, enum inject_obstacle what, int error)
{
    job->obstacle = what;
    job->result->error = error;
    return OUTCOME_OBSTACLE;
}

/* -- leaving --------------------------------------------------------------------------------------- */

/* Give the thread its registers back, then, when nothing leads through the frame any more, what was
 * below its stack; let it go on with `signal_number`. */
static void let_go(const struct held *held, const frame_registers *registers, int signal_number)
{
    if (held->is_frame_written && thread_write_registers(held->thread, registers) == 0)
        target_write(held->thread, held->frame.address, held->below, held->frame.size);
    ptrace(PTRACE_DETACH, held->thread, NULL, (void *)(uintptr_t)signal_number);
}

/* It did something else than our call. At a signal the kernel is about to look whether an interrupted
 * call begins anew: with the thread's own registers it decides as if we were not here. */
static enum outcome give_up(struct job *job, const struct held *held, enum thread_stop stop,
                            int signal_number)
{
    switch (stop) {
    case STOP_SIGNAL:
        let_go(held, &held->registers, signal_number);
        return OUTCOME_AGAIN;
    case STOP_END:
        return OUTCOME_AGAIN; /* the thread only, perhaps */
    default: /* detached when our thread ends; the frame brings it back */
        return obstacle(job, INJECT_NO_SAFE_THREAD, ETIMEDOUT);
    }
}

/* -- one call -------------------------------------------------------------------------------------- */

static enum outcome call(struct job *job, const struct held *held, long number, uint64_t argument,
                         int64_t *result)
{
    frame_registers registers =
        frame_call(&held->registers, &job->code, held->frame.address, number, argument);
    int rc = thread_write_registers(held->thread, &registers), signal_number = 0;
    size_t size;

    if (rc < 0)
        return obstacle(job, INJECT_FAILED, -rc); /* it was killed */
    for (int is_after = 0; is_after <= 1; ++is_after) {
        enum thread_stop stop = thread_go_on(held->thread, &signal_number);

        if (stop != STOP_CALL)
            return give_up(job, held, stop, signal_number);
        rc = thread_read_registers(held->thread, &registers, &size);
        if (rc < 0 || !frame_is_our_call(&registers, &job->code))
            return obstacle(job, INJECT_FAILED, rc < 0 ? -rc : EPROTO);
    }
    *result = frame_result(&registers);
    return OUTCOME_DONE;
}

static enum inject_obstacle meaning_of(int error)
{
    return error == ENOSYS || error == EINVAL ? INJECT_TOO_OLD : INJECT_REFUSED;
}

/* Have it opened and fetch it. The thread stays held, unless this fails. */
static enum outcome fetch(struct job *job, const struct held *held)
{
    int64_t number;
    int fd;
    enum outcome outcome = call(job, held, SYS_userfaultfd,
                                (uint64_t)(job->flags | O_CLOEXEC | O_NONBLOCK), &number);

    if (outcome != OUTCOME_DONE)
        return outcome;
    if (number < 0)
        return obstacle(job, meaning_of((int)-number), (int)-number);
    job->result->left_open = (int)number;
    fd = (int)syscall(SYS_pidfd_getfd, job->pidfd, (int)number, 0);
    if (fd < 0)
        return obstacle(job, errno == ENOSYS ? INJECT_TOO_OLD : INJECT_FAILED, errno);
    job->result->uffd = fd;
    return OUTCOME_DONE;
}

static enum outcome close_there(struct job *job, const struct held *held)
{
    int64_t result;
    enum outcome outcome = call(job, held, SYS_close, (uint64_t)job->result->left_open, &result);

    if (outcome == OUTCOME_DONE)
        job->result->left_open = -1;
    return outcome;
}

/* -- one thread ------------------------------------------------------------------------------------ */

static enum outcome check_filters(struct job *job, pid_t thread)
{
    static const long NUMBERS[] = {SYS_userfaultfd, SYS_close, SYS_rt_sigreturn};
    const uint64_t arguments[] = {(uint64_t)(job->flags | O_CLOEXEC | O_NONBLOCK), 0, 0};
    int mode = seccomp_mode(thread);

    if (mode <= 0)
        return OUTCOME_DONE;
    for (size_t i = 0; i < sizeof NUMBERS / sizeof NUMBERS[0]; ++i) {
        int allows = seccomp_allows(thread, NUMBERS[i], arguments[i], job->code.call);

        if (allows != 1)
            return obstacle(job, INJECT_FILTERED, allows < 0 ? -allows : 0);
    }
    return OUTCOME_DONE;
}

/* Whether the stopped thread can be used; lays the frame if it can. */
static enum outcome prepare(struct job *job, struct held *held)
{
    uint64_t signal_mask = 0;
    enum outcome outcome;
    size_t size = 0;
    int rc = thread_read_registers(held->thread, &held->registers, &size);

    if (rc < 0)
        return OUTCOME_AGAIN;
    if (!frame_mode_is_ours(&held->registers, size))
        return obstacle(job, INJECT_NOT_64_BIT, 0);
    if (frame_has_shadow_stack(held->thread))
        return obstacle(job, INJECT_SHADOW_STACK, 0);
    if (!frame_is_at_rest(held->thread, &held->registers))
        return OUTCOME_AGAIN;
    outcome = check_filters(job, held->thread);
    if (outcome != OUTCOME_DONE)
        return outcome;
    if (ptrace(GET_SIGNAL_MASK, held->thread, SIGNAL_SET_BYTES, &signal_mask) < 0)
        return obstacle(job, INJECT_TOO_OLD, errno);
    rc = frame_build(held->thread, &held->registers, signal_mask, &job->code, &held->frame);
    if (rc < 0)
        return obstacle(job, INJECT_FAILED, -rc);
    if (target_is_stack(job->pid, held->frame.address, frame_stack(&held->registers)) != 1)
        return OUTCOME_AGAIN;
    if (target_read(held->thread, held->frame.address, held->below, held->frame.size) < 0 ||
        target_write(held->thread, held->frame.address, held->frame.bytes, held->frame.size) < 0)
        return OUTCOME_AGAIN;
    held->is_frame_written = 1;
    return OUTCOME_DONE;
}

/* Do what is left to do with a thread that stands; it is let go in every case. */
static enum outcome use(struct job *job, struct held *held)
{
    enum outcome outcome = prepare(job, held);
    frame_registers resumed;

    if (outcome != OUTCOME_DONE) {
        let_go(held, &held->registers, 0);
        return outcome;
    }
    if (job->result->uffd < 0)
        outcome = fetch(job, held);
    if (outcome == OUTCOME_AGAIN)
        return outcome; /* let go already */
    if (job->result->left_open >= 0 && !(job->keeps && job->result->uffd >= 0) &&
        close_there(job, held) == OUTCOME_AGAIN)
        return outcome == OUTCOME_DONE ? OUTCOME_AGAIN : outcome; /* here, too */
    resumed = frame_resumed(&held->registers);
    let_go(held, &resumed, 0);
    return outcome;
}

/* Stop the thread; signals that come before are passed on. */
static enum outcome stop_thread(struct job *job, pid_t thread)
{
    int signal_number;

    if (ptrace(PTRACE_SEIZE, thread, NULL, (void *)(uintptr_t)PTRACE_O_TRACESYSGOOD) < 0) {
        int error = errno;

        if (error == ESRCH)
            return OUTCOME_AGAIN;
        return obstacle(job, target_tracer(thread) > 0 ? INJECT_TRACED : INJECT_NOT_ALLOWED, error);
    }
    if (ptrace(PTRACE_INTERRUPT, thread, NULL, NULL) < 0)
        return OUTCOME_AGAIN;
    for (;;) {
        enum thread_stop stop = thread_wait(thread, &signal_number);

        if (stop == STOP_TRAP)
            return OUTCOME_DONE;
        if (stop == STOP_END)
            return OUTCOME_AGAIN;
        if (stop == STOP_NONE) {
            job->stuck[job->stuck_count++] = thread;
            return OUTCOME_STUCK;
        }
        ptrace(PTRACE_CONT, thread, NULL, (void *)(uintptr_t)signal_number);
    }
}

static enum outcome try_thread(struct job *job, pid_t thread, struct held *held)
{
    const uint64_t began_ns = monotonic_ns();
    enum outcome outcome;
    int64_t stood_ns;

    held->thread = thread;
    held->is_frame_written = 0;
    ++job->result->attempts;
    job->result->thread = thread;
    outcome = stop_thread(job, thread);
    if (outcome != OUTCOME_DONE)
        return outcome;
    outcome = use(job, held);
    stood_ns = (int64_t)(monotonic_ns() - began_ns);
    if (stood_ns > job->result->stopped_ns)
        job->result->stopped_ns = stood_ns;
    return outcome;
}

/* -- all ------------------------------------------------------------------------------------------- */

/* A descriptor that a former try left: only if nobody has put another one in its place. */
static int may_close(const struct job *job)
{
    const struct injection *result = job->result;

    return result->left_open >= 0 &&
           target_has_descriptor(job->pid, result->left_open, result->uffd) == 1;
}

static int is_stuck(const struct job *job, pid_t thread)
{
    for (int i = 0; i < job->stuck_count; ++i)
        if (job->stuck[i] == thread)
            return 1;
    return target_is_uninterruptible(job->pid, thread);
}

/* Try one thread after the other, once each. */
static enum outcome try_all(struct job *job, pid_t *threads, struct held *held)
{
    int count = target_threads(job->pid, threads, TARGET_THREADS_MAX);

    if (count == -ESRCH)
        return obstacle(job, INJECT_GONE, 0);
    if (count < 0)
        return obstacle(job, INJECT_NOT_ALLOWED, -count);
    for (int i = 0; i < count; ++i) {
        enum outcome outcome;

        if (job->result->uffd >= 0 && !may_close(job))
            return OUTCOME_DONE;
        if (is_stuck(job, threads[i]))
            continue;
        outcome = try_thread(job, threads[i], held);
        if (outcome != OUTCOME_AGAIN)
            return outcome;
    }
    return OUTCOME_AGAIN;
}

static enum inject_obstacle meaning_of_search(int rc)
{
    switch (rc) {
    case -ENOENT: return INJECT_NO_CODE;
    case -ENOEXEC: return INJECT_NOT_64_BIT;
    case -EACCES:
    case -EPERM: return INJECT_NOT_ALLOWED;
    default: return INJECT_FAILED;
    }
}

static void inject(struct job *job)
{
    struct held *held = aligned_alloc(64, (sizeof *held + 63) / 64 * 64);
    pid_t *threads = malloc(TARGET_THREADS_MAX * sizeof *threads);
    enum outcome outcome = OUTCOME_AGAIN;
    int rc = target_find_code(job->pid, &job->code);

    if (!held || !threads)
        obstacle(job, INJECT_FAILED, ENOMEM);
    else if (rc < 0)
        obstacle(job, meaning_of_search(rc), -rc);
    else {
        obstacle(job, INJECT_NO_SAFE_THREAD, 0);
        while ((outcome = try_all(job, threads, held)) == OUTCOME_AGAIN &&
               monotonic_ns() < job->deadline_ns)
            nanosleep(&(struct timespec){0, RETRY_NS}, NULL);
    }
    if (outcome == OUTCOME_DONE || job->result->uffd >= 0)
        obstacle(job, INJECT_DONE, 0);
    free(threads);
    free(held);
}

/* Where it is allowed, no busy processor shall make the stop long. */
static void be_prompt(void)
{
    pthread_setschedparam(pthread_self(), SCHED_RR, &(struct sched_param){.sched_priority = 1});
    prctl(PR_SET_TIMERSLACK, 1);
}

static void *inject_in_thread(void *job)
{
    be_prompt();
    inject(job);
    return NULL;
}

/* A thread that would not stop, for a disk or a network does not answer it, is let go with ours, and
 * another one of ours goes on with the others. */
static void inject_in_threads(struct job *job)
{
    int stuck_before;

    do {
        pthread_t thread;
        int error;

        stuck_before = job->stuck_count;
        error = pthread_create(&thread, NULL, inject_in_thread, job);
        if (error) {
            obstacle(job, INJECT_FAILED, error);
            return;
        }
        pthread_join(thread, NULL);
    } while (job->stuck_count > stuck_before && job->stuck_count < STUCK_MAX &&
             monotonic_ns() < job->deadline_ns);
}

static int has_ended(int pidfd)
{
    return poll(&(struct pollfd){.fd = pidfd, .events = POLLIN}, 1, 0) > 0;
}

static enum inject_obstacle run(struct job *job)
{
    job->pidfd = (int)syscall(SYS_pidfd_open, job->pid, 0);
    if (job->pidfd < 0) {
        job->result->error = errno;
        return errno == ESRCH || errno == EINVAL ? INJECT_GONE
               : errno == ENOSYS                 ? INJECT_TOO_OLD
                                                 : INJECT_FAILED;
    }
    if (target_tracer(job->pid) > 0)
        obstacle(job, INJECT_TRACED, 0);
    else
        inject_in_threads(job);
    if (job->obstacle != INJECT_DONE && has_ended(job->pidfd))
        obstacle(job, INJECT_GONE, 0);
    close(job->pidfd);
    return job->obstacle;
}

enum inject_obstacle inject_userfaultfd(pid_t pid, int flags, int keeps, int64_t wait_ns,
                                        struct injection *injection)
{
    struct job job = {.pid = pid, .flags = flags, .keeps = keeps,
                      .deadline_ns = monotonic_ns() + (uint64_t)wait_ns, .result = injection};

    *injection = (struct injection){.uffd = -1, .left_open = -1};
    return run(&job);
}

enum inject_obstacle inject_close(pid_t pid, int number, int fd, int64_t wait_ns,
                                  struct injection *injection)
{
    struct job job = {.pid = pid, .deadline_ns = monotonic_ns() + (uint64_t)wait_ns, .result = injection};

    *injection = (struct injection){.uffd = fd, .left_open = number};
    return run(&job);
}
