/* A userfaultfd from a process that knows nothing of it, and that lives on whatever becomes of us. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>

#include "inject_children.h"

#define RAM_PAGES ((size_t)64)
#define STOP_NS_MAX INT64_C(1000000000) /* what is typical is printed; this only tells nonsense */

/* -- the target: waits in one kind of call at a time, and looks at itself after each ------------- */

enum kind { KIND_PPOLL, KIND_POLL, KIND_READ, KIND_FUTEX, KIND_COUNT };

struct shared {
    _Atomic uint32_t request, answer; /* numbers of questions */
    _Atomic uint32_t kind;
    _Atomic uint32_t wrong;      /* what the target found wrong about itself, or 0 */
    _Atomic uint32_t computing;  /* rounds of a thread that makes no calls */
    _Atomic uint32_t sleeps;     /* of a thread that sleeps again and again */
    _Atomic uint32_t signals;
};

struct target {
    pid_t pid;
    int questions; /* a byte each */
    struct shared *shared;
    uint8_t *ram; /* the same address there and here */
};

static struct shared *own; /* in the target */

static long call_plainly(long number, long a, long b, long c, long d)
{
    long result = syscall(number, a, b, c, d);

    return result < 0 ? -errno : result;
}

#if defined(__x86_64__)
struct registers {
    uint64_t general[13]; /* rbx rbp r12 r13 r14 r15 rdi rsi rdx r10 r8 r9 flags */
    uint64_t padding[3];
    uint8_t before[16 * 32], after[16 * 32]; /* ymm0 to ymm15 */
};

#define EACH_VECTOR(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) \
                        DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#define LOAD(i) "vmovdqu 128+32*" #i "(%r9), %ymm" #i "\n"
#define STORE(i) "vmovdqu %ymm" #i ", 640+32*" #i "(%rcx)\n"

long call_with_registers(long number, long a, long b, long c, long d, struct registers *registers);
__asm__(".text\n"
        "call_with_registers:\n"
        "push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n push %r9\n"
        "mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n mov %r8, %r10\n"
        EACH_VECTOR(LOAD)
        "mov $0x1111111122222222, %rbx\n"
        "mov $0x3333333344444444, %rbp\n"
        "mov $0x5555555566666666, %r12\n"
        "mov $0x7777777788888888, %r13\n"
        "mov $0x99999999aaaaaaaa, %r14\n"
        "mov $0xbbbbbbbbcccccccc, %r15\n"
        "mov $0xddddddddeeeeeeee, %r8\n"
        "std\n"
        "syscall\n"
        "pushfq\n"
        "cld\n"
        "mov 8(%rsp), %rcx\n"
        "mov %rbx, (%rcx)\n mov %rbp, 8(%rcx)\n mov %r12, 16(%rcx)\n mov %r13, 24(%rcx)\n"
        "mov %r14, 32(%rcx)\n mov %r15, 40(%rcx)\n mov %rdi, 48(%rcx)\n mov %rsi, 56(%rcx)\n"
        "mov %rdx, 64(%rcx)\n mov %r10, 72(%rcx)\n mov %r8, 80(%rcx)\n mov %r9, 88(%rcx)\n"
        "pop 96(%rcx)\n"
        EACH_VECTOR(STORE)
        "vzeroupper\n"
        "pop %r9\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
        "ret\n");

/* Make the call with a value in every register, and look at all of them afterwards. */
static long call_checked(long number, long a, long b, long c, long d)
{
    struct registers registers;
    const uint64_t expected[12] = {0x1111111122222222, 0x3333333344444444, 0x5555555566666666,
                                   0x7777777788888888, 0x99999999aaaaaaaa, 0xbbbbbbbbcccccccc,
                                   (uint64_t)a,        (uint64_t)b,        (uint64_t)c,
                                   (uint64_t)d,        0xddddddddeeeeeeee, (uintptr_t)&registers};
    long result;

    if (!__builtin_cpu_supports("avx"))
        return call_plainly(number, a, b, c, d);
    for (size_t i = 0; i < sizeof registers.before; ++i)
        registers.before[i] = (uint8_t)(i * 7 + (uint8_t)number);
    result = call_with_registers(number, a, b, c, d, &registers);
    if (memcmp(registers.general, expected, sizeof expected) != 0 ||
        !(registers.general[12] & 0x400))
        own->wrong = 1;
    if (memcmp(registers.before, registers.after, sizeof registers.before) != 0)
        own->wrong = 2;
    return result;
}
#else
static long call_checked(long number, long a, long b, long c, long d)
{
    return call_plainly(number, a, b, c, d);
}
#endif

