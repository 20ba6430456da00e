#if defined(__x86_64__)
#define _GNU_SOURCE
#include "inject_frame.h"

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* syscall; ret */
const struct code_pattern FRAME_CALL = {{0x0f, 0x05, 0xc3}, 3};
/* mov $15, %rax (or %eax); syscall */
const struct code_pattern FRAME_SIGRETURN[] = {
    {{0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05}, 9},
    {{0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05}, 7},
    {{0}, 0},
};

#define RED_ZONE_BYTES 128
#define CALL_BYTES 2 /* of the instruction */
#define USER_CODE_64 0x33
#define FLAG_TRAP UINT64_C(0x100)
#define FLAG_DIRECTION UINT64_C(0x400)

/* What the kernel answers itself with, to begin a call anew. */
#define RESTART_FIRST (-512) /* ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND */
#define RESTART_LAST (-514)
#define RESTART_BLOCK (-516) /* with restart_syscall, which knows how much time is left */

/* -- the frame of rt_sigreturn (arch/x86/include/asm/sigframe.h), in our own words ------------------ */

struct sigcontext_x86 {
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
    uint16_t cs, gs, fs, ss;
    uint64_t error, trap, old_mask, cr2, fpstate, reserved[8];
};

struct signal_frame {
    uint64_t return_address; /* the kernel takes the stack pointer to be behind it */
    uint64_t flags, link;
    struct {
        uint64_t address;
        int32_t flags, padding;
        uint64_t size;
    } alternate_stack;
    struct sigcontext_x86 context;
    uint64_t signal_mask;
    uint8_t siginfo[128];
};

_Static_assert(sizeof(struct sigcontext_x86) == 256, "struct sigcontext has 256 bytes");
_Static_assert(offsetof(struct signal_frame, context) == 8 + 40, "the context is at 40 in ucontext");
_Static_assert(offsetof(struct signal_frame, siginfo) == 8 + 304, "ucontext has 304 bytes");

#define FRAME_FLAGS UINT64_C(7) /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
#define NO_SUCH_STACK 0x3f      /* refused, so the thread's alternate stack stays as it is */

/* The XSAVE area: what a signal frame says about it is at 464 of its first part. */
struct xsave_note {
    uint32_t magic, extended_size;
    uint64_t features;
    uint32_t size, padding[7];
};

#define XSAVE_NOTE_AT 464
#define XSAVE_HEADER_AT 512
#define XSAVE_BYTES_MIN 576
#define XSAVE_LEGACY UINT64_C(3) /* x87 and SSE are in the first part */
#define NOTE_MAGIC UINT32_C(0x46505853)
#define END_MAGIC UINT32_C(0x46505845)

_Static_assert(sizeof(struct xsave_note) == 48, "struct _fpx_sw_bytes has 48 bytes");

/* What PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13) says. */
struct rseq_configuration {
    uint64_t address;
    uint32_t size, signature, flags, padding;
};

#define GET_RSEQ_CONFIGURATION 0x420f
#define RSEQ_SEQUENCE_AT 8 /* in struct rseq: the sequence that is announced, or 0 */

_Static_assert(sizeof(struct rseq_configuration) == 24, "struct ptrace_rseq_configuration");

int frame_mode_is_ours(const frame_registers *registers, size_t size)
{
    return size == sizeof *registers && registers->cs == USER_CODE_64;
}

/* Whether the thread has announced a restartable sequence, which it may be in; 1 if nobody can say. */
static int is_in_sequence(pid_t thread)
{
    struct rseq_configuration configuration;
    struct iovec here, there;
    uint64_t sequence;

    if (ptrace(GET_RSEQ_CONFIGURATION, thread, (void *)sizeof configuration, &configuration) < 0)
        return 1;
    if (configuration.address == 0)
        return 0;
    here = (struct iovec){&sequence, sizeof sequence};
    there = (struct iovec){(void *)(uintptr_t)(configuration.address + RSEQ_SEQUENCE_AT),
                           sizeof sequence};
    return process_vm_readv(thread, &here, 1, &there, 1, 0) != sizeof sequence || sequence != 0;
}

int frame_is_at_rest(pid_t thread, const frame_registers *registers)
{
    return (int64_t)registers->orig_rax >= 0 || !is_in_sequence(thread);
}

int frame_has_shadow_stack(pid_t thread)
{
    char path[64], line[256];
    int found = 0;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", (int)thread);
    status = fopen(path, "re");
    if (!status)
        return 0;
    while (!found && fgets(line, sizeof line, status))
        found = strncmp(line, "x86_Thread_features:", 20) == 0 && strstr(line, "shstk") != NULL;
    fclose(status);
    return found;
}

uint64_t frame_stack(const frame_registers *registers)
{
    return registers->rsp;
}

uint64_t frame_next_instruction(const frame_registers *registers)
{
    return registers->rip;
}

/* Bytes of the XSAVE area up to the last part that is in use. */
static size_t xsave_bytes(uint64_t features)
{
    size_t bytes = XSAVE_BYTES_MIN;

    for (uint32_t i = 2; i < 63; ++i) {
        uint32_t size, offset, c, d;

        if ((features >> i & 1) && __get_cpuid_count(0xd, i, &size, &offset, &c, &d) &&
            offset + size > bytes)
            bytes = offset + size;
    }
    return bytes;
}

