#define _GNU_SOURCE
#include "page_service.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "clock.h"
#include "fault_statistics.h"
#include "schedule.h"
#include "zero_scan.h"

/* What a destination may have open: see DEMANDS_MAX and ADVANCES_MAX in native/fault_service.h. */
#define DEMANDS_MAX ((size_t)1024)
#define ADVANCES_MAX ((size_t)64)

/* Pages answered before the next look for a demand: 64 KiB, about 30 us of a local connection. */
#define CHUNK_PAGES ((uint64_t)16)

/* Parts answered before the next look at orders: 4 MiB of small pages. */
#define PARTS_MAX 64

#define INPUT_BYTES ((size_t)65536)
#define OUTPUT_BYTES (FRAME_PAYLOAD_MAX + (CHUNK_PAGES + 1) * sizeof(struct frame))

struct request {
    uint64_t id, next, end; /* pages [next, end) have no answer yet; the largest block ends at 2^32 */
    uint16_t block;
    uint8_t kind;
};

struct queue {
    size_t first, count, capacity;
    struct request *requests;
};

struct page_service {
    struct stream stream;
    uint64_t last_request;
    struct request demands[DEMANDS_MAX], advances[ADVANCES_MAX];
    struct queue demand_queue, advance_queue;
    zero_scan_fn *scan;
    struct spinner spinner;
    uint64_t *words;
    size_t block_count;
    struct page_block blocks[];
};

int pages_open(struct page_service **service, const struct page_block *blocks, size_t count,
               const unsigned char *session, uint64_t *statistics)
{
    struct page_service *made = calloc(1, sizeof *made + count * sizeof *blocks);

    if (!made)
        return -ENOMEM;
    made->demand_queue = (struct queue){0, 0, DEMANDS_MAX, made->demands};
    made->advance_queue = (struct queue){0, 0, ADVANCES_MAX, made->advances};
    made->scan = zero_scan_default();
    made->spinner.spin_ns = 2 * spin_ns_here(); /* an answer's way and the next demand's */
    made->words = statistics;
    made->block_count = count;
    memcpy(made->blocks, blocks, count * sizeof *blocks);
    if (stream_open(&made->stream, session, FRAME_DEMAND, FRAME_REST, INPUT_BYTES, OUTPUT_BYTES) < 0) {
        pages_close(made);
        return -ENOMEM;
    }
    *service = made;
    return 0;
}

void pages_close(struct page_service *service)
{
    stream_close(&service->stream);
    free(service);
}

const char *pages_reason(const struct page_service *service)
{
    return service->stream.reason;
}

void pages_reconnect(struct page_service *service)
{
    stream_reset(&service->stream);
    service->last_request = 0;
    service->demand_queue.count = service->advance_queue.count = 0;
}

/* -- requests -------------------------------------------------------------------------------------- */

static int check_request(struct page_service *service, const struct frame *frame)
{
    const struct page_block *block = &service->blocks[frame->block - 1];
    uint64_t end = (uint64_t)frame->first_page + frame->page_count;

    if (frame->request <= service->last_request)
        return stream_refuse(&service->stream, "request %llu after %llu: replayed",
                             (unsigned long long)frame->request,
                             (unsigned long long)service->last_request);
    if (frame->block > service->block_count)
        return stream_refuse(&service->stream, "a request for RAM block %u of %zu", frame->block,
                             service->block_count);
    if (end > block->page_count)
        return stream_refuse(&service->stream,
                             "a request for pages %u and %u more of the %llu of RAM block %u",
                             frame->first_page, frame->page_count,
                             (unsigned long long)block->page_count, frame->block);
    if (frame->first_page % block->unit_pages != 0 || end % block->unit_pages != 0)
        return stream_refuse(&service->stream,
                             "a request for pages %u and %u more, which are not whole pages of %llu",
                             frame->first_page, frame->page_count,
                             (unsigned long long)block->unit_pages);
    return 0;
}