static void *compute(void *nothing)
{
    double sum = 0;

    (void)nothing;
    for (uint64_t x = 1;; ++x) {
        sum = 0;
        for (int i = 1; i <= 64; ++i)
            sum += (double)i;
        if (sum != 2080.0)
            own->wrong = 3;
        ++own->computing;
    }
    return NULL;
}

static void *sleep_often(void *nothing)
{
    (void)nothing;
    for (;;) {
        struct timespec time = {0, 2000000};

        if (call_checked(SYS_nanosleep, (long)&time, 0, 0, 0) != 0)
            own->wrong = 4;
        ++own->sleeps;
    }
    return NULL;
}

__attribute__((no_sanitize("thread"))) static void count_signal(int number)
{
    (void)number;
    ++own->signals;
}

/* A handler that the kernel calls. The thread sanitizer's own, which stands before those of sigaction(),
 * may put a signal off until the thread next calls the C library, and this one's threads do not. */
static void handle_at_once(int number, void (*handler)(int))
{
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        uint64_t mask;
    } action;

    sigaction(number, &(struct sigaction){.sa_handler = handler, .sa_flags = SA_ONSTACK}, NULL);
    CHECK(syscall(SYS_rt_sigaction, number, NULL, &action, sizeof action.mask) == 0);
    action.handler = handler;
    action.flags &= ~(unsigned long)SA_SIGINFO;
    CHECK(syscall(SYS_rt_sigaction, number, &action, NULL, sizeof action.mask) == 0);
}

/* The signal mask and alternate stack that the main thread gave itself. */
static void look_at_signals(const stack_t *stack)
{
    sigset_t mask;
    stack_t now;

    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    sigaltstack(NULL, &now);
    if (!sigismember(&mask, SIGUSR2) || sigismember(&mask, SIGUSR1) || now.ss_sp != stack->ss_sp)
        own->wrong = 5;
}

/* Wait for a question in the kind of call that is wanted. */
static void await_question(int questions)
{
    struct pollfd pollfd = {.fd = questions, .events = POLLIN};
    struct timespec time = {3600, 0};
    uint8_t byte;
    long rc;

    switch ((enum kind)own->kind) {
    case KIND_PPOLL: /* may begin anew, or end early by a signal of the target's own */
        rc = call_checked(SYS_ppoll, (long)&pollfd, 1, (long)&time, 0);
        break;
#if defined(SYS_poll)
    case KIND_POLL:
        rc = call_checked(SYS_poll, (long)&pollfd, 1, 3600000, 0);
        break;
#endif
    case KIND_FUTEX: /* questions come by a byte, too */
        rc = call_checked(SYS_futex, (long)&own->request, FUTEX_WAIT, (long)own->answer,
                          (long)&time);
        rc = rc == 0 || rc == -EAGAIN ? 1 : rc;
        break;
    default:
        rc = 1;
    }
    if (rc != 1 && !(rc == -EINTR && own->signals > 0))
        own->wrong = 6;
    do
        rc = call_checked(SYS_read, questions, (long)&byte, 1, 0);
    while (rc == -EINTR && own->signals > 0);
    if (rc != 1)
        own->wrong = 7;
}

