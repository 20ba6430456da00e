/* See workload.h. */
#define _GNU_SOURCE
#include "workload.h"

#include "dirty_ring.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(WORKLOAD_PAGE_WORDS * sizeof(uint64_t) == WORKLOAD_PAGE_SIZE, "page of words");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pages and states are little-endian");

#define SECOND_NS UINT64_C(1000000000)
#define THROTTLE_SLICE_NS UINT64_C(10000000) /* QEMU's CPU_THROTTLE_TIMESLICE_NS */
#define BURST_NS UINT64_C(1000000)           /* a rate is kept by bursts of about 1 ms of writes */
#define BACKLOG_NS UINT64_C(100000000)       /* later than that is lost, not made up for */

#define VCPU_SLICE_NS UINT64_C(10000000)     /* longer than the scheduler's own, which is 3 ms or less */
#define CLOCK_WRITES 32u /* a throttled vCPU at full speed looks at the clock every so many writes */

enum { MAGIC_WORD = 0, INDEX_WORD = 1, COUNTER_WORD = 2, CHECKSUM_WORD = 3 };

/* -- pages ------------------------------------------------------------------------------------- */

/* One step of splitmix64: any state gives good numbers, so any state may be loaded. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t mix(uint64_t seed, uint64_t value)
{
    uint64_t state = seed ^ (value * UINT64_C(0xd6e8feb86659fd93));
    return next_random(&state);
}

static uint64_t weight(unsigned word)
{
    return 2u * (uint64_t)word + 1u;
}

static uint64_t seed_part(uint64_t seed)
{
    return mix(seed, UINT64_C(0x636865636b73756d));
}

static uint64_t checksum(const uint64_t *page, uint64_t seed)
{
    uint64_t sum = seed_part(seed);
    for (unsigned i = 0; i < CHECKSUM_WORD; i++)
        sum += page[i] * weight(i);
    for (unsigned i = WORKLOAD_HEADER_WORDS; i < WORKLOAD_PAGE_WORDS; i++)
        sum += page[i] * weight(i);
    return sum;
}

enum workload_kind workload_contents(const char *name)
{
    static const char *const names[] = {"zero", "text", "heap", "random", "mixed"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum workload_kind)(i + 1);
    return 0;
}

enum workload_pattern workload_pattern(const char *name)
{
    static const char *const names[] = {"sweep", "random", "hotspot", "append"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum workload_pattern)(i + 1);
    return 0;
}

enum workload_kind workload_page_kind(enum workload_kind contents, uint64_t seed, uint64_t page)
{
    if (contents != WORKLOAD_MIXED)
        return contents;
    uint64_t tenth = mix(~seed, page / WORKLOAD_MIXED_RUN_PAGES) % 10;
    if (tenth < 4)
        return WORKLOAD_ZERO;
    if (tenth < 7)
        return WORKLOAD_TEXT;
    return tenth < 9 ? WORKLOAD_HEAP : WORKLOAD_RANDOM;
}

/* Words drawn with a skew, separated by blanks and line ends: compresses like source and prose. Each is
 * padded to 16 bytes, so that it is copied in one go. */
static void fill_text(uint64_t *body, uint64_t state)
{
    static const char vocabulary[64][16] = {
        "the ",     "of ",        "and ",     "to ",      "in ",       "page ",    "guest ",
        "memory ",  "return ",    "struct ",  "static ",  "int ",      "if ",      "else ",
        "for ",     "while ",     "= ",       "== ",      "->",        "();\n",    "{\n",
        "}\n",      "0 ",         "1 ",       "NULL ",    "size ",     "index ",   "address ",
        "channel ", "block ",     "dirty ",   "round ",   "migrate ",  "monitor ", "command ",
        "capacity ", "transfer ", "response ", "server ", "client ",   "request ", "timeout ",
        "error: ",  "warning: ",  "message ", "value ",   "name ",     "2024-",    "127.0.0.1 ",
        "http://",  "<div>\n",    "</div>\n", "\"text\" ", "function ", "export ",  "const ",
        "include ", "define ",    "unsigned ", "pointer ", "buffer ",  "length ",  "offset ",
        "document.\n",
    };
    char text[WORKLOAD_BODY_WORDS * sizeof(uint64_t) + 16];
    size_t used = 0;
    while (used < WORKLOAD_BODY_WORDS * sizeof(uint64_t)) {
        uint64_t random = next_random(&state);
        if (random % 8 == 0) { /* something that was not seen before */
            size_t length = 4 + (random >> 4) % 6;
            for (size_t i = 0; i < length; i++)
                text[used + i] = (char)('a' + (random >> (8 + 5 * i)) % 26);
            used += length;
            text[used++] = ' ';
            continue;
        }
        for (unsigned i = 0; i < 4 && used < WORKLOAD_BODY_WORDS * sizeof(uint64_t); i++) {
            random >>= 12;
            unsigned one = random % 64, other = random / 64 % 64;
            const char *word = vocabulary[one < other ? one : other];
            memcpy(text + used, word, 16);
            used += strnlen(word, 16);
        }
    }
    memcpy(body, text, WORKLOAD_BODY_WORDS * sizeof *body);
}

