/* QEMU's format of page deltas, XBZRLE (docs/xbzrle.txt there): the new page as runs over the old one.
 *
 * A delta is pairs of a run of bytes that stayed and a run of bytes that changed: length, length, the
 * new bytes. Lengths are ULEB128 of one or two bytes; only the first may be 0, and what stayed behind
 * the last change is left out. This encoder ends a run at the first byte that differs in kind, as
 * QEMU's does; a decoder takes any division. Encoded integers have no byte order. */
#ifndef RAMFERRY_XBZRLE_H
#define RAMFERRY_XBZRLE_H

#include "pages.h"

#define XBZRLE_OVERFLOW SIZE_MAX

/* Write the delta from `old_page` to `new_page` into `room` bytes at `output`; return its length, 0 when
 * the pages are alike, or XBZRLE_OVERFLOW when it has no room. Pages need no alignment and must not
 * change meanwhile. */
typedef size_t xbzrle_encode_fn(const unsigned char *old_page, const unsigned char *new_page,
                                unsigned char *output, size_t room);

/* Kernels by name, as in zero_scan.h; all write identical bytes. */
int xbzrle_select(const char *name, xbzrle_encode_fn **kernel);
const char *xbzrle_name(size_t index);
xbzrle_encode_fn *xbzrle_default(void);

/* Whether the bytes are one whole delta that stays within its page. */
bool xbzrle_is_valid(const unsigned char *delta, size_t length);

/* A batch of deltas is, for each: its length (little-endian uint16, never 0), then its bytes. With its
 * length, none that this side makes is longer than a page, and a batch no longer than its pages. */
#define DELTA_LENGTH_BYTES ((size_t)2)
#define DELTA_BYTES_MAX (PAGE_BYTES - DELTA_LENGTH_BYTES)

/* Check that the bytes are a batch of exactly `count` valid deltas.
 * Returns 0, or -EINVAL and the index of the first that is wrong (`count`: bytes are left over). */
int deltas_check(const unsigned char *deltas, size_t size, uint64_t count, uint64_t *bad_delta);

static inline size_t delta_length(const unsigned char *delta)
{
    return (size_t)delta[0] | (size_t)delta[1] << 8;
}

/* Make the old page at `page` the new one. The caller found the delta valid. */
void xbzrle_apply(const unsigned char *delta, size_t length, unsigned char *page);

#endif