static void serve(int questions, uint8_t *ram)
{
    static uint8_t alternate[64 * 1024];
    const stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    pthread_t thread;
    sigset_t blocked;

    sigaltstack(&stack, NULL);
    handle_at_once(SIGALRM, count_signal);
    pthread_create(&thread, NULL, compute, NULL);
    pthread_create(&thread, NULL, sleep_often, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    for (uint32_t round = 1;; ++round) {
        volatile uint8_t deep[4096]; /* what is below the stack has been used */

        memset((void *)(uintptr_t)deep, 0xa5, sizeof deep);
        await_question(questions);
        look_at_signals(&stack);
        ram[(round * 5 % RAM_PAGES) * PAGE] = (uint8_t)round;
        own->answer = round;
    }
}

static struct target start(void)
{
    const pid_t parent = getpid();
    struct target target;
    int ends[2];
    const int rights = PROT_READ | PROT_WRITE;

    target.shared = mmap(NULL, PAGE, rights, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    target.ram = mmap(NULL, RAM_PAGES * PAGE, rights, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    target.questions = ends[1];
    target.pid = fork();
    if (target.pid == 0) {
        die_with(parent);
        close(ends[1]);
        own = target.shared;
        serve(ends[0], target.ram);
    }
    close(ends[0]);
    return target;
}

static void end(struct target *target)
{
    kill(target->pid, SIGKILL);
    CHECK(waitpid(target->pid, NULL, 0) == target->pid);
    close(target->questions);
    munmap(target->shared, PAGE);
    munmap(target->ram, RAM_PAGES * PAGE);
}

/* Ask, and have every thread tell that it goes on and found nothing wrong. */
static void check_lives(struct target *target)
{
    const uint32_t answer = target->shared->answer, computing = target->shared->computing;
    const uint32_t sleeps = target->shared->sleeps;

    ++target->shared->request;
    CHECK(write(target->questions, "?", 1) == 1);
    syscall(SYS_futex, &target->shared->request, FUTEX_WAKE, 1, NULL);
    await_more(&target->shared->answer, answer);
    await_more(&target->shared->computing, computing);
    await_more(&target->shared->sleeps, sleeps);
    CHECK(target->shared->wrong == 0);
}

/* Have it wait in the next kind of call. */
static void change_kind(struct target *target, enum kind kind)
{
    target->shared->kind = kind;
    check_lives(target);
}

static int count_descriptors(pid_t pid)
{
    char path[64];
    int count = 0;
    DIR *directory;

    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    directory = opendir(path);
    CHECK(directory != NULL);
    while (readdir(directory))
        ++count;
    closedir(directory);
    return count;
}

/* -- tests ------------------------------------------------------------------------------------------ */

static void test_writes_are_seen(struct target *target)
{
    struct injection injection;
    const int before = count_descriptors(target->pid);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register range = {.range = {(uintptr_t)target->ram, RAM_PAGES * PAGE},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    uint8_t page[PAGE];
    struct uffd_msg fault;

    CHECK(inject_userfaultfd(target->pid, 0, 0, WAIT_NS, &injection) == INJECT_DONE);
    CHECK(injection.uffd >= 0 && injection.left_open == -1);
    CHECK(injection.stopped_ns > 0);
    CHECK(count_descriptors(target->pid) == before);
    CHECK(ioctl(injection.uffd, UFFDIO_API, &api) == 0);
    CHECK(ioctl(injection.uffd, UFFDIO_REGISTER, &range) == 0);
    CHECK(write(target->questions, "?", 1) == 1);
    ++target->shared->request;
    syscall(SYS_futex, &target->shared->request, FUTEX_WAKE, 1, NULL);
    CHECK(poll(&(struct pollfd){.fd = injection.uffd, .events = POLLIN}, 1, ANSWER_WAIT_MS) == 1);
    CHECK(read(injection.uffd, &fault, sizeof fault) == sizeof fault);
    CHECK(fault.event == UFFD_EVENT_PAGEFAULT);
    memset(page, 0x5c, sizeof page);
    CHECK(ioctl(injection.uffd, UFFDIO_COPY,
                &(struct uffdio_copy){.dst = fault.arg.pagefault.address & ~(uint64_t)(PAGE - 1),
                                      .src = (uintptr_t)page, .len = PAGE}) == 0);
    await_more(&target->shared->answer, 0);
    CHECK(target->ram[(fault.arg.pagefault.address - (uintptr_t)target->ram) / PAGE * PAGE + 1] ==
          0x5c);
    close(injection.uffd); /* the last one: nothing is registered any more */
    check_lives(target);
}

static int compare(const void *a, const void *b)
{
    return *(const int64_t *)a < *(const int64_t *)b ? -1 : 1;
}

static void test_again_and_again(struct target *target, int count)
{
    int64_t *stops_ns = calloc((size_t)count, sizeof *stops_ns);
    const int before = count_descriptors(target->pid);

    for (int i = 0; i < count; ++i) {
        struct injection injection;
        enum inject_obstacle obstacle =
            inject_userfaultfd(target->pid, UFFD_USER_MODE_ONLY_FLAG, 0, WAIT_NS, &injection);

        if (obstacle != INJECT_DONE)
            fprintf(stderr, "round %d: obstacle %d, errno %d, %u attempts\n", i, (int)obstacle,
                    injection.error, injection.attempts);
        CHECK(obstacle == INJECT_DONE);
        stops_ns[i] = injection.stopped_ns;
        close(injection.uffd);
        if (i % 8 == 0)
            check_lives(target);
    }
    check_lives(target);
    CHECK(count_descriptors(target->pid) == before);
    qsort(stops_ns, (size_t)count, sizeof *stops_ns, compare);
    printf("%d stops of %lld us in the median, the longest took %lld us\n", count,
           (long long)stops_ns[count / 2] / 1000, (long long)stops_ns[count - 1] / 1000);
    CHECK(stops_ns[0] > 0 && stops_ns[count / 2] < STOP_NS_MAX);
    free(stops_ns);
}

/* One that stays open there, until it is closed there. Nothing else is closed. */
static void test_kept(struct target *target)
{
    const int before = count_descriptors(target->pid);
    struct injection injection, closing;
    int other;

    CHECK(inject_userfaultfd(target->pid, UFFD_USER_MODE_ONLY_FLAG, 1, WAIT_NS, &injection) ==
          INJECT_DONE);
    CHECK(injection.uffd >= 0 && injection.left_open >= 0);
    CHECK(count_descriptors(target->pid) == before + 1);
    check_lives(target);
    other = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(inject_close(target->pid, injection.left_open, other, WAIT_NS, &closing) == INJECT_DONE);
    CHECK(closing.left_open >= 0 && count_descriptors(target->pid) == before + 1);
    CHECK(inject_close(target->pid, injection.left_open, injection.uffd, WAIT_NS, &closing) ==
          INJECT_DONE);
    CHECK(closing.left_open == -1 && count_descriptors(target->pid) == before);
    close(other);
    close(injection.uffd);
    check_lives(target);
}

/* A signal comes at about the same time: it is not lost, and breaks no call. */
static void test_among_signals(struct target *target)
{
    for (int i = 0; i < 100; ++i) {
        struct injection injection;
        uint32_t signals = target->shared->signals;

        CHECK(syscall(SYS_tgkill, target->pid, target->pid, SIGALRM) == 0);
        CHECK(inject_userfaultfd(target->pid, UFFD_USER_MODE_ONLY_FLAG, 0, WAIT_NS, &injection) ==
              INJECT_DONE);
        await_more(&target->shared->signals, signals);
        close(injection.uffd);
        check_lives(target);
    }
    CHECK(target->shared->signals == 100);
}

static void test_killed_at_every_call(struct target *target, enum kind kind)
{
    const int before = count_descriptors(target->pid);
    const unsigned step = kind == KIND_PPOLL ? 1 : 3; /* the others differ in the restart alone */
    unsigned calls = 0, kills = 0;
    int left;

    change_kind(target, kind);
    while (run_and_kill(target->pid, calls)) {
        CHECK(!is_traced(target->pid));
        check_lives(target);
        calls += step;
        ++kills;
    }
    left = count_descriptors(target->pid) - before;
    printf("kind %d: killed at %u of %u stops, %d descriptors left\n", (int)kind, kills, calls,
           left);
    CHECK(calls > 50);
    CHECK(left >= 0 && (unsigned)left <= kills); /* one of each kill between opening and closing */
    check_lives(target);
}

int main(void)
{
    struct target target;
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY_FLAG);

    setvbuf(stdout, NULL, _IONBF, 0); /* children shall not print it again */
    if (uffd < 0)
        return SKIPPED;
    close(uffd);
    target = start();
    change_kind(&target, KIND_PPOLL);
    if (geteuid() == 0)
        test_writes_are_seen(&target);
    for (enum kind kind = 0; kind < KIND_COUNT; ++kind) {
        change_kind(&target, kind);
        test_again_and_again(&target, 100);
        test_killed_at_every_call(&target, kind);
    }
    test_kept(&target);
    test_among_signals(&target);
    end(&target);
    return 0;
}