/* What an allocator leaves: pointers into one arena, small integers, and nothing. */
static void fill_heap(uint64_t *body, uint64_t state)
{
    uint64_t arena = UINT64_C(0x7f0000000000) + (next_random(&state) & UINT64_C(0xfff000000));
    for (unsigned i = 0; i < WORKLOAD_BODY_WORDS; i++) {
        uint64_t random = next_random(&state);
        if (random % 8 < 3)
            body[i] = arena + ((random >> 8) & UINT64_C(0x3fffff0));
        else if (random % 8 < 6)
            body[i] = (random >> 8) % 1000;
        else
            body[i] = 0;
    }
}

static void fill_random(uint64_t *body, uint64_t state)
{
    for (unsigned i = 0; i < WORKLOAD_BODY_WORDS; i++)
        body[i] = next_random(&state);
}

static uint64_t *page_at(const void *ram, uint64_t page)
{
    return (uint64_t *)ram + page * WORKLOAD_PAGE_WORDS;
}

void workload_fill(void *ram, uint64_t first_page, uint64_t page_count, enum workload_kind contents,
                   uint64_t seed)
{
    for (uint64_t index = first_page; index < first_page + page_count; index++) {
        enum workload_kind kind = workload_page_kind(contents, seed, index);
        if (kind == WORKLOAD_ZERO)
            continue;
        uint64_t *page = page_at(ram, index);
        uint64_t state = mix(seed, index);
        page[MAGIC_WORD] = WORKLOAD_MAGIC | kind;
        page[INDEX_WORD] = index;
        page[COUNTER_WORD] = 0;
        if (kind == WORKLOAD_TEXT)
            fill_text(page + WORKLOAD_HEADER_WORDS, state);
        else if (kind == WORKLOAD_HEAP)
            fill_heap(page + WORKLOAD_HEADER_WORDS, state);
        else
            fill_random(page + WORKLOAD_HEADER_WORDS, state);
        page[CHECKSUM_WORD] = checksum(page, seed);
    }
}

static bool is_all_zero(const uint64_t *page)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < WORKLOAD_PAGE_WORDS; i++)
        any |= page[i];
    return any == 0;
}

struct workload_judgement workload_judge(const void *ram, uint64_t first_page, uint64_t page_count,
                                         enum workload_kind contents, uint64_t seed,
                                         uint64_t *counters)
{
    struct workload_judgement judgement = {0, UINT64_MAX};
    for (uint64_t i = 0; i < page_count; i++) {
        const uint64_t *page = page_at(ram, first_page + i);
        enum workload_kind kind = workload_page_kind(contents, seed, first_page + i);
        bool is_right;
        if (page[MAGIC_WORD] == 0)
            is_right = kind == WORKLOAD_ZERO && is_all_zero(page);
        else
            is_right = page[MAGIC_WORD] == (WORKLOAD_MAGIC | kind) &&
                       page[INDEX_WORD] == first_page + i && page[COUNTER_WORD] != WORKLOAD_WRONG &&
                       page[CHECKSUM_WORD] == checksum(page, seed);
        counters[i] = is_right ? page[COUNTER_WORD] : WORKLOAD_WRONG;
        if (!is_right && judgement.wrong_pages++ == 0)
            judgement.first_wrong = first_page + i;
    }
    return judgement;
}