static int take_request(struct page_service *service, const struct frame *frame)
{
    struct queue *queue =
        frame->kind == FRAME_DEMAND ? &service->demand_queue : &service->advance_queue;

    if (check_request(service, frame) < 0)
        return -1;
    if (queue->count == queue->capacity)
        return stream_refuse(&service->stream, "more than %zu requests at once", queue->capacity);
    queue->requests[(queue->first + queue->count++) % queue->capacity] =
        (struct request){frame->request, frame->first_page,
                         (uint64_t)frame->first_page + frame->page_count, frame->block, frame->kind};
    service->last_request = frame->request;
    statistics_add(service->words, PAGE_REQUESTS, 1);
    if (frame->kind == FRAME_DEMAND)
        statistics_set(service->words, PAGE_LAST,
                       (((uint64_t)frame->block - 1) << 32 | frame->first_page) + 1);
    return 0;
}

static int take_requests(struct page_service *service, int channel)
{
    struct frame frame;
    const unsigned char *payload;
    int rc;

    if (stream_fill(&service->stream, channel) < 0)
        return -1;
    while ((rc = stream_next(&service->stream, &frame, &payload)) != 0)
        if (rc < 0 || take_request(service, &frame) < 0)
            return -1;
    return 0;
}

/* -- answers --------------------------------------------------------------------------------------- */

/* Take the unit's dirty bits; whether it had any. */
static bool take_unit(bitmap_word *dirty, uint64_t first, uint64_t unit)
{
    uint64_t end = first + unit, taken = 0;

    for (uint64_t word = first / 64; word <= (end - 1) / 64; ++word) {
        uint64_t mask = word_mask(word, first, end);

        taken |= mask & atomic_fetch_and(&dirty[word], ~mask);
    }
    return taken != 0;
}

/* Read a unit through the descriptor: holes stay holes, and a file cut short is an error, no signal. */
static int read_unit(const struct page_block *block, uint64_t page, unsigned char *output)
{
    size_t size = (size_t)block->unit_pages * PAGE_BYTES, got = 0;

    while (got < size) {
        ssize_t part = pread(block->fd, output + got, size - got, (off_t)(page * PAGE_BYTES + got));

        if (part < 0 && errno == EINTR)
            continue;
        if (part <= 0)
            return part < 0 ? -errno : -EIO;
        got += (size_t)part;
    }
    return 0;
}

/* Find out how a unit is answered; FRAME_DATA leaves its bytes at `output`. Returns the kind or
 * -errno. */
static int answer_kind(struct page_service *service, const struct page_block *block,
                       const struct request *request, unsigned char *output)
{
    bool was_ours = take_unit(block->dirty, request->next, block->unit_pages);
    unsigned char is_zero;
    int rc;

    if (!was_ours && request->kind == FRAME_PREFETCH)
        return FRAME_SKIPPED;
    rc = read_unit(block, request->next, output);
    if (rc < 0)
        return rc;
    service->scan(output, 1, (size_t)block->unit_pages * PAGE_BYTES, &is_zero);
    return is_zero ? FRAME_ZERO : FRAME_DATA;
}

static void count_answer(struct page_service *service, const struct request *request, int kind,
                         uint64_t pages)
{
    static const size_t CAUSES[] = {
        [FRAME_DEMAND] = PAGE_DEMAND_PAGES,
        [FRAME_PREFETCH] = PAGE_PREFETCH_PAGES,
        [FRAME_REST] = PAGE_REST_PAGES,
    };

    statistics_add(service->words,
                   kind == FRAME_SKIPPED ? PAGE_SKIPPED_PAGES : CAUSES[request->kind], pages);
    if (kind == FRAME_ZERO)
        statistics_add(service->words, PAGE_ZERO_PAGES, pages);
}

/* Put the next part of the answer: at most CHUNK_PAGES or one unit, a frame for each run of units that
 * are answered alike. The output is empty. Returns 0 or -errno. */
