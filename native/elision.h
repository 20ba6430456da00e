/* Send no page again whose content is what was sent last: known by a hash of 128 bits (page_hash.h).
 *
 * Hashes and known bits are one sender's own, indexed by page. A set bit means: the hash is that of
 * what the destination was sent last. */
#ifndef RAMFERRY_ELISION_H
#define RAMFERRY_ELISION_H

#include "page_hash.h"

struct elision {
    uint64_t seed; /* the same as for the hashes that are there */
    unsigned char *hashes;
    bitmap_word *known;
    unsigned char *output;    /* room for all pages of the runs */
    struct run_table changed; /* room for a run of each page; empty at the start */
};

/* Copy the runs' pages, in order, to `output`, but leave out those whose hash is that of what was sent
 * last; `changed` gets the runs of the others, which become known. Each page is read once: what is
 * hashed is what is sent, whatever the guest writes meanwhile. The caller checked the runs. */
void gather_changed(struct elision *to, const unsigned char *ram, const unsigned char *runs,
                    size_t run_count);

/* The runs' pages are sent another way, as zero pages or not at all: they are not known any more. The
 * caller checked the runs. */
void forget_pages(bitmap_word *known, const unsigned char *runs, size_t run_count);

#endif
