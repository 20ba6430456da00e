#define _GNU_SOURCE
#include "inject_target.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIECE_BYTES ((size_t)(256 * 1024))

struct mapping {
    uint64_t start, end;
    char rights[5];
    char name[256];
};

static FILE *open_file_of(pid_t pid, const char *name)
{
    char path[96];

    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return fopen(path, "re");
}

/* The next line of /proc/PID/maps; 0 at the end. */
static int next_mapping(FILE *maps, struct mapping *mapping)
{
    char line[512];
    int taken = 0;

    if (!fgets(line, sizeof line, maps))
        return 0;
    if (!strchr(line, '\n')) /* a long name: the rest of the line is of no use */
        for (int c; (c = fgetc(maps)) != EOF && c != '\n';)
            continue;
    *mapping = (struct mapping){0};
    sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %*s %*s %*s %n", &mapping->start, &mapping->end,
           mapping->rights, &taken);
    snprintf(mapping->name, sizeof mapping->name, "%.*s", (int)strcspn(line + taken, "\n"),
             line + taken);
    return 1;
}

static int copy(pid_t pid, uint64_t address, void *bytes, size_t size, int is_write)
{
    struct iovec here = {bytes, size}, there = {(void *)(uintptr_t)address, size};
    ssize_t copied = is_write ? process_vm_writev(pid, &here, 1, &there, 1, 0)
                              : process_vm_readv(pid, &here, 1, &there, 1, 0);

    if (copied < 0)
        return -errno;
    return (size_t)copied == size ? 0 : -EFAULT;
}

int target_read(pid_t pid, uint64_t address, void *bytes, size_t size)
{
    return copy(pid, address, bytes, size, 0);
}

int target_write(pid_t pid, uint64_t address, const void *bytes, size_t size)
{
    return copy(pid, address, (void *)(uintptr_t)bytes, size, 1);
}

/* -- code ------------------------------------------------------------------------------------------ */

static uint64_t find_in(const uint8_t *bytes, size_t size, uint64_t address,
                        const struct code_pattern *pattern)
{
    const uint8_t *found = memmem(bytes, size, pattern->bytes, pattern->size);

    return found ? address + (uint64_t)(found - bytes) : 0;
}

static void look_through(const uint8_t *bytes, size_t size, uint64_t address,
                         struct frame_code *code)
{
    if (code->call == 0)
        code->call = find_in(bytes, size, address, &FRAME_CALL);
    for (size_t i = 0; code->sigreturn == 0 && FRAME_SIGRETURN[i].size > 0; ++i)
        code->sigreturn = find_in(bytes, size, address, &FRAME_SIGRETURN[i]);
}

static int is_found(const struct frame_code *code)
{
    return code->call != 0 && code->sigreturn != 0;
}

/* Look through one mapping in pieces, which overlap by the longest pattern. */
static int search_mapping(pid_t pid, const struct mapping *mapping, struct frame_code *code)
{
    const size_t overlap = sizeof FRAME_CALL.bytes;
    uint8_t *piece = malloc(PIECE_BYTES);
    int rc = 0;

    if (!piece)
        return -ENOMEM;
    for (uint64_t at = mapping->start; at < mapping->end && !is_found(code);) {
        size_t size = mapping->end - at < PIECE_BYTES ? (size_t)(mapping->end - at) : PIECE_BYTES;

        rc = target_read(pid, at, piece, size);
        if (rc < 0)
            break;
        look_through(piece, size, at, code);
        at += size < PIECE_BYTES ? size : size - overlap;
    }
    free(piece);
    return rc;
}

static int is_c_library(const struct mapping *mapping)
{
    const char *name = strrchr(mapping->name, '/');

    return name && (strncmp(name, "/libc.so", 8) == 0 || strncmp(name, "/libc-", 6) == 0 ||
                    strncmp(name, "/ld-musl", 8) == 0);
}

static int search(pid_t pid, int only_c_library, struct frame_code *code)
{
    FILE *maps = open_file_of(pid, "maps");
    struct mapping mapping;
    int rc = 0;

    if (!maps)
        return -errno;
    while (!is_found(code) && next_mapping(maps, &mapping)) {
        if (mapping.rights[0] != 'r' || mapping.rights[1] == 'w' || mapping.rights[2] != 'x')
            continue; /* code that may change is no code to rely on */
        if (is_c_library(&mapping) != only_c_library || strcmp(mapping.name, "[vsyscall]") == 0)
            continue;
        rc = search_mapping(pid, &mapping, code);
        if (rc == -EPERM || rc == -ESRCH || rc == -ENOMEM)
            break;
    }
    fclose(maps);
    return is_found(code) ? 0 : rc == -EFAULT || rc == 0 ? -ENOENT : rc;
}

