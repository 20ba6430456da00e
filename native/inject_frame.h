/* What the injector must know of a processor: its registers, and how the kernel lays out the frame
 * from which `rt_sigreturn` takes them. One implementation a processor. */
#ifndef RAMFERRY_INJECT_FRAME_H
#define RAMFERRY_INJECT_FRAME_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

typedef struct user_regs_struct frame_registers;

#define FRAME_BYTES_MAX ((size_t)16384) /* a frame with all of x86's registers is 12 KiB */

/* Instructions to look for in a process's code. */
struct code_pattern {
    uint8_t bytes[16];
    size_t size;
};

extern const struct code_pattern FRAME_CALL;        /* a system call, and return */
extern const struct code_pattern FRAME_SIGRETURN[]; /* rt_sigreturn; ends with one of size 0 */

/* Where in a process those are. */
struct frame_code {
    uint64_t call;
    uint64_t sigreturn;
};

/* A frame, and where in the stopped thread it must lie. */
struct frame {
    uint64_t address;
    size_t size;
    _Alignas(64) uint8_t bytes[FRAME_BYTES_MAX];
};

/* Whether the thread runs in the mode that this program was built for. */
int frame_mode_is_ours(const frame_registers *registers, size_t size);

/* Whether the stopped thread may make a call of ours and go on where it was: it waits in a system
 * call of its own, or it computes and the processor loses nothing by a call, and is in no restartable
 * sequence (rseq), whose rest must not be run after the kernel was entered. */
int frame_is_at_rest(pid_t thread, const frame_registers *registers);

/* Whether the processor compares each return with a stack of its own. 1, 0 */
int frame_has_shadow_stack(pid_t thread);

uint64_t frame_stack(const frame_registers *registers);
uint64_t frame_next_instruction(const frame_registers *registers);

/* Lay a frame below the stack of the stopped thread, that leads back to where it is. A call that was
 * interrupted begins anew there, as it began before.
 *
 * 0, -ENOBUFS when the thread has more state than FRAME_BYTES_MAX, or -errno. */
int frame_build(pid_t thread, const frame_registers *registers, uint64_t signal_mask,
                const struct frame_code *code, struct frame *frame);

/* Registers with which the thread makes one system call and then goes through the frame. */
frame_registers frame_call(const frame_registers *registers, const struct frame_code *code,
                           uint64_t frame_address, long number, uint64_t argument);

/* Whether the thread stands before or after that very call, and its result. */
int frame_is_our_call(const frame_registers *registers, const struct frame_code *code);
int64_t frame_result(const frame_registers *registers);

/* Registers that bring the thread back, from a stop after a system call: where the kernel would have
 * begun the interrupted call anew, they do. */
frame_registers frame_resumed(const frame_registers *registers);

#endif
