#define _GNU_SOURCE
#include "faults.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "clock.h"
#include "fault_service.h"
#include "linux_abi.h"
#include "schedule.h"
#include "userfault.h"

/* A fault is news only near one of the last faults: random ones say nothing about the next, and each
 * costs the prefetcher as long as the answer takes. engine/postcopy/prefetch.py looks no further. */
#define NEAR_PAGES ((uint64_t)256)
#define EVENTS_MAX ((size_t)16) /* read at once */

/* Every request fits at once, so sending one never waits. */
#define OUTPUT_BYTES ((DEMANDS_MAX + ADVANCES_MAX) * sizeof(struct frame))
#define INPUT_BYTES (FRAME_PAYLOAD_MAX + 64 * PAGE_BYTES)
_Static_assert(INPUT_BYTES >= sizeof(struct frame) + FRAME_PAYLOAD_MAX, "any answer fits");

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
    if (stream_open(&made->stream, session, FRAME_DATA, FRAME_SKIPPED, INPUT_BYTES, OUTPUT_BYTES) < 0)
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
    statistics_set(statistics, FAULT_OPEN, 0); /* a predecessor's */
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
        request_pages(service, FRAME_DEMAND, index, page, page + unit);
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
    size_t room = DEMANDS_MAX - service->demand_count, count;
    ssize_t size;

    if (room == 0) /* taken by the userfaultfds before this one */
        return 0;
    size = read(uffd, events, (room < EVENTS_MAX ? room : EVENTS_MAX) * sizeof events[0]);
    count = size < 0 ? 0 : (size_t)size / sizeof events[0];
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
    happened |= request_rest(service);
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