struct workload_judgement workload_judge_hole(uint64_t first_page, uint64_t page_count,
                                              enum workload_kind contents, uint64_t seed,
                                              uint64_t *counters)
{
    struct workload_judgement judgement = {0, UINT64_MAX};
    for (uint64_t i = 0; i < page_count; i++) {
        if (workload_page_kind(contents, seed, first_page + i) == WORKLOAD_ZERO)
            continue;
        counters[i] = WORKLOAD_WRONG;
        if (judgement.wrong_pages++ == 0)
            judgement.first_wrong = first_page + i;
    }
    return judgement;
}

/* One write: the counter goes up by one, and one window of the body turns by one word, so that what the
 * page is made of stays the same. The checksum gets the difference only (see the header). */
static void write_page(uint64_t *page, uint64_t index, uint32_t words, uint64_t seed)
{
    if (page[MAGIC_WORD] == 0) { /* kind zero, first write: the body is zero */
        page[MAGIC_WORD] = WORKLOAD_MAGIC | WORKLOAD_ZERO;
        page[INDEX_WORD] = index;
        page[CHECKSUM_WORD] = seed_part(seed) + page[MAGIC_WORD] * weight(MAGIC_WORD) +
                              index * weight(INDEX_WORD);
    }
    uint64_t difference = weight(COUNTER_WORD);
    uint64_t counter = page[COUNTER_WORD]++;
    if (words >= 2) {
        uint64_t *window =
            page + WORKLOAD_HEADER_WORDS + counter % (WORKLOAD_BODY_WORDS / words) * words;
        uint64_t first = window[0], total = 0;
        for (uint32_t i = 0; i < words; i++)
            total += window[i];
        memmove(window, window + 1, (words - 1) * sizeof *window);
        window[words - 1] = first;
        /* All but the first word lose 2 of their weight; the first gains 2 for each word it passed. */
        difference += 2 * (words * first - total);
    }
    page[CHECKSUM_WORD] += difference;
}

/* -- vCPUs ------------------------------------------------------------------------------------- */

enum order { PAUSE, RUN, STOP };

struct vcpu {
    struct workload *workload;
    pthread_t thread;
    uint64_t first_page, page_count; /* its share: no other vCPU writes there */
    uint64_t cursor;                 /* page in the share, below page_count */
    uint64_t random;
    _Atomic uint64_t writes;
    uint64_t epoch_ns, epoch_writes; /* the rate's schedule: writes since the epoch are due by time */
    uint64_t slice_began_ns;         /* of the throttle */
    struct dirty_ring ring;
};

