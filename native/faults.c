#define _GNU_SOURCE
#include "faults.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "fault_statistics.h"
#include "linux_abi.h"
#include "schedule.h"
#include "userfault.h"

/* Requests without an answer. A source takes at most so many, see native/page_service.c; threads that
 * fault beyond wait in the kernel, unread. */
#define DEMANDS_MAX ((size_t)1024)
#define ADVANCES_MAX ((size_t)64) /* prefetches and rests */
#define PREFETCH_PAGES_MAX ((uint64_t)128) /* on their way; a demand's answer may be behind them */
#define RESTS_MAX ((size_t)4)
#define REST_PAGES ((uint64_t)64)
#define NEWS_MAX ((size_t)64)

/* A fault is news only near one of the last faults: random ones say nothing about the next, and each
 * costs the prefetcher as long as the answer takes. engine/postcopy/prefetch.py looks no further. */
#define NEAR_PAGES ((uint64_t)256)
#define RECENT_MAX ((size_t)16)
#define EVENTS_MAX ((size_t)16) /* read at once */
#define UFFDS_MAX ((size_t)256)

/* Every request fits at once, so sending one never waits. */
#define OUTPUT_BYTES ((DEMANDS_MAX + ADVANCES_MAX) * sizeof(struct frame))
#define INPUT_BYTES (FRAME_PAYLOAD_MAX + 64 * PAGE_BYTES)

struct request {
    uint64_t id, block, next, end; /* pages [next, end) have no answer yet */
    uint8_t kind;
};

struct news {
    uint64_t block, page;
};

struct fault_service {
    struct stream stream;
    uint64_t last_request;
    uint64_t spin_ns; /* while a demand is open: the vCPU that waits leaves its processor to us */
    size_t open_count, demand_count, rest_count;
    uint64_t prefetch_pages; /* without an answer */
    struct request open[DEMANDS_MAX + ADVANCES_MAX];
    size_t recent_count; /* of all faults; the last RECENT_MAX are in `recent` */
    struct news recent[RECENT_MAX];
    size_t news_first, news_count;
    struct news news[NEWS_MAX];
    struct waiting waiting;
    uint64_t *words;
    bool wants_news, is_connected, fetches_rest;
    uint64_t rest_block, rest_page; /* what was not looked at yet */
    size_t uffd_count;
    struct pollfd polled[UFFDS_MAX + 2]; /* wake_fd, channel, then each userfaultfd once */
    size_t block_count;
    struct fault_block blocks[];
};

int faults_open(struct fault_service **service, const struct fault_block *blocks, size_t count,
                const unsigned char *session, uint64_t *statistics, uint64_t vcpus,
                bool wants_news)
{
    struct fault_service *made;

    if (count > UFFDS_MAX)
        return -EINVAL;
    made = calloc(1, sizeof *made + count * sizeof *blocks);
    if (!made)
        return -ENOMEM;
    made->words = made->waiting.words = statistics;
    made->waiting.vcpus = vcpus;
    made->wants_news = wants_news;
    made->spin_ns = spin_ns_here();
    if (stream_open(&made->stream, session, INPUT_BYTES, OUTPUT_BYTES) < 0)
        goto no_memory;
    for (size_t i = 0; i < count; ++i) {
        struct fault_block *block = &made->blocks[i];
        size_t words = (size_t)((blocks[i].page_count + 63) / 64), known = 0;

        *block = blocks[i];
        ++made->block_count;
        block->demanded = calloc(words, sizeof *block->demanded);
        block->prefetched = calloc(words, sizeof *block->prefetched);
        if (!block->demanded || !block->prefetched)
            goto no_memory;
        while (known < made->uffd_count && made->polled[2 + known].fd != block->to.uffd)
            ++known;
        if (known == made->uffd_count)
            made->polled[2 + made->uffd_count++].fd = block->to.uffd;
    }
    statistics[FAULT_OPEN] = 0; /* a predecessor's */
    *service = made;
    return 0;

no_memory:
    faults_close(made);
    return -ENOMEM;
}

void faults_close(struct fault_service *service)
{
    for (size_t i = 0; i < service->block_count; ++i) {
        free(service->blocks[i].demanded);
        free(service->blocks[i].prefetched);
    }
    stream_close(&service->stream);
    free(service);
}

const char *faults_reason(const struct fault_service *service)
{
    return service->stream.reason;
}

int faults_wake_all(struct fault_service *service)
{
    for (size_t i = 0; i < service->block_count; ++i) {
        int rc = wake_pages(&service->blocks[i].to, 0, service->blocks[i].page_count);

        if (rc < 0)
            return rc;
    }
    return 0;
}