/* Whether its program is for 64-bit processors; one that cannot be read may be. */
static int is_64_bit(pid_t pid)
{
    FILE *program = open_file_of(pid, "exe");
    uint8_t head[EI_CLASS + 1];
    int is_32 = 0;

    if (!program)
        return 1;
    if (fread(head, sizeof head, 1, program) == 1)
        is_32 = memcmp(head, ELFMAG, SELFMAG) == 0 && head[EI_CLASS] == ELFCLASS32;
    fclose(program);
    return !is_32;
}

int target_find_code(pid_t pid, struct frame_code *code)
{
    int rc;

    *code = (struct frame_code){0, 0};
    if (!is_64_bit(pid))
        return -ENOEXEC;
    rc = search(pid, 1, code);
    return rc == -ENOENT ? search(pid, 0, code) : rc;
}

/* -- threads --------------------------------------------------------------------------------------- */

/* 1, 0, or -EPERM when we may not know. */
static int is_waiting(pid_t pid, pid_t thread)
{
    char name[64];
    long number;
    int is_refused, has_number;
    FILE *call;

    snprintf(name, sizeof name, "task/%d/syscall", (int)thread);
    call = open_file_of(pid, name);
    if (!call)
        return errno == EACCES || errno == EPERM ? -EPERM : 0;
    errno = 0;
    has_number = fscanf(call, "%ld", &number) == 1; /* else it is "running" */
    is_refused = ferror(call) && (errno == EPERM || errno == EACCES);
    fclose(call);
    if (is_refused)
        return -EPERM;
    return has_number && number >= 0;
}

int target_is_uninterruptible(pid_t pid, pid_t thread)
{
    char name[64], line[256] = "";
    const char *after_name;
    FILE *stat;

    snprintf(name, sizeof name, "task/%d/stat", (int)thread);
    stat = open_file_of(pid, name);
    if (!stat)
        return 0;
    if (!fgets(line, sizeof line, stat))
        line[0] = '\0';
    fclose(stat);
    after_name = strrchr(line, ')');
    return after_name && strncmp(after_name, ") D", 3) == 0;
}

/* Append the threads, all but the first of the process, that wait, or those that do not. */
static int list_threads(pid_t pid, int waiting, pid_t *threads, size_t threads_max, size_t *count)
{
    char path[64];
    struct dirent *entry;
    DIR *tasks;
    int rc = 0;

    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    tasks = opendir(path);
    if (!tasks)
        return errno == ENOENT ? -ESRCH : -errno;
    while (rc >= 0 && *count < threads_max && (entry = readdir(tasks))) {
        pid_t thread = (pid_t)strtol(entry->d_name, NULL, 10);

        if (thread > 0 && thread != pid && (rc = is_waiting(pid, thread)) == waiting)
            threads[(*count)++] = thread;
    }
    closedir(tasks);
    return rc < 0 ? rc : 0;
}

int target_threads(pid_t pid, pid_t *threads, size_t threads_max)
{
    size_t count = 0;
    const int first_waits = is_waiting(pid, pid);
    int rc = first_waits;

    if (first_waits == 1)
        threads[count++] = pid;
    if (rc >= 0)
        rc = list_threads(pid, 1, threads, threads_max, &count);
    if (rc >= 0 && first_waits == 0 && count < threads_max)
        threads[count++] = pid;
    if (rc >= 0)
        rc = list_threads(pid, 0, threads, threads_max, &count);
    return rc < 0 ? rc : (int)count;
}

int target_tracer(pid_t thread)
{
    FILE *status = open_file_of(thread, "status");
    char line[256];
    int tracer = 0;

    if (!status)
        return -errno;
    while (fgets(line, sizeof line, status))
        if (sscanf(line, "TracerPid: %d", &tracer) == 1)
            break;
    fclose(status);
    return tracer;
}

/* -- stacks and descriptors ------------------------------------------------------------------------ */

int target_is_stack(pid_t pid, uint64_t low, uint64_t high)
{
    struct mapping before = {0}, mapping;
    FILE *maps = open_file_of(pid, "maps");
    int is_stack = 0;

    if (!maps)
        return -errno;
    while (next_mapping(maps, &mapping) && mapping.start < high) {
        if (mapping.start <= low && high <= mapping.end && strcmp(mapping.rights, "rw-p") == 0)
            is_stack = strcmp(mapping.name, "[stack]") == 0 ||
                       (before.end == mapping.start && strcmp(before.rights, "---p") == 0);
        before = mapping;
    }
    fclose(maps);
    return is_stack;
}

int target_has_descriptor(pid_t pid, int number, int fd)
{
    long order = syscall(SYS_kcmp, getpid(), pid, KCMP_FILE, fd, number);

    return order < 0 ? -errno : order == 0;
}
