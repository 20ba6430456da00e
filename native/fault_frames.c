#define _GNU_SOURCE
#include "fault_frames.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static const unsigned char MAGIC[4] = {'r', 'f', 'p', 'f'};
#define VERSION 1 /* FAULT_VERSION of engine/wire/postcopy.py */
#define CODEC_RAW 1

int stream_open(struct stream *stream, const unsigned char *session, uint8_t kind_min,
                uint8_t kind_max, size_t input_size, size_t output_size)
{
    memset(stream, 0, sizeof *stream);
    memcpy(stream->session, session, sizeof stream->session);
    stream->kind_min = kind_min;
    stream->kind_max = kind_max;
    stream->input = malloc(input_size);
    stream->output = malloc(output_size);
    stream->input_size = input_size;
    stream->output_size = output_size;
    return stream->input && stream->output ? 0 : -ENOMEM;
}

void stream_close(struct stream *stream)
{
    free(stream->input);
    free(stream->output);
    stream->input = stream->output = NULL;
}

void stream_reset(struct stream *stream)
{
    stream->received = stream->sent = 1;
    stream->input_from = stream->input_to = stream->output_from = stream->output_to = 0;
    stream->reason[0] = '\0';
}

int stream_refuse(struct stream *stream, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(stream->reason, sizeof stream->reason, format, args);
    va_end(args);
    return -1;
}

int stream_flush(struct stream *stream, int fd)
{
    while (stream->output_from < stream->output_to) {
        ssize_t sent = send(fd, stream->output + stream->output_from,
                            stream->output_to - stream->output_from, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (sent < 0)
            return stream_refuse(stream, "sending: %s", strerror(errno));
        stream->output_from += (size_t)sent;
    }
    stream->output_from = stream->output_to = 0;
    return 1;
}

ssize_t stream_fill(struct stream *stream, int fd)
{
    ssize_t got;

    if (stream->input_from == stream->input_to) {
        stream->input_from = stream->input_to = 0;
    } else if (stream->input_from > 0 && stream->input_to == stream->input_size) {
        memmove(stream->input, stream->input + stream->input_from,
                stream->input_to - stream->input_from);
        stream->input_to -= stream->input_from;
        stream->input_from = 0;
    }
    if (stream->input_to == stream->input_size)
        return 0;
    got = recv(fd, stream->input + stream->input_to, stream->input_size - stream->input_to,
               MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return 0;
    if (got < 0)
        return stream_refuse(stream, "receiving: %s", strerror(errno));
    if (got == 0)
        return stream_refuse(stream, "the peer has closed it");
    stream->input_to += (size_t)got;
    return got;
}

static int check_frame(struct stream *stream, const struct frame *frame)
{
    if (memcmp(frame->magic, MAGIC, sizeof MAGIC) != 0)
        return stream_refuse(stream, "a frame without the magic");
    if (frame->version != VERSION || frame->codec != CODEC_RAW || frame->reserved != 0)
        return stream_refuse(stream, "a frame of version %u with codec %u", frame->version,
                             frame->codec);
    if (memcmp(frame->session, stream->session, sizeof frame->session) != 0)
        return stream_refuse(stream, "a frame of another session");
    if (frame->sequence != stream->received + 1)
        return stream_refuse(stream, "frame %llu after %llu: lost or replayed",
                             (unsigned long long)frame->sequence,
                             (unsigned long long)stream->received);
    if (frame->kind < stream->kind_min || frame->kind > stream->kind_max)
        return stream_refuse(stream, "a frame of kind %u from a peer that may send %u to %u",
                             frame->kind, stream->kind_min, stream->kind_max);
    if (frame->page_count == 0 || frame->page_count > FRAME_PAGES_MAX || frame->block == 0)
        return stream_refuse(stream, "a frame of %u pages of RAM block %u", frame->page_count,
                             frame->block);
    if (frame->payload_bytes != (frame->kind == FRAME_DATA ? frame->page_count * PAGE_BYTES : 0))
        return stream_refuse(stream, "a frame of kind %u and %u pages with %u bytes", frame->kind,
                             frame->page_count, frame->payload_bytes);
    return 0;
}

int stream_next(struct stream *stream, struct frame *frame, const unsigned char **payload)
{
    size_t there = stream->input_to - stream->input_from;

    if (there < sizeof *frame)
        return 0;
    memcpy(frame, stream->input + stream->input_from, sizeof *frame);
    if (check_frame(stream, frame) < 0)
        return -1;
    if (there < sizeof *frame + frame->payload_bytes)
        return 0;
    *payload = stream->input + stream->input_from + sizeof *frame;
    stream->input_from += sizeof *frame + frame->payload_bytes;
    stream->received = frame->sequence;
    return 1;
}

size_t stream_room(struct stream *stream)
{
    if (stream->output_from > 0) {
        memmove(stream->output, stream->output + stream->output_from,
                stream->output_to - stream->output_from);
        stream->output_to -= stream->output_from;
        stream->output_from = 0;
    }
    return stream->output_size - stream->output_to;
}

unsigned char *stream_end(const struct stream *stream)
{
    return stream->output + stream->output_to;
}

void stream_put(struct stream *stream, unsigned char *where, struct frame frame)
{
    memcpy(frame.magic, MAGIC, sizeof MAGIC);
    memcpy(frame.session, stream->session, sizeof frame.session);
    frame.version = VERSION;
    frame.codec = CODEC_RAW;
    frame.sequence = ++stream->sent;
    frame.reserved = 0;
    memcpy(where, &frame, sizeof frame);
}