struct workload {
    struct workload_options options;
    uint64_t vcpu_rate; /* bytes per second of one vCPU */
    _Atomic int order;  /* changed under `lock`, followed by a broadcast of `wake` */
    _Atomic unsigned throttle_percent;
    _Atomic bool is_counting; /* what the vCPUs dirty */
    pthread_mutex_t control; /* one caller of pause, resume, save, ... at a time */
    pthread_mutex_t lock;
    pthread_cond_t wake;   /* order or throttle changed (CLOCK_MONOTONIC) */
    pthread_cond_t parked; /* parked_count changed */
    uint64_t wake_count;   /* under `lock`: tells a wait that something changed since it was planned */
    uint32_t parked_count; /* under `lock` */
    uint32_t thread_count; /* threads that were started and are not joined */
    struct vcpu vcpu[WORKLOAD_VCPUS_MAX];
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* Sleep until `deadline_ns`, or until an order or another throttle comes. */
static void sleep_until(struct workload *workload, uint64_t deadline_ns)
{
    struct timespec deadline = {(time_t)(deadline_ns / SECOND_NS), (long)(deadline_ns % SECOND_NS)};
    pthread_mutex_lock(&workload->lock);
    uint64_t wake_count = workload->wake_count;
    while (atomic_load(&workload->order) == RUN && workload->wake_count == wake_count)
        if (pthread_cond_timedwait(&workload->wake, &workload->lock, &deadline) == ETIMEDOUT)
            break;
    pthread_mutex_unlock(&workload->lock);
}

/* Time that went by while nobody was to write is not made up for. */
static void restart_clock(struct vcpu *vcpu)
{
    vcpu->epoch_ns = vcpu->slice_began_ns = now_ns();
    vcpu->epoch_writes = 0;
    dirty_ring_restart(&vcpu->ring, vcpu->epoch_ns);
}

/* Stand until there is something to do; false: to end. */
static bool park(struct vcpu *vcpu)
{
    struct workload *workload = vcpu->workload;
    pthread_mutex_lock(&workload->lock);
    workload->parked_count++;
    pthread_cond_broadcast(&workload->parked);
    while (atomic_load(&workload->order) == PAUSE)
        pthread_cond_wait(&workload->wake, &workload->lock);
    workload->parked_count--;
    bool is_run = atomic_load(&workload->order) == RUN;
    pthread_mutex_unlock(&workload->lock);
    restart_clock(vcpu);
    return is_run;
}

/* The throttle's share of sleep. True: slept, look for orders first. */
static bool throttled(struct vcpu *vcpu, uint64_t now, unsigned percent)
{
    if (percent == 0) {
        vcpu->slice_began_ns = now;
        return false;
    }
    if (now - vcpu->slice_began_ns < THROTTLE_SLICE_NS)
        return false;
    sleep_until(vcpu->workload, now + THROTTLE_SLICE_NS * percent / (100 - percent));
    vcpu->slice_began_ns = now_ns();
    vcpu->epoch_ns += vcpu->slice_began_ns - now;
    return true;
}

/* Time after the epoch when `writes` of them are due; cannot overflow below 584 years of writes. */
static uint64_t due_ns(uint64_t writes, uint64_t rate)
{
    return (uint64_t)((unsigned __int128)writes * WORKLOAD_PAGE_SIZE * SECOND_NS / rate);
}

/* The rate's sleep. True: slept, look for orders first. */
static bool early(struct vcpu *vcpu, uint64_t now, uint64_t rate)
{
    uint64_t due = vcpu->epoch_ns + due_ns(vcpu->epoch_writes, rate);
    if (now >= due) {
        if (now - due > BACKLOG_NS)
            vcpu->epoch_ns += now - due - BACKLOG_NS;
        return false;
    }
    sleep_until(vcpu->workload, due > now + BURST_NS ? due : now + BURST_NS);
    return true;
}

/* The dirty limit's sleep. True: slept, look for orders first. */
static bool limited(struct vcpu *vcpu, uint64_t now)
{
    struct dirty_ring *ring = &vcpu->ring;
    dirty_ring_tick(ring, now);
    uint64_t due = dirty_ring_due(ring, now);
    if (due == 0)
        return false;
    sleep_until(vcpu->workload, due > now + BURST_NS ? due : now + BURST_NS);
    atomic_fetch_add_explicit(&ring->slept_ns, now_ns() - now, memory_order_relaxed);
    return true;
}

static uint64_t choose_page(struct vcpu *vcpu, enum workload_pattern pattern)
{
    uint64_t count = vcpu->page_count;
    if (pattern == WORKLOAD_SWEEP || pattern == WORKLOAD_APPEND) {
        uint64_t page = vcpu->cursor;
        vcpu->cursor = page + 1 < count ? page + 1 : 0;
        return page;
    }
    uint64_t random = next_random(&vcpu->random);
    if (pattern == WORKLOAD_SCATTER)
        return random % count;
    uint64_t hot_count = (count + 9) / 10, hot_first = (count - hot_count) / 2;
    if ((random >> 48) % 10 != 0)
        return hot_first + (random & UINT64_C(0xffffffffffff)) % hot_count;
    if (hot_count == count)
        return random % count;
    uint64_t cold = (random & UINT64_C(0xffffffffffff)) % (count - hot_count);
    return cold < hot_first ? cold : cold + hot_count;
}

static void write_next(struct vcpu *vcpu, const struct workload_options *options)
{
    uint64_t index = vcpu->first_page + choose_page(vcpu, options->pattern);
    write_page(page_at(options->ram, index), index, options->words_per_write, options->seed);
    uint64_t *bitmap = options->written_bitmap; /* changes only while we are parked */
    if (bitmap != NULL)
        __atomic_fetch_or(bitmap + index / 64, UINT64_C(1) << index % 64, __ATOMIC_RELEASE);
    uint64_t writes = atomic_load_explicit(&vcpu->writes, memory_order_relaxed);
    atomic_store_explicit(&vcpu->writes, writes + 1, memory_order_relaxed);
    vcpu->epoch_writes++;
    dirty_ring_note(&vcpu->ring, index - vcpu->first_page);
}

/* The kernel's struct sched_attr, first version (linux/sched/types.h). */
struct scheduling {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};
_Static_assert(sizeof(struct scheduling) == 48, "SCHED_ATTR_SIZE_VER0");

/* Ask for long slices: no more time than others get, but who wakes up (to pause us, say) goes first. Needs
 * Linux 6.12; without it all is the same but slower to pause on a busy machine. */
static void prefer_long_slices(void)
{
    struct scheduling attributes = {.size = sizeof attributes};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 ||
        attributes.policy != 0 /* SCHED_OTHER */)
        return;
    attributes.runtime = VCPU_SLICE_NS;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
}