static int answer(struct page_service *service, struct request *request)
{
    const struct page_block *block = &service->blocks[request->block - 1];
    const size_t unit_bytes = (size_t)block->unit_pages * PAGE_BYTES;
    struct stream *stream = &service->stream;
    struct frame frame = {.request = request->id, .block = request->block};
    unsigned char *header = stream_end(stream);
    uint64_t pages = 0;

    while (request->next < request->end && pages < CHUNK_PAGES) {
        unsigned char *output = stream_end(stream);
        bool continues = frame.kind == FRAME_DATA;
        int kind = answer_kind(service, block, request,
                               continues ? output : output + sizeof frame);

        if (kind < 0)
            return kind;
        if (frame.kind != 0 && frame.kind != kind)
            stream_put(stream, header, frame);
        if (continues && kind == FRAME_DATA) {
            stream->output_to += unit_bytes;
        } else if (frame.kind != kind) {
            header = output;
            stream->output_to += sizeof frame + (kind == FRAME_DATA ? unit_bytes : 0);
            frame.kind = (uint8_t)kind;
            frame.first_page = (uint32_t)request->next;
            frame.page_count = frame.payload_bytes = 0;
        }
        frame.page_count += (uint32_t)block->unit_pages;
        frame.payload_bytes += kind == FRAME_DATA ? (uint32_t)unit_bytes : 0;
        count_answer(service, request, kind, block->unit_pages);
        request->next += block->unit_pages;
        pages += block->unit_pages;
    }
    stream_put(stream, header, frame);
    statistics_add(service->words, PAGE_BYTES_SENT, stream->output_to);
    return 0;
}

/* Answer a part of the first request. Returns 1, 0 when there is none, or -errno. */
static int answer_next(struct page_service *service)
{
    struct queue *queue =
        service->demand_queue.count > 0 ? &service->demand_queue : &service->advance_queue;
    struct request *request = &queue->requests[queue->first];
    int rc;

    if (queue->count == 0)
        return 0;
    rc = answer(service, request);
    if (rc < 0)
        return rc;
    if (request->next == request->end) {
        queue->first = (queue->first + 1) % queue->capacity;
        --queue->count;
    }
    return 1;
}

/* -- the loop -------------------------------------------------------------------------------------- */

/* Fill the socket as far as it goes, looking for a demand between two parts. Returns 1 when nothing is
 * left to answer, 0 when the socket is full, 2 when it is time to look at orders, -1 with a reason, or
 * -errno in *error. */
static int answer_all(struct page_service *service, int channel, int *error)
{
    for (int parts = 0;; ++parts) {
        int rc = stream_flush(&service->stream, channel);

        if (rc <= 0)
            return rc;
        if (parts == PARTS_MAX)
            return 2;
        *error = answer_next(service);
        if (*error <= 0)
            return 1;
        *error = 0;
        if (service->demand_queue.count == 0 && service->advance_queue.count > 0 &&
            take_requests(service, channel) < 0)
            return -1;
    }
}

int pages_run(struct page_service *service, int channel, int wake_fd, int wait_ms)
{
    uint64_t until_ns = monotonic_ns() + (uint64_t)wait_ms * 1000000;
    int error = 0;

    for (;;) {
        struct pollfd polled[2] = {{wake_fd, POLLIN, 0}, {channel, POLLIN, 0}};
        int rc = channel >= 0 ? answer_all(service, channel, &error) : 1;
        uint64_t now_ns = monotonic_ns();

        if (error < 0)
            return error;
        if (rc < 0)
            return PAGES_LOST;
        if (now_ns >= until_ns)
            return 0;
        if (rc == 0)
            polled[1].events |= POLLOUT;
        if (poll_modestly(&service->spinner, polled, 2,
                          rc == 2 ? 0 : (int)((until_ns - now_ns + 999999) / 1000000)) < 0 &&
            errno != EINTR)
            return -errno;
        if (polled[1].revents & (POLLIN | POLLERR | POLLHUP) &&
            take_requests(service, channel) < 0)
            return PAGES_LOST;
        if (polled[0].revents)
            return PAGES_WOKEN;
    }
}
