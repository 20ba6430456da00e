#define _GNU_SOURCE
#include "seccomp_filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

#define GET_FILTER 0x420c /* PTRACE_SECCOMP_GET_FILTER, Linux 4.4 */

struct machine {
    uint32_t a, x, memory[BPF_MEMWORDS];
};

static uint32_t compute(uint16_t operation, uint32_t a, uint32_t b)
{
    switch (operation) {
    case BPF_ADD: return a + b;
    case BPF_SUB: return a - b;
    case BPF_MUL: return a * b;
    case BPF_DIV: return b ? a / b : 0;
    case BPF_OR: return a | b;
    case BPF_AND: return a & b;
    case BPF_XOR: return a ^ b;
    case BPF_LSH: return b < 32 ? a << b : 0;
    case BPF_RSH: return b < 32 ? a >> b : 0;
    default: return 0U - a; /* BPF_NEG */
    }
}

static int is_true(uint16_t operation, uint32_t a, uint32_t b)
{
    switch (operation) {
    case BPF_JEQ: return a == b;
    case BPF_JGT: return a > b;
    case BPF_JGE: return a >= b;
    default: return (a & b) != 0; /* BPF_JSET */
    }
}

/* What a load of either kind fetches; 0 when there is no such thing. */
static int fetch(const struct machine *machine, const struct sock_filter *step,
                 const struct seccomp_data *call, uint32_t *value)
{
    switch (BPF_MODE(step->code)) {
    case BPF_IMM:
        *value = step->k;
        return 1;
    case BPF_LEN:
        *value = sizeof *call;
        return 1;
    case BPF_MEM:
        if (step->k < BPF_MEMWORDS)
            *value = machine->memory[step->k];
        return step->k < BPF_MEMWORDS;
    case BPF_ABS:
        if (step->k % 4 != 0 || step->k > sizeof *call - 4)
            return 0;
        memcpy(value, (const uint8_t *)call + step->k, sizeof *value);
        return 1;
    default:
        return 0;
    }
}

/* Take one step that is no load, jump or return; 0 when it cannot be. */
static int take(struct machine *machine, const struct sock_filter *step)
{
    const uint32_t operand = BPF_SRC(step->code) == BPF_X ? machine->x : step->k;

    switch (BPF_CLASS(step->code)) {
    case BPF_ALU:
        machine->a = compute(BPF_OP(step->code), machine->a, operand);
        return 1;
    case BPF_ST:
    case BPF_STX:
        if (step->k >= BPF_MEMWORDS)
            return 0;
        machine->memory[step->k] = BPF_CLASS(step->code) == BPF_ST ? machine->a : machine->x;
        return 1;
    default: /* BPF_MISC */
        if (BPF_MISCOP(step->code) == BPF_TAX)
            machine->x = machine->a;
        else
            machine->a = machine->x;
        return 1;
    }
}

uint32_t seccomp_filter_run(const struct sock_filter *program, size_t count,
                            const struct seccomp_data *call)
{
    struct machine machine = {0};

    for (size_t at = 0; at < count; ++at) {
        const struct sock_filter *step = &program[at];
        const uint32_t operand = BPF_SRC(step->code) == BPF_X ? machine.x : step->k;

        switch (BPF_CLASS(step->code)) {
        case BPF_RET:
            return BPF_RVAL(step->code) == BPF_A ? machine.a : step->k;
        case BPF_JMP:
            if (BPF_OP(step->code) == BPF_JA)
                at += step->k;
            else
                at += is_true(BPF_OP(step->code), machine.a, operand) ? step->jt : step->jf;
            break;
        case BPF_LD:
        case BPF_LDX:
            if (!fetch(&machine, step, call,
                       BPF_CLASS(step->code) == BPF_LD ? &machine.a : &machine.x))
                return SECCOMP_RET_KILL_PROCESS;
            break;
        default:
            if (!take(&machine, step))
                return SECCOMP_RET_KILL_PROCESS;
        }
    }
    return SECCOMP_RET_KILL_PROCESS;
}

static int is_allowed(uint32_t verdict)
{
    verdict &= SECCOMP_RET_ACTION_FULL;
    return verdict == SECCOMP_RET_ALLOW || verdict == SECCOMP_RET_LOG;
}

int seccomp_allows(pid_t thread, long number, uint64_t argument, uint64_t instruction)
{
    const struct seccomp_data call = {.nr = (int)number,
                                      .arch = ARCHITECTURE,
                                      .instruction_pointer = instruction,
                                      .args = {argument}};
    int allows = 1;

    for (uintptr_t index = 0; allows == 1; ++index) {
        struct sock_filter *program = malloc(BPF_MAXINSNS * sizeof *program);
        long count;

        if (!program)
            return -ENOMEM;
        count = ptrace(GET_FILTER, thread, (void *)index, program);
        if (count < 0)
            allows = errno == ENOENT && index > 0 ? 2 : -errno;
        else if (!is_allowed(seccomp_filter_run(program, (size_t)count, &call)))
            allows = 0;
        free(program);
    }
    return allows == 2 ? 1 : allows;
}

int seccomp_mode(pid_t thread)
{
    char path[64], line[256];
    int mode = 0;
    FILE *status;

    snprintf(path, sizeof path, "/proc/%d/status", (int)thread);
    status = fopen(path, "re");
    if (!status)
        return -errno;
    while (fgets(line, sizeof line, status))
        if (sscanf(line, "Seccomp: %d", &mode) == 1)
            break;
    fclose(status);
    return mode;
}