/* Read the thread's floating point state into `area` as a signal frame has it; its size, or -errno. */
static int64_t read_extended_state(pid_t thread, uint8_t *area, size_t capacity)
{
    struct iovec vector = {area, capacity};
    struct xsave_note note = {.magic = NOTE_MAGIC};
    uint64_t features;
    size_t size;

    if (ptrace(PTRACE_GETREGSET, thread, (void *)(uintptr_t)NT_X86_XSTATE, &vector) < 0)
        return -errno;
    if (vector.iov_len < XSAVE_BYTES_MIN)
        return -EIO;
    memcpy(&features, area + XSAVE_HEADER_AT, sizeof features);
    size = xsave_bytes(features);
    if (size > vector.iov_len || size + sizeof(uint32_t) > capacity)
        return -ENOBUFS;
    note.features = features | XSAVE_LEGACY;
    note.size = (uint32_t)size;
    note.extended_size = (uint32_t)(size + sizeof(uint32_t));
    memcpy(area + XSAVE_NOTE_AT, &note, sizeof note);
    memcpy(area + size, &(uint32_t){END_MAGIC}, sizeof(uint32_t));
    return (int64_t)(size + sizeof(uint32_t));
}

static void begin_anew(frame_registers *registers, uint64_t number)
{
    registers->rax = number;
    registers->rip -= CALL_BYTES;
}

frame_registers frame_resumed(const frame_registers *registers)
{
    frame_registers resumed = *registers;
    int64_t result = (int64_t)registers->rax;

    if ((int64_t)registers->orig_rax >= 0 && result == RESTART_BLOCK)
        begin_anew(&resumed, SYS_restart_syscall);
    else if ((int64_t)registers->orig_rax >= 0 && result <= RESTART_FIRST && result >= RESTART_LAST)
        begin_anew(&resumed, registers->orig_rax);
    resumed.orig_rax = UINT64_MAX; /* the kernel shall not do it once more */
    return resumed;
}

/* As `frame_resumed`; but rt_sigreturn forgets what restart_syscall would need. */
static frame_registers resumed_by_frame(const frame_registers *registers)
{
    frame_registers resumed = frame_resumed(registers);

    if ((int64_t)registers->orig_rax >= 0 && (int64_t)registers->rax == RESTART_BLOCK)
        resumed.rax = registers->orig_rax;
    return resumed;
}

int frame_build(pid_t thread, const frame_registers *registers, uint64_t signal_mask,
                const struct frame_code *code, struct frame *frame)
{
    const frame_registers to = resumed_by_frame(registers);
    static const size_t CAPACITY = FRAME_BYTES_MAX - sizeof(struct signal_frame) - 128;
    uint8_t *area = frame->bytes + sizeof(struct signal_frame) + 64;
    int64_t area_size = read_extended_state(thread, area, CAPACITY);
    uint64_t area_address;
    struct signal_frame content;

    if (area_size < 0)
        return (int)area_size;
    area_address = (to.rsp - RED_ZONE_BYTES - (uint64_t)area_size) & ~UINT64_C(63);
    frame->address = ((area_address - sizeof content) & ~UINT64_C(15)) - 8;
    frame->size = (size_t)(area_address - frame->address) + (size_t)area_size;
    content = (struct signal_frame){
        .return_address = code->sigreturn,
        .flags = FRAME_FLAGS,
        .alternate_stack = {.flags = NO_SUCH_STACK},
        .context = {.r8 = to.r8, .r9 = to.r9, .r10 = to.r10, .r11 = to.r11, .r12 = to.r12,
                    .r13 = to.r13, .r14 = to.r14, .r15 = to.r15, .rdi = to.rdi, .rsi = to.rsi,
                    .rbp = to.rbp, .rbx = to.rbx, .rdx = to.rdx, .rax = to.rax, .rcx = to.rcx,
                    .rsp = to.rsp, .rip = to.rip, .eflags = to.eflags, .cs = (uint16_t)to.cs,
                    .ss = (uint16_t)to.ss, .fpstate = area_address},
        .signal_mask = signal_mask,
    };
    memmove(frame->bytes + (area_address - frame->address), area, (size_t)area_size);
    memset(frame->bytes, 0, (size_t)(area_address - frame->address));
    memcpy(frame->bytes, &content, sizeof content);
    return 0;
}

frame_registers frame_call(const frame_registers *registers, const struct frame_code *code,
                           uint64_t frame_address, long number, uint64_t argument)
{
    frame_registers call = *registers;

    call.rip = code->call;
    call.rsp = frame_address;
    call.rax = (uint64_t)number;
    call.rdi = argument;
    call.orig_rax = UINT64_MAX;
    call.eflags &= ~(FLAG_TRAP | FLAG_DIRECTION);
    return call;
}

int frame_is_our_call(const frame_registers *registers, const struct frame_code *code)
{
    return registers->rip == code->call + CALL_BYTES;
}

int64_t frame_result(const frame_registers *registers)
{
    return (int64_t)registers->rax;
}
#endif
