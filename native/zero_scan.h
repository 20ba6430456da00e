/* Find zero pages. One kernel for each instruction set; all write identical bytes. */
#ifndef RAMFERRY_ZERO_SCAN_H
#define RAMFERRY_ZERO_SCAN_H

#include <stddef.h>

/* Kernels read whole steps of this many bytes; page sizes are multiples of it. */
#define ZERO_SCAN_STEP ((size_t)256)

/* Set is_zero[i] to 1 or 0 for each of `page_count` pages of `page_size` bytes; return how many are
 * zero. `pages` needs no alignment. Memory that others write meanwhile gives either answer. */
typedef size_t zero_scan_fn(const unsigned char *pages, size_t page_count, size_t page_size,
                            unsigned char *is_zero);

/* Resolve a kernel by name. A name is a demand: 0, or -EINVAL for a name that this build does not
 * know, or -ENOTSUP when this CPU cannot run it. Never falls back. */
int zero_scan_select(const char *name, zero_scan_fn **kernel);

/* Name of the `index`-th kernel that this CPU can run, the default (0) first; NULL past the last. */
const char *zero_scan_name(size_t index);

/* The kernel of zero_scan_name(0). */
zero_scan_fn *zero_scan_default(void);

#endif
