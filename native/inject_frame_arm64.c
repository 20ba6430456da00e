#if defined(__aarch64__)
#define _GNU_SOURCE
#include "inject_frame.h"

#include <elf.h>
#include <errno.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

/* svc #0; ret */
const struct code_pattern FRAME_CALL = {{0x01, 0x00, 0x00, 0xd4, 0xc0, 0x03, 0x5f, 0xd6}, 8};
/* mov x8, #139; svc #0: in every vDSO */
const struct code_pattern FRAME_SIGRETURN[] = {
    {{0x68, 0x11, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4}, 8},
    {{0}, 0},
};

#define CALL_BYTES 4 /* of the instruction */
#define CALL_INSTRUCTION UINT32_C(0xd4000001)
#define NUMBER 8 /* register of the call's number; its argument and result are in 0 */
#define LINK 30
#define MODE_32 UINT64_C(0x10)
#define BRANCH_TYPE (UINT64_C(3) << 10) /* what a jump may land on; a system call is no jump */
#define SINGLE_STEP (UINT64_C(1) << 21)
#define NT_GUARDED_STACK 0x410 /* NT_ARM_GCS, Linux 6.13; the first word says whether it is on */

/* -- the frame of rt_sigreturn (arch/arm64/include/uapi/asm/sigcontext.h), in our own words --------- */

struct signal_frame {
    uint8_t siginfo[128];
    uint64_t flags, link;
    struct {
        uint64_t address;
        int32_t flags, padding;
        uint64_t size;
    } alternate_stack;
    uint64_t signal_mask;
    uint8_t unused[120];
    _Alignas(16) uint64_t fault_address;
    uint64_t registers[31], stack, next, state;
    _Alignas(16) struct {
        uint32_t magic, size, status, control;
        _Alignas(16) uint8_t vectors[512];
    } floating_point;
    uint32_t end_magic, end_size;
    uint8_t rest[4096 - 528 - 8];
};

_Static_assert(offsetof(struct signal_frame, fault_address) == 128 + 176, "context is at 176");
_Static_assert(offsetof(struct signal_frame, floating_point) == 128 + 176 + 288, "records");
_Static_assert(offsetof(struct signal_frame, end_magic) == 128 + 176 + 288 + 528, "fpsimd_context");
_Static_assert(sizeof(struct signal_frame) <= FRAME_BYTES_MAX, "the frame fits");

#define FLOATING_POINT_MAGIC UINT32_C(0x46508001)
#define NO_SUCH_STACK 0x3f /* refused, so the thread's alternate stack stays as it is */

/* What PTRACE_GETREGSET says of NT_PRFPREG. */
struct floating_point_registers {
    uint8_t vectors[512];
    uint32_t status, control, padding[2];
};

int frame_mode_is_ours(const frame_registers *registers, size_t size)
{
    return size == sizeof *registers && !(registers->pstate & MODE_32);
}

static int is_call_at(pid_t thread, uint64_t address)
{
    long word;

    errno = 0;
    word = ptrace(PTRACE_PEEKTEXT, thread, (void *)(uintptr_t)(address & ~UINT64_C(7)), NULL);
    return errno == 0 && (uint32_t)((uint64_t)word >> (address % 8 * 8)) == CALL_INSTRUCTION;
}

/* In a call only: one of ours would lose the longer registers (SVE) of a thread that computes. The
 * kernel has forgotten the call at this stop, and put the thread before its instruction if it shall
 * begin anew. */
int frame_is_at_rest(pid_t thread, const frame_registers *registers)
{
    return is_call_at(thread, registers->pc) || is_call_at(thread, registers->pc - CALL_BYTES);
}

int frame_has_shadow_stack(pid_t thread)
{
    uint64_t words[3] = {0};
    struct iovec vector = {words, sizeof words};

    return ptrace(PTRACE_GETREGSET, thread, (void *)(uintptr_t)NT_GUARDED_STACK, &vector) == 0 &&
           (words[0] & 1);
}

uint64_t frame_stack(const frame_registers *registers)
{
    return registers->sp;
}

uint64_t frame_next_instruction(const frame_registers *registers)
{
    return registers->pc;
}

frame_registers frame_resumed(const frame_registers *registers)
{
    return *registers;
}

/* SVE's longer registers are not kept across a system call, so nothing is lost without them; SME's
 * array is kept, and a frame without it leaves it alone. */
int frame_build(pid_t thread, const frame_registers *registers, uint64_t signal_mask,
                const struct frame_code *code, struct frame *frame)
{
    struct floating_point_registers floating;
    struct iovec vector = {&floating, sizeof floating};
    struct signal_frame content = {.alternate_stack = {.flags = NO_SUCH_STACK},
                                   .signal_mask = signal_mask,
                                   .stack = registers->sp,
                                   .next = registers->pc,
                                   .state = registers->pstate};

    (void)code;
    if (ptrace(PTRACE_GETREGSET, thread, (void *)(uintptr_t)NT_PRFPREG, &vector) < 0)
        return -errno;
    if (vector.iov_len < offsetof(struct floating_point_registers, padding))
        return -EIO;
    memcpy(content.registers, registers->regs, sizeof content.registers);
    content.floating_point.magic = FLOATING_POINT_MAGIC;
    content.floating_point.size = sizeof content.floating_point;
    content.floating_point.status = floating.status;
    content.floating_point.control = floating.control;
    memcpy(content.floating_point.vectors, floating.vectors, sizeof floating.vectors);
    frame->address = (registers->sp - sizeof content) & ~UINT64_C(15);
    frame->size = sizeof content;
    memcpy(frame->bytes, &content, sizeof content);
    return 0;
}

frame_registers frame_call(const frame_registers *registers, const struct frame_code *code,
                           uint64_t frame_address, long number, uint64_t argument)
{
    frame_registers call = *registers;

    call.pc = code->call;
    call.sp = frame_address;
    call.regs[NUMBER] = (uint64_t)number;
    call.regs[0] = argument;
    call.regs[LINK] = code->sigreturn;
    call.pstate &= ~(BRANCH_TYPE | SINGLE_STEP);
    return call;
}

int frame_is_our_call(const frame_registers *registers, const struct frame_code *code)
{
    return registers->pc == code->call + CALL_BYTES;
}

int64_t frame_result(const frame_registers *registers)
{
    return (int64_t)registers->regs[0];
}
#endif
