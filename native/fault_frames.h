/* Frames of the fault channel, as they lie on the wire: engine/wire/postcopy.py is their contract.
 *
 * A stream end checks magic, version, session, sequence, direction and limits here; what a frame may ask
 * for or answer is checked by whoever takes it. */
#ifndef RAMFERRY_FAULT_FRAMES_H
#define RAMFERRY_FAULT_FRAMES_H

#include <sys/types.h>

#include "insertion.h"

#define FRAME_PAGES_MAX HUGE_UNIT_PAGES
#define FRAME_PAYLOAD_MAX (FRAME_PAGES_MAX * PAGE_BYTES)

enum frame_kind {
    FRAME_DEMAND = 3, /* destination -> source: a vCPU waits; always answered, before all else */
    FRAME_PREFETCH,   /* it may soon want them: answered as far as nobody has sent them */
    FRAME_REST,       /* what is left: always answered, behind demands */
    FRAME_DATA,       /* source -> destination: page bytes follow */
    FRAME_ZERO,       /* the pages are zero */
    FRAME_SKIPPED,    /* others have sent these pages of a FRAME_PREFETCH */
};

struct frame {
    unsigned char magic[4];
    uint16_t version;
    uint8_t kind;
    uint8_t codec;
    unsigned char session[16];
    uint64_t sequence; /* of this direction and connection; OPEN is 1 */
    uint64_t request;
    uint32_t first_page;
    uint32_t page_count;
    uint32_t payload_bytes;
    uint16_t block; /* index + 1 */
    uint16_t reserved;
};

_Static_assert(sizeof(struct frame) == 56, "a frame's header has 56 bytes");

/* One end of the connection. Buffers belong to it; the socket does not. */
struct stream {
    unsigned char session[16];
    uint8_t kind_min, kind_max; /* of what comes in */
    uint64_t received, sent; /* sequence of the last frame each way */
    unsigned char *input, *output;
    size_t input_size, output_size; /* capacities */
    size_t input_from, input_to;    /* bytes that wait to be used */
    size_t output_from, output_to;  /* bytes that wait to be sent */
    char reason[160];               /* why the connection cannot be used any more */
};

/* Takes in frames of kinds kind_min to kind_max, the largest of which fits into `input_size`. Returns 0 or
 * -ENOMEM. */
int stream_open(struct stream *stream, const unsigned char *session, uint8_t kind_min,
                uint8_t kind_max, size_t input_size, size_t output_size);
void stream_close(struct stream *stream);

/* A new connection, over which one frame went each way already. */
void stream_reset(struct stream *stream);

/* Send what waits. Returns 1 when nothing waits any more, 0 when the socket is full, -1 with a reason
 * when the connection is lost. */
int stream_flush(struct stream *stream, int fd);

/* Read what is there. Returns the bytes read, 0 for none, -1 with a reason. */
ssize_t stream_fill(struct stream *stream, int fd);

/* The next whole frame. Returns 1; 0 when more bytes are needed; -1 with a reason. The payload lies in
 * the input buffer until the next stream_fill. */
int stream_next(struct stream *stream, struct frame *frame, const unsigned char **payload);

/* Bytes that can be put behind those that wait to be sent; moves those to the front if need be. */
size_t stream_room(struct stream *stream);

/* Where they are put. */
unsigned char *stream_end(const struct stream *stream);

/* Write the next frame's header at `where` in the output. */
void stream_put(struct stream *stream, unsigned char *where, struct frame frame);

/* The connection is at fault; returns -1. */
int stream_refuse(struct stream *stream, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
