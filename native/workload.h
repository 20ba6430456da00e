/* The workload guest: pages that can be judged by themselves, and vCPU threads that write them.
 *
 * A page is 512 words of 64 bits, little-endian:
 *
 *     word 0     WORKLOAD_MAGIC | kind (enum workload_kind)
 *     word 1     index of the page in its RAM block
 *     word 2     write counter
 *     word 3     checksum: seed part + sum over every other word i of word[i] * (2 i + 1)
 *     word 4..   body
 *
 * The multipliers are odd, so a changed byte anywhere changes the sum. Writers only ever *add the
 * difference* that they make to the checksum: damage done to a page stays visible however often the page
 * is written afterwards. A page of kind "zero" is all zero (and stays a hole) until its first write.
 *
 * The sum of all pages' counters equals the sum of all vCPUs' writes, exactly, while they are paused: a
 * page that is right by itself but older than it should be shows there.
 *
 * Functions return 0 or -errno; sizes are bytes, page indices count 4096-byte pages. No global state.
 */
#ifndef RAMFERRY_WORKLOAD_H
#define RAMFERRY_WORKLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WORKLOAD_PAGE_SIZE 4096u
#define WORKLOAD_PAGE_WORDS 512u
#define WORKLOAD_HEADER_WORDS 4u
#define WORKLOAD_BODY_WORDS (WORKLOAD_PAGE_WORDS - WORKLOAD_HEADER_WORDS)
#define WORKLOAD_MAGIC UINT64_C(0x6461776d61720000) /* "\0\0ramwad", kind in the two low bytes */
#define WORKLOAD_VCPUS_MAX 64u
#define WORKLOAD_MIXED_RUN_PAGES 16u /* "mixed" gives runs of so many pages one kind */
#define WORKLOAD_WRONG UINT64_MAX    /* in place of the counter of a page that is wrong */

enum workload_kind {
    WORKLOAD_ZERO = 1,
    WORKLOAD_TEXT = 2,
    WORKLOAD_HEAP = 3,
    WORKLOAD_RANDOM = 4,
    WORKLOAD_MIXED = 5, /* of a RAM, never of a page: 40 % zero, 30 % text, 20 % heap, 10 % random */
};

enum workload_pattern {
    WORKLOAD_SWEEP = 1,   /* round and round, from a place that depends on the seed */
    WORKLOAD_SCATTER = 2, /* "random" */
    WORKLOAD_HOTSPOT = 3, /* 90 % of the writes go to 10 % of the pages, in the middle of each share */
    WORKLOAD_APPEND = 4,  /* ever forward from the first page; begins again at the end */
};

/* Resolve a name; 0 when there is no such contents or pattern. */
enum workload_kind workload_contents(const char *name);
enum workload_pattern workload_pattern(const char *name);

/* The kind that page `page` of a RAM with these contents has. */
enum workload_kind workload_page_kind(enum workload_kind contents, uint64_t seed, uint64_t page);

/* Write the initial contents of pages [first_page, first_page + page_count); `ram` is page 0.
 * Pages of kind zero are not touched: they must be zero already. */
void workload_fill(void *ram, uint64_t first_page, uint64_t page_count, enum workload_kind contents,
                   uint64_t seed);

struct workload_judgement {
    uint64_t wrong_pages;
    uint64_t first_wrong; /* UINT64_MAX: none */
};

/* Judge each page by itself; counters[page - first_page] gets its write counter, or WORKLOAD_WRONG.
 * Only exact while nobody writes. Reading a hole allocates it: skip holes before. */
struct workload_judgement workload_judge(const void *ram, uint64_t first_page, uint64_t page_count,
                                         enum workload_kind contents, uint64_t seed,
                                         uint64_t *counters);

/* The same for pages that are holes, without touching them: those that must not be all zero are wrong.
 * Only their counters are stored. */
struct workload_judgement workload_judge_hole(uint64_t first_page, uint64_t page_count,
                                              enum workload_kind contents, uint64_t seed,
                                              uint64_t *counters);

struct workload_options {
    void *ram; /* page 0; stays the caller's and must outlive the workload */
    uint64_t page_count;
    uint32_t vcpus; /* 1 .. WORKLOAD_VCPUS_MAX, at most page_count; each owns one contiguous share */
    enum workload_pattern pattern;
    uint64_t rate_bytes_per_s; /* page writes x 4096 of all vCPUs together; 0: full speed */
    uint32_t words_per_write;  /* body words moved by one write: 0 .. 508 */
    uint64_t seed;
    uint64_t *written_bitmap; /* or NULL; bit i % 64 of word i / 64 is set after page i was written */
};

struct workload;

/* Start the vCPU threads, paused, with all signals blocked. -EINVAL: options out of range. */
int workload_start(struct workload **workload, const struct workload_options *options);

/* Park every vCPU between two page writes; no page is half written when this returns. Waits of a rate
 * or a throttle are cut short. *took_ns (may be NULL) gets the time it took, 0 if paused already.
 * -ETIMEDOUT: after `wait_ns` (at most 2^62) a vCPU is still within a write, for a page that is missing; all
 * run on. Others who give orders wait meanwhile. */
int workload_pause(struct workload *workload, uint64_t wait_ns, uint64_t *took_ns);
void workload_resume(struct workload *workload);

/* Sleep `percent` (0..99) of the time: 10 ms of work, then percent / (100 - percent) as long asleep. The
 * clock of a rate stands still meanwhile. -EINVAL: out of range. */
int workload_throttle(struct workload *workload, unsigned percent);

/* Count the pages that each vCPU dirties (see dirty_ring.h), from now on or no more. A vCPU with a limit
 * counts in any case. */
void workload_count_dirty(struct workload *workload, bool is_counting);

/* Let a vCPU dirty no more than so many bytes a second; 0: as many as it likes. It sleeps instead of
 * writing; a pause cuts that short. -EINVAL: there is no such vCPU. Not part of the state. */
int workload_limit_dirty(struct workload *workload, uint32_t vcpu, uint64_t bytes_per_s);

/* For each vCPU: pages that it has dirtied while that was counted, and the time for which its limit made it
 * sleep. */
void workload_dirtied(const struct workload *workload, uint64_t *pages, uint64_t *slept_ns);

/* Take this written-bitmap from now on; on return the old one is used no more. Pauses for a moment. */
void workload_set_bitmap(struct workload *workload, uint64_t *written_bitmap);

/* writes[vcpu] for each vCPU; exact while paused. */
uint32_t workload_vcpus(const struct workload *workload);
uint64_t workload_page_count(const struct workload *workload);
void workload_writes(struct workload *workload, uint64_t *writes);

/* The state of all vCPUs: versioned, with the options it belongs to, and a checksum.
 * save: writes exactly workload_state_size() bytes. -EBUSY unless paused.
 * load: -EBUSY unless paused; -EINVAL with a static text in *wrong that says what does not fit, and then
 * nothing is changed. */
#define WORKLOAD_STATE_BYTES_MAX (56u + 24u * WORKLOAD_VCPUS_MAX)
size_t workload_state_size(const struct workload *workload);
int workload_save(struct workload *workload, void *state);
int workload_load(struct workload *workload, const void *state, size_t size, const char **wrong);

/* Tell the threads to end, and do not wait for it. */
void workload_end(struct workload *workload);

/* Stop and join the threads: RAM and bitmap are no longer touched. Idempotent; counts and state can still
 * be read. pause, resume, throttle and set_bitmap then do nothing. */
void workload_stop(struct workload *workload);

/* Stop, and free. NULL is allowed. */
void workload_free(struct workload *workload);

#endif