static void *run_vcpu(void *argument)
{
    struct vcpu *vcpu = argument;
    struct workload *workload = vcpu->workload;
    prefer_long_slices();
    restart_clock(vcpu);
    while (atomic_load(&workload->order) == RUN || park(vcpu)) {
        unsigned percent = atomic_load_explicit(&workload->throttle_percent, memory_order_relaxed);
        bool has_limit = atomic_load_explicit(&vcpu->ring.limit_bytes_per_s, memory_order_relaxed) != 0;
        bool is_counting =
            has_limit || atomic_load_explicit(&workload->is_counting, memory_order_relaxed);
        bool is_clocked = workload->vcpu_rate != 0 || has_limit;
        if (is_clocked || ((percent != 0 || is_counting) && vcpu->epoch_writes % CLOCK_WRITES == 0)) {
            uint64_t now = now_ns();
            if (throttled(vcpu, now, percent))
                continue;
            if (workload->vcpu_rate != 0 && early(vcpu, now, workload->vcpu_rate))
                continue;
            if (is_counting && limited(vcpu, now))
                continue;
        }
        if (!is_counting)
            dirty_ring_rest(&vcpu->ring);
        write_next(vcpu, &workload->options);
    }
    return NULL;
}

/* -- control ----------------------------------------------------------------------------------- */

static void give_order(struct workload *workload, enum order order)
{
    pthread_mutex_lock(&workload->lock);
    atomic_store(&workload->order, order);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
    while (order == PAUSE && workload->parked_count < workload->thread_count)
        pthread_cond_wait(&workload->parked, &workload->lock);
    pthread_mutex_unlock(&workload->lock);
}

void workload_pause(struct workload *workload, uint64_t *took_ns)
{
    uint64_t took = 0;
    pthread_mutex_lock(&workload->control);
    if (atomic_load(&workload->order) == RUN) {
        uint64_t began = now_ns();
        give_order(workload, PAUSE);
        took = now_ns() - began;
    }
    pthread_mutex_unlock(&workload->control);
    if (took_ns != NULL)
        *took_ns = took;
}

void workload_resume(struct workload *workload)
{
    pthread_mutex_lock(&workload->control);
    if (atomic_load(&workload->order) == PAUSE)
        give_order(workload, RUN);
    pthread_mutex_unlock(&workload->control);
}

int workload_throttle(struct workload *workload, unsigned percent)
{
    if (percent > 99)
        return -EINVAL;
    pthread_mutex_lock(&workload->lock);
    atomic_store(&workload->throttle_percent, percent);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
    pthread_mutex_unlock(&workload->lock);
    return 0;
}

void workload_count_dirty(struct workload *workload, bool is_counting)
{
    atomic_store(&workload->is_counting, is_counting);
}

int workload_limit_dirty(struct workload *workload, uint32_t vcpu, uint64_t bytes_per_s)
{
    if (vcpu >= workload->options.vcpus)
        return -EINVAL;
    pthread_mutex_lock(&workload->lock);
    atomic_store(&workload->vcpu[vcpu].ring.limit_bytes_per_s, bytes_per_s);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
    pthread_mutex_unlock(&workload->lock);
    return 0;
}

void workload_dirtied(const struct workload *workload, uint64_t *pages, uint64_t *slept_ns)
{
    for (uint32_t i = 0; i < workload->options.vcpus; i++) {
        const struct dirty_ring *ring = &workload->vcpu[i].ring;
        pages[i] = atomic_load_explicit(&ring->dirty_pages, memory_order_relaxed);
        slept_ns[i] = atomic_load_explicit(&ring->slept_ns, memory_order_relaxed);
    }
}

