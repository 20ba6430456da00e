/* What is asked of the source: demands, prefetches and the rest (faults.h). */
#include "fault_service.h"

#include <string.h>

#define PREFETCH_PAGES_MAX ((uint64_t)128) /* on their way; a demand's answer may be behind them */
_Static_assert(PREFETCH_PAGES_MAX <= FRAME_PAGES_MAX, "one request can ask for all, or one huge page");
#define RESTS_MAX ((size_t)4)
#define REST_PAGES ((uint64_t)64)

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

void request_pages(struct fault_service *service, uint8_t kind, uint64_t block, uint64_t first,
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

void request_forget(struct fault_service *service, size_t index)
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

        while (page < end && service->prefetch_pages + (page - from) < PREFETCH_PAGES_MAX &&
               !has_bit(block->demanded, page) && !has_bit(block->prefetched, page) &&
               !is_received(block->to.received, page, unit)) {
            set_bit(block->prefetched, page);
            page += unit;
        }
        if (page == from) {
            page += unit;
            continue;
        }
        request_pages(service, FRAME_PREFETCH, index, from, page);
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

int request_rest(struct fault_service *service)
{
    while (service->fetches_rest && service->rest_count < RESTS_MAX) {
        bool from_start = service->rest_block == 0 && service->rest_page == 0;
        bool may_ask = service->is_connected && has_room(service, FRAME_REST);
        uint64_t first, end;

        if (from_start ? service->rest_count > 0 : !may_ask)
            break; /* look again when the answers are there, or a connection */
        if (next_rest(service, &first, &end)) {
            if (may_ask) {
                request_pages(service, FRAME_REST, service->rest_block, first, end);
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
