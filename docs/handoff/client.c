/* A toy VMM that hands its memory to ramferry: the protocol of docs/handoff.md in C, to copy from.
 *
 *     client SOCKET MEBIBYTES run|wait
 *
 * Its one "vCPU" is a thread that counts its steps, in a register and all over the memory. `run`:
 * it begins at once; `wait`: it waits for a guest from another host. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096
#define USER_MODE_ONLY 1 /* of userfaultfd(2): enough for a toy without KVM */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int wants_to_run, stands = 1; /* the vCPU: what it should, and what it does */
static int is_held;                  /* ramferry has paused it: it goes on when that one is gone */
static int must_keep_uffd;           /* pages are missing: between `hold` and `release` */
static int is_void;                  /* it waits for a guest, and has none yet */
static uint64_t steps;               /* the device state */
static uint64_t *memory;
static size_t size;

static void fail(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *run_vcpu(void *unused)
{
    for (size_t pages = size / PAGE - 1;;) {
        pthread_mutex_lock(&lock);
        while (!wants_to_run) {
            stands = 1;
            pthread_cond_broadcast(&changed);
            pthread_cond_wait(&changed, &lock);
        }
        stands = 0;
        pthread_mutex_unlock(&lock);
        for (int i = 0; i < 100; ++i) {
            if (((volatile uint64_t *)memory)[0] != steps)
                abort(); /* memory and state are of different times */
            ++steps;
            memory[(steps * 7 % pages + 1) * PAGE / 8 + steps % 500] = steps;
            ((volatile uint64_t *)memory)[0] = steps;
        }
    }
    return unused;
}

/* Returns when it is so. A real VMM has a deadline here: a vCPU may wait for a missing page. */
static void set_running(int runs)
{
    pthread_mutex_lock(&lock);
    wants_to_run = runs;
    pthread_cond_broadcast(&changed);
    while (!runs && !stands)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        usleep(50000); /* ramferry may come later than we do */
    return fd;
}

/* One line, with descriptors beside its first byte. */
static void say(int fd, const char *line, const int *fds, size_t count)
{
    char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec content = {(void *)(uintptr_t)line, strlen(line)};
    struct msghdr message = {.msg_iov = &content, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, count * sizeof(int));
    }
    if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
        fail("sendmsg");
}

/* Read a line, byte by byte for brevity, and the descriptor beside it or -1. 0: that is the end. */
static int hear(int fd, char *line, size_t room, int *received)
{
    size_t length = 0;
    *received = -1;
    while (length + 1 < room) {
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec content = {line + length, 1};
        struct msghdr message = {.msg_iov = &content, .msg_iovlen = 1,
                                 .msg_control = control, .msg_controllen = sizeof control};

        if (recvmsg(fd, &message, MSG_CMSG_CLOEXEC) <= 0)
            return 0;
        if (message.msg_controllen && CMSG_FIRSTHDR(&message)->cmsg_type == SCM_RIGHTS)
            memcpy(received, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof *received);
        if (line[length++] == '\n')
            break;
    }
    line[length] = 0;
    return 1;
}

/* Do one order; 0, or why it was not done. `line` is compact JSON: no blanks, keys in this order. */
static const char *obey(const char *line, int received)
{
#define IS(name) (strstr(line, "\"execute\":\"" name "\"") != NULL)
    if (IS("pause")) {
        is_held = strstr(line, "\"until\":\"hangup\"") != NULL;
        set_running(0);
    } else if (IS("arrived")) {
        is_void = 0; /* and it stands until `resume` */
    } else if (IS("resume")) {
        is_held = is_void = 0;
        set_running(1);
    } else if (IS("save")) {
        return pwrite(received, &steps, sizeof steps, 0) == sizeof steps ? NULL : "cannot write";
    } else if (IS("load")) {
        return pread(received, &steps, sizeof steps, 0) == sizeof steps ? NULL : "cannot read";
    } else if (IS("hold") || IS("release")) {
        must_keep_uffd = IS("hold");
    } else if (!IS("status")) {
        return "unknown order";
    }
    return NULL;
}

int main(int argc, char **argv)
{
    int received, connection, fds[2], waits = argc == 4 && !strcmp(argv[3], "wait");
    pthread_t vcpu;
    char line[4096];

    if (argc != 4)
        return 2;
    size = (size_t)atol(argv[2]) << 20;
    fds[0] = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fds[0] < 0 || ftruncate(fds[0], (off_t)size) < 0)
        fail("memfd");
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    fds[1] = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK); /* no UFFDIO_API: ramferry's */
    if (fds[1] < 0)
        fds[1] = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    if (memory == MAP_FAILED || fds[1] < 0 || madvise(memory, size, MADV_DONTFORK) < 0)
        fail("memory or userfaultfd");
    is_void = waits;
    if (pthread_create(&vcpu, NULL, run_vcpu, NULL) != 0)
        fail("pthread_create");
    set_running(!waits);

    connection = connect_to(argv[1]);
    snprintf(line, sizeof line,
             "{\"handoff\":1,\"running\":%s,\"state\":true,\"regions\":[{\"id\":\"ram\","
             "\"base_host_virt_addr\":%zu,\"size\":%zu,\"offset\":0,\"page_size_kib\":4}]}\n",
             waits ? "false" : "true", (size_t)memory, size);
    say(connection, line, fds, 2);
    if (!hear(connection, line, sizeof line, &received) || !strstr(line, "\"welcome\":")) {
        fprintf(stderr, "client: refused: %s", line);
        return 1;
    }
    while (hear(connection, line, sizeof line, &received)) {
        const char *error = obey(line, received), *id = strstr(line, "\"id\":");
        long number = id ? atol(id + 5) : 0;
        if (received >= 0)
            close(received);
        snprintf(line, sizeof line, "{\"id\":%ld,\"running\":%s%s%s%s%s}\n", number,
                 wants_to_run ? "true" : "false", ",\"size\":8", error ? ",\"error\":\"" : "",
                 error ? error : "", error ? "\"" : "");
        say(connection, line, NULL, 0);
    }
    if (is_void)
        return 3; /* half a guest came */
    if (is_held)
        set_running(1); /* it had not been given away */
    if (!must_keep_uffd)
        close(fds[1]);
    for (;;)
        pause(); /* a real one would connect again, with a new userfaultfd */
}