void workload_set_bitmap(struct workload *workload, uint64_t *written_bitmap)
{
    pthread_mutex_lock(&workload->control);
    bool was_running = atomic_load(&workload->order) == RUN;
    if (was_running)
        give_order(workload, PAUSE);
    workload->options.written_bitmap = written_bitmap;
    if (was_running)
        give_order(workload, RUN);
    pthread_mutex_unlock(&workload->control);
}

uint32_t workload_vcpus(const struct workload *workload)
{
    return workload->options.vcpus;
}

uint64_t workload_page_count(const struct workload *workload)
{
    return workload->options.page_count;
}

void workload_writes(struct workload *workload, uint64_t *writes)
{
    for (uint32_t i = 0; i < workload->options.vcpus; i++)
        writes[i] = atomic_load_explicit(&workload->vcpu[i].writes, memory_order_relaxed);
}

void workload_stop(struct workload *workload)
{
    pthread_mutex_lock(&workload->control);
    give_order(workload, STOP);
    while (workload->thread_count > 0)
        pthread_join(workload->vcpu[--workload->thread_count].thread, NULL);
    pthread_mutex_unlock(&workload->control);
}

void workload_free(struct workload *workload)
{
    if (workload == NULL)
        return;
    workload_stop(workload);
    pthread_cond_destroy(&workload->parked);
    pthread_cond_destroy(&workload->wake);
    pthread_mutex_destroy(&workload->lock);
    pthread_mutex_destroy(&workload->control);
    for (uint32_t i = 0; i < workload->options.vcpus; i++)
        dirty_ring_free(&workload->vcpu[i].ring);
    free(workload);
}

/* -ENOMEM. */
static int deal_shares(struct workload *workload)
{
    const struct workload_options *options = &workload->options;
    uint64_t share = options->page_count / options->vcpus, rest = options->page_count % options->vcpus;
    uint64_t first_page = 0;
    for (uint32_t i = 0; i < options->vcpus; i++) {
        struct vcpu *vcpu = &workload->vcpu[i];
        vcpu->workload = workload;
        vcpu->first_page = first_page;
        vcpu->page_count = share + (i < rest ? 1 : 0);
        vcpu->random = mix(options->seed, UINT64_C(0x76637075) + i);
        if (options->pattern == WORKLOAD_SWEEP)
            vcpu->cursor = next_random(&vcpu->random) % vcpu->page_count;
        first_page += vcpu->page_count;
        if (dirty_ring_init(&vcpu->ring, vcpu->page_count) != 0)
            return -ENOMEM;
    }
    return 0;
}

static int start_threads(struct workload *workload)
{
    sigset_t all, before;
    int rc = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (uint32_t i = 0; i < workload->options.vcpus && rc == 0; i++) {
        rc = pthread_create(&workload->vcpu[i].thread, NULL, run_vcpu, &workload->vcpu[i]);
        if (rc == 0)
            workload->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

int workload_start(struct workload **workload, const struct workload_options *options)
{
    if (options->vcpus < 1 || options->vcpus > WORKLOAD_VCPUS_MAX ||
        options->page_count < options->vcpus || options->page_count > UINT64_C(1) << 32 ||
        options->pattern < WORKLOAD_SWEEP || options->pattern > WORKLOAD_APPEND ||
        options->words_per_write > WORKLOAD_BODY_WORDS || (uintptr_t)options->ram % 8 != 0)
        return -EINVAL;
    struct workload *made = calloc(1, sizeof *made);
    if (made == NULL)
        return -ENOMEM;
    made->options = *options;
    made->vcpu_rate = options->rate_bytes_per_s / options->vcpus;
    if (options->rate_bytes_per_s != 0 && made->vcpu_rate == 0)
        made->vcpu_rate = 1;
    atomic_store(&made->order, PAUSE);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&made->control, NULL);
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->wake, &monotonic);
    pthread_cond_init(&made->parked, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int rc = deal_shares(made);
    if (rc == 0)
        rc = start_threads(made);
    if (rc != 0) {
        workload_free(made);
        return rc;
    }
    *workload = made;
    return 0;
}

/* -- state ------------------------------------------------------------------------------------- */

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