/* -- bits that are ours alone ---------------------------------------------------------------------- */

static bool has_bit(const bitmap_word *bitmap, uint64_t page)
{
    return atomic_load_explicit(&bitmap[page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

static void set_bit(bitmap_word *bitmap, uint64_t page)
{
    atomic_fetch_or_explicit(&bitmap[page / 64], UINT64_C(1) << (page % 64), memory_order_relaxed);
}

static void clear_bit(bitmap_word *bitmap, uint64_t page)
{
    atomic_fetch_and_explicit(&bitmap[page / 64], ~(UINT64_C(1) << (page % 64)),
                              memory_order_relaxed);
}

/* -- requests -------------------------------------------------------------------------------------- */

static void put_request(struct fault_service *service, const struct request *request)
{
    struct frame frame = {.kind = request->kind,
                          .request = request->id,
                          .first_page = (uint32_t)request->next,
                          .page_count = (uint32_t)(request->end - request->next),
                          .block = (uint16_t)(request->block + 1)};

    stream_put(&service->stream, stream_end(&service->stream), frame);
    service->stream.output_to += sizeof frame;
    statistics_add(service->words, FAULT_REQUESTS, 1);
}

static bool has_room(struct fault_service *service, uint8_t kind)
{
    if (kind == FRAME_DEMAND)
        return service->demand_count < DEMANDS_MAX;
    return service->is_connected && service->open_count - service->demand_count < ADVANCES_MAX &&
           stream_room(&service->stream) >= sizeof(struct frame);
}

/* The caller made sure of room. */
static void ask(struct fault_service *service, uint8_t kind, uint64_t block, uint64_t first,
                uint64_t end)
{
    struct request *request = &service->open[service->open_count++];

    *request = (struct request){++service->last_request, block, first, end, kind};
    service->demand_count += kind == FRAME_DEMAND;
    service->rest_count += kind == FRAME_REST;
    service->prefetch_pages += kind == FRAME_PREFETCH ? end - first : 0;
    if (kind == FRAME_DEMAND)
        statistics_add(service->words, FAULT_OPEN, 1);
    if (service->is_connected && stream_room(&service->stream) >= sizeof(struct frame))
        put_request(service, request);
    else /* without a connection it is sent later; room there is always, by OUTPUT_BYTES */
        service->is_connected = false;
}

static void forget(struct fault_service *service, size_t index)
{
    const struct request *request = &service->open[index];

    service->demand_count -= request->kind == FRAME_DEMAND;
    service->rest_count -= request->kind == FRAME_REST;
    if (request->kind == FRAME_DEMAND)
        statistics_add(service->words, FAULT_OPEN, ~UINT64_C(0)); /* minus 1 */
    --service->open_count; /* the order stays: answers come in it, the search is short */
    memmove(&service->open[index], &service->open[index + 1],
            (service->open_count - index) * sizeof *request);
}

void faults_reconnect(struct fault_service *service)
{
    size_t kept = 0;

    stream_reset(&service->stream);
    service->is_connected = true;
    service->last_request = 0;
    for (size_t i = 0; i < service->open_count; ++i)
        if (service->open[i].kind == FRAME_DEMAND)
            service->open[kept++] = service->open[i];
    service->open_count = service->demand_count = kept;
    service->rest_count = 0;
    service->prefetch_pages = 0;
    service->rest_block = service->rest_page = 0;
    for (size_t i = 0; i < kept; ++i) {
        service->open[i].id = ++service->last_request;
        put_request(service, &service->open[i]);
    }
    for (size_t i = 0; i < service->block_count; ++i) {
        struct fault_block *block = &service->blocks[i];

        memset((void *)block->prefetched, 0, (size_t)((block->page_count + 63) / 64) * 8);
    }
}

bool faults_has_range(const struct fault_service *service, uint64_t block, uint64_t first_page,
                      uint64_t page_count)
{
    return block < service->block_count && first_page <= service->blocks[block].page_count &&
           page_count <= service->blocks[block].page_count - first_page;
}

uint64_t faults_prefetch(struct fault_service *service, uint64_t index, uint64_t first_page,
                         uint64_t page_count)
{
    struct fault_block *block = &service->blocks[index];
    uint64_t unit = block->to.unit_pages, asked = 0, page = first_page / unit * unit;
    uint64_t end = first_page + page_count;

    while (page < end && service->prefetch_pages < PREFETCH_PAGES_MAX &&
           has_room(service, FRAME_PREFETCH)) {
        uint64_t from = page;

        while (page < end && page - from < FRAME_PAGES_MAX && !has_bit(block->demanded, page) &&
               !has_bit(block->prefetched, page) && !is_received(block->to.received, page, unit)) {
            set_bit(block->prefetched, page);
            page += unit;
        }
        if (page == from) {
            page += unit;
            continue;
        }
        ask(service, FRAME_PREFETCH, index, from, page);
        asked += page - from;
    }
    return asked;
}

void faults_fetch_rest(struct fault_service *service)
{
    service->fetches_rest = true;
    service->rest_block = service->rest_page = 0;
}

/* The first page from `page` on whose unit is not received; page_count when there is none. */
static uint64_t next_missing(const struct fault_block *block, uint64_t page)
{
    while (page < block->page_count) {
        if (page % 64 == 0 && atomic_load(&block->to.received[page / 64]) == ~UINT64_C(0) &&
            block->to.unit_pages == 1)
            page += 64;
        else if (is_received(block->to.received, page, block->to.unit_pages))
            page += block->to.unit_pages;
        else
            return page;
    }
    return block->page_count;
}

/* Find the next pages that are not received; false behind the last block. */
static bool next_rest(struct fault_service *service, uint64_t *first, uint64_t *end)
{
    for (; service->rest_block < service->block_count; ++service->rest_block) {
        const struct fault_block *block = &service->blocks[service->rest_block];
        uint64_t unit = block->to.unit_pages, page = next_missing(block, service->rest_page);

        *first = page;
        while (page < block->page_count && page - *first < (unit > 1 ? unit : REST_PAGES) &&
               !is_received(block->to.received, page, unit))
            page += unit;
        service->rest_page = *end = page;
        if (*first < page)
            return true;
        service->rest_page = 0;
    }
    return false;
}

/* Ask for some of the rest. Returns FAULTS_COMPLETE when a whole look found nothing missing. */
static int fetch_rest(struct fault_service *service)
{
    while (service->fetches_rest && service->rest_count < RESTS_MAX) {
        bool from_start = service->rest_block == 0 && service->rest_page == 0;
        bool may_ask = service->is_connected && has_room(service, FRAME_REST);
        uint64_t first, end;

        if (from_start ? service->rest_count > 0 : !may_ask)
            break; /* look again when the answers are there, or a connection */
        if (next_rest(service, &first, &end)) {
            if (may_ask) {
                ask(service, FRAME_REST, service->rest_block, first, end);
                continue;
            }
            service->rest_block = service->rest_page = 0;
            break;
        }
        service->rest_block = service->rest_page = 0;
        if (from_start) {
            service->fetches_rest = false;
            return FAULTS_COMPLETE;
        }
    }
    return 0;
}

/* -- answers --------------------------------------------------------------------------------------- */

static int check_answer(struct fault_service *service, const struct frame *frame, size_t *index)
{
    const struct request *request;
    uint64_t unit, end;

    for (*index = 0; *index < service->open_count; ++*index)
        if (service->open[*index].id == frame->request)
            break;
    if (frame->kind < FRAME_DATA || *index == service->open_count)
        return stream_refuse(&service->stream, "an answer to request %llu, which is not open",
                             (unsigned long long)frame->request);
    request = &service->open[*index];
    unit = service->blocks[request->block].to.unit_pages;
    end = (uint64_t)frame->first_page + frame->page_count;
    if (frame->block != request->block + 1 || frame->first_page != request->next ||
        end > request->end || frame->page_count % unit != 0)
        return stream_refuse(&service->stream,
                             "pages %u and %u more of RAM block %u are not what was asked for",
                             frame->first_page, frame->page_count, frame->block);
    if (frame->kind == FRAME_SKIPPED && request->kind != FRAME_PREFETCH)
        return stream_refuse(&service->stream, "a request that cannot be skipped was");
    return 0;
}

static size_t cause_word(uint8_t kind)
{
    return kind == FRAME_DEMAND     ? FAULT_DEMAND_PAGES
           : kind == FRAME_PREFETCH ? FAULT_PREFETCH_PAGES
                                    : FAULT_REST_PAGES;
}

/* Place an answer. A zero page is placed only where somebody waits for it. */
static int place(struct fault_service *service, uint64_t index, const struct frame *frame,
                 const unsigned char *payload, uint8_t kind)
{
    struct fault_block *block = &service->blocks[index];
    struct inserted_pages counts = {0, 0};
    size_t word = cause_word(kind);
    int rc;

    /* A zero page that came in advance while this demand was under way is counted already. */
    if (frame->kind == FRAME_ZERO && kind == FRAME_DEMAND &&
        is_received(block->to.received, frame->first_page, frame->page_count))
        word = FAULT_ZERO_PAGES;
    if (frame->kind == FRAME_ZERO && kind != FRAME_DEMAND) {
        uint32_t run[2] = {frame->first_page, frame->page_count};
        int64_t newly = insert_zero_runs(&block->to, (const unsigned char *)run, 1);

        counts.fresh = newly < 0 ? 0 : (uint64_t)newly;
        counts.present = frame->page_count - counts.fresh;
        rc = newly < 0 ? (int)newly : 0;
    } else {
        rc = insert_pages(&block->to, frame->kind == FRAME_ZERO ? NULL : payload,
                          frame->first_page, frame->page_count, &counts);
    }
    statistics_add(service->words, word, counts.fresh);
    statistics_add(service->words, FAULT_PRESENT_PAGES, counts.present);
    if (rc == 0)
        waiting_end(&service->waiting, index, frame->first_page, frame->page_count, monotonic_ns());
    return rc;
}

/* Take one answer. Returns 0, -1 with a reason, or -errno (never -EPERM) in *error. */
static int take_answer(struct fault_service *service, const struct frame *frame,
                       const unsigned char *payload, int *error)
{
    struct request *request;
    struct fault_block *block;
    size_t index;

    if (check_answer(service, frame, &index) < 0)
        return -1;
    request = &service->open[index];
    block = &service->blocks[request->block];
    if (frame->kind == FRAME_SKIPPED)
        statistics_add(service->words, FAULT_SKIPPED_PAGES, frame->page_count);
    else
        *error = place(service, request->block, frame, payload, request->kind);
    if (*error < 0)
        return 0; /* it stays open */
    request->next += frame->page_count;
    if (request->kind == FRAME_PREFETCH)
        service->prefetch_pages -= frame->page_count;
    if (request->kind == FRAME_DEMAND)
        clear_bit(block->demanded, frame->first_page);
    if (request->next == request->end)
        forget(service, index);
    return 0;
}

static int take_answers(struct fault_service *service, int channel, int *error)
{
    struct frame frame;
    const unsigned char *payload;
    int rc;

    if (stream_fill(&service->stream, channel) < 0)
        return -1;
    while (*error == 0 && (rc = stream_next(&service->stream, &frame, &payload)) != 0)
        if (rc < 0 || take_answer(service, &frame, payload, error) < 0)
            return -1;
    return 0;
}

/* -- faults ---------------------------------------------------------------------------------------- */

/* Whether one of the last faults was near; this one is remembered. */
static bool is_near(struct fault_service *service, uint64_t block, uint64_t page)
{
    bool near = false;

    for (size_t i = 0; i < RECENT_MAX && i < service->recent_count; ++i) {
        const struct news *recent = &service->recent[i];
        uint64_t distance = recent->page > page ? recent->page - page : page - recent->page;

        near = near || (recent->block == block && distance <= NEAR_PAGES);
    }
    service->recent[service->recent_count++ % RECENT_MAX] = (struct news){block, page};
    return near;
}

static void note_news(struct fault_service *service, uint64_t block, uint64_t page)
{
    size_t last = (service->news_first + service->news_count) % NEWS_MAX;

    if (!service->wants_news || !is_near(service, block, page))
        return;
    service->news[last] = (struct news){block, page};
    if (service->news_count < NEWS_MAX)
        ++service->news_count;
    else
        service->news_first = (service->news_first + 1) % NEWS_MAX;
}

bool faults_news(struct fault_service *service, uint64_t *block, uint64_t *page)
{
    if (service->news_count == 0)
        return false;
    *block = service->news[service->news_first].block;
    *page = service->news[service->news_first].page;
    service->news_first = (service->news_first + 1) % NEWS_MAX;
    --service->news_count;
    return true;
}

/* A vCPU waits for a unit. Returns 0 or -errno. */
static int take_fault(struct fault_service *service, uint64_t index, uint64_t page, uint32_t thread)
{
    struct fault_block *block = &service->blocks[index];
    uint64_t unit = block->to.unit_pages;

    if (is_received(block->to.received, page, unit)) {
        struct inserted_pages counts = {0, 0}; /* there already, or a hole that is zero */
        int rc = insert_pages(&block->to, NULL, page, unit, &counts);

        statistics_add(service->words, FAULT_ZERO_PAGES, counts.fresh);
        waiting_end(&service->waiting, index, page, unit, monotonic_ns());
        return rc;
    }
    waiting_begin(&service->waiting, thread, index, page, monotonic_ns());
    note_news(service, index, page);
    if (!has_bit(block->demanded, page)) {
        set_bit(block->demanded, page);
        ask(service, FRAME_DEMAND, index, page, page + unit);
    }
    return 0;
}

static int take_event(struct fault_service *service, int uffd, const struct uffd_msg *event)
{
    uint64_t address = event->arg.pagefault.address;

    for (uint64_t i = 0; event->event == UFFD_EVENT_PAGEFAULT && i < service->block_count; ++i) {
        const struct fault_block *block = &service->blocks[i];
        uint64_t page = (address - block->to.address) / PAGE_BYTES;

        if (block->to.uffd == uffd && address >= block->to.address && page < block->page_count)
            return take_fault(service, i, page / block->to.unit_pages * block->to.unit_pages,
                              event->arg.pagefault.feat.ptid);
    }
    statistics_add(service->words, FAULT_STRAY_EVENTS, 1);
    return 0;
}

static int take_events(struct fault_service *service, int uffd)
{
    struct uffd_msg events[EVENTS_MAX];
    size_t room = DEMANDS_MAX - service->demand_count;
    ssize_t size = read(uffd, events, (room < EVENTS_MAX ? room : EVENTS_MAX) * sizeof events[0]);
    size_t count = size < 0 ? 0 : (size_t)size / sizeof events[0];

    if (size < 0 && errno != EAGAIN && errno != EINTR)
        return -errno;
    statistics_add(service->words, FAULT_EVENTS, count);
    for (size_t i = 0; i < count; ++i) {
        int rc = take_event(service, uffd, &events[i]);

        if (rc < 0)
            return rc; /* events behind it were read: whoever comes next wakes all */
    }
    return 0;
}

/* -- the loop -------------------------------------------------------------------------------------- */

static void watch(struct fault_service *service, int channel, int wake_fd)
{
    bool hears = service->demand_count < DEMANDS_MAX;

    service->polled[0] = (struct pollfd){wake_fd, POLLIN, 0};
    service->polled[1] = (struct pollfd){channel, POLLIN, 0};
    if (service->stream.output_from < service->stream.output_to)
        service->polled[1].events |= POLLOUT;
    for (size_t i = 2; i < service->uffd_count + 2; ++i)
        service->polled[i].events = hears ? POLLIN : 0;
}

static int serve_once(struct fault_service *service, int channel, int wait_ms, int *error)
{
    int happened = 0;

    /* The page service does not: beside a background it would take the processor that the vCPU needs. */
    if (poll_soon(service->polled, (nfds_t)service->uffd_count + 2, wait_ms,
                  service->demand_count ? service->spin_ns : 0) < 0) {
        *error = errno == EINTR ? 0 : -errno;
        return 0;
    }
    if (service->polled[0].revents)
        happened |= FAULTS_WOKEN;
    if (channel >= 0 && service->polled[1].revents & (POLLIN | POLLERR | POLLHUP) &&
        take_answers(service, channel, error) < 0)
        happened |= FAULTS_LOST;
    for (size_t i = 2; *error == 0 && i < service->uffd_count + 2; ++i)
        if (service->polled[i].revents & POLLIN)
            *error = take_events(service, service->polled[i].fd);
        else if (service->polled[i].revents)
            *error = -ESRCH; /* the guest is gone */
    happened |= fetch_rest(service);
    if (channel >= 0 && !(happened & FAULTS_LOST) && stream_flush(&service->stream, channel) < 0)
        happened |= FAULTS_LOST;
    if (channel >= 0 && !service->is_connected)
        happened |= FAULTS_LOST;
    if (happened & FAULTS_LOST)
        service->is_connected = false;
    return happened | (service->news_count > 0 ? FAULTS_NEWS : 0);
}

int faults_run(struct fault_service *service, int channel, int wake_fd, int wait_ms)
{
    uint64_t until_ns = monotonic_ns() + (uint64_t)wait_ms * 1000000;
    int happened = 0, error = 0;

    if (channel >= 0 && stream_flush(&service->stream, channel) < 0) {
        service->is_connected = false;
        return FAULTS_LOST;
    }
    while (happened == 0 && error == 0) {
        uint64_t now_ns = monotonic_ns();

        if (now_ns >= until_ns && wait_ms > 0)
            break;
        watch(service, channel, wake_fd);
        happened = serve_once(service, channel, (int)((until_ns - now_ns + 999999) / 1000000),
                              &error);
        if (wait_ms == 0)
            break;
    }
    return error < 0 ? error : happened;
}
