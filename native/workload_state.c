/* The state that a migration carries: see workload.h. */
#define _GNU_SOURCE
#include "workload_vcpu.h"

#include <errno.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "states are little-endian");

#define STATE_MAGIC UINT64_C(0x3130657461747377) /* "wstate01": the version is part of it */

struct state_header {
    uint64_t magic;
    uint64_t page_count;
    uint64_t rate_bytes_per_s;
    uint64_t seed;
    uint32_t vcpus;
    uint32_t pattern;
    uint32_t words_per_write;
    uint32_t reserved; /* zero */
};

struct state_vcpu {
    uint64_t cursor;
    uint64_t random;
    uint64_t writes;
};

_Static_assert(sizeof(struct state_header) == 48 && sizeof(struct state_vcpu) == 24, "no padding");
_Static_assert(WORKLOAD_STATE_BYTES_MAX == 48 + 24 * WORKLOAD_VCPUS_MAX + sizeof(uint64_t), "room");

static uint64_t state_checksum(const unsigned char *state, size_t size)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a: against damage, not against malice */
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ state[i]) * UINT64_C(0x100000001b3);
    return hash;
}

size_t workload_state_size(const struct workload *workload)
{
    return sizeof(struct state_header) + workload->options.vcpus * sizeof(struct state_vcpu) +
           sizeof(uint64_t);
}

static struct state_header header_of(const struct workload *workload)
{
    const struct workload_options *options = &workload->options;
    return (struct state_header){
        STATE_MAGIC,    options->page_count,         options->rate_bytes_per_s, options->seed,
        options->vcpus, (uint32_t)options->pattern, options->words_per_write,  0,
    };
}

static int save_locked(const struct workload *workload, unsigned char *state)
{
    if (atomic_load(&workload->order) == RUN)
        return -EBUSY;
    struct state_header header = header_of(workload);
    unsigned char *next = state;
    memcpy(next, &header, sizeof header);
    next += sizeof header;
    for (uint32_t i = 0; i < workload->options.vcpus; i++, next += sizeof(struct state_vcpu)) {
        const struct vcpu *vcpu = &workload->vcpu[i];
        struct state_vcpu saved = {vcpu->cursor, vcpu->random, atomic_load(&vcpu->writes)};
        memcpy(next, &saved, sizeof saved);
    }
    uint64_t sum = state_checksum(state, (size_t)(next - state));
    memcpy(next, &sum, sizeof sum);
    return 0;
}

int workload_save(struct workload *workload, void *state)
{
    pthread_mutex_lock(&workload->control);
    int rc = save_locked(workload, state);
    pthread_mutex_unlock(&workload->control);
    return rc;
}

static const char *wrong_with_state(const struct workload *workload, const unsigned char *state,
                                    size_t size)
{
    if (size != workload_state_size(workload))
        return "its length does not fit the number of vCPUs";
    struct state_header header, ours = header_of(workload);
    memcpy(&header, state, sizeof header);
    if (header.magic != STATE_MAGIC)
        return "its magic or version is not known here";
    uint64_t sum;
    memcpy(&sum, state + size - sizeof sum, sizeof sum);
    if (sum != state_checksum(state, size - sizeof sum))
        return "its checksum is wrong";
    if (memcmp(&header, &ours, sizeof header) != 0)
        return "it belongs to a workload with other options";
    for (uint32_t i = 0; i < workload->options.vcpus; i++) {
        struct state_vcpu saved;
        memcpy(&saved, state + sizeof header + i * sizeof saved, sizeof saved);
        if (saved.cursor >= workload->vcpu[i].page_count)
            return "a vCPU's cursor lies outside its pages";
    }
    return NULL;
}

int workload_load(struct workload *workload, const void *state, size_t size, const char **wrong)
{
    int rc = 0;
    pthread_mutex_lock(&workload->control);
    if (atomic_load(&workload->order) == RUN)
        rc = -EBUSY;
    else if ((*wrong = wrong_with_state(workload, state, size)) != NULL)
        rc = -EINVAL;
    for (uint32_t i = 0; i < workload->options.vcpus && rc == 0; i++) {
        struct state_vcpu saved;
        memcpy(&saved, (const unsigned char *)state + sizeof(struct state_header) + i * sizeof saved,
               sizeof saved);
        workload->vcpu[i].cursor = saved.cursor;
        workload->vcpu[i].random = saved.random;
        atomic_store(&workload->vcpu[i].writes, saved.writes);
    }
    pthread_mutex_unlock(&workload->control);
    return rc;
}
