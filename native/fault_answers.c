/* What the source answers: checked against what was asked, then placed (faults.h). */
#include "fault_service.h"

#include "clock.h"

static int check_answer(struct fault_service *service, const struct frame *frame, size_t *index)
{
    const struct request *request;
    uint64_t unit, end;

    for (*index = 0; *index < service->open_count; ++*index)
        if (service->open[*index].id == frame->request)
            break;
    if (*index == service->open_count)
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
        request_forget(service, index);
    return 0;
}

int take_answers(struct fault_service *service, int channel, int *error)
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
