/* Kernel interfaces that are newer than Debian 12's headers, in our own words.
 *
 * Names differ from the kernel's on purpose: newer system headers define those, and both must
 * compile. Whether the running kernel has them is probed at run time, never assumed here. */
#ifndef RAMFERRY_LINUX_ABI_H
#define RAMFERRY_LINUX_ABI_H

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* PAGEMAP_SCAN, Linux 6.7: read and change the state of pages of /proc/PID/pagemap. */
struct pagemap_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pagemap_scan_request {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end; /* written by the kernel, after errors too */
    uint64_t regions;  /* address of an array of struct pagemap_region */
    uint64_t region_count;
    uint64_t pages_max;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_any_of_mask;
    uint64_t return_mask;
};

#define PAGEMAP_SCAN_REQUEST _IOWR('f', 16, struct pagemap_scan_request)
#define PAGEMAP_SCAN_WP_MATCHING (UINT64_C(1) << 0)
#define PAGEMAP_SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)
#define PAGEMAP_PAGE_IS_WRITTEN (UINT64_C(1) << 1)

_Static_assert(sizeof(struct pagemap_region) == 24, "struct page_region has 24 bytes");
_Static_assert(sizeof(struct pagemap_scan_request) == 96, "struct pm_scan_arg has 96 bytes");
_Static_assert(PAGEMAP_SCAN_REQUEST == 0xc0606610, "ioctl number of PAGEMAP_SCAN");

/* An entry of /proc/PID/pagemap; the bit says that the page was written since clear_refs. */
#define PAGEMAP_ENTRY_SOFT_DIRTY (UINT64_C(1) << 55)

/* userfaultfd features; the base interface is old enough to come from the system's headers. */
#define UFFD_WP_UNPOPULATED_FEATURE (UINT64_C(1) << 13) /* Linux 6.4 */
#define UFFD_WP_ASYNC_FEATURE (UINT64_C(1) << 15)       /* Linux 6.7 */
#define UFFD_USER_MODE_ONLY_FLAG 1                      /* Linux 5.11 */

_Static_assert(sizeof(struct uffdio_copy) == 40, "struct uffdio_copy has 40 bytes");
_Static_assert(UFFDIO_COPY == 0xc028aa03, "ioctl number of UFFDIO_COPY");
_Static_assert(UFFDIO_API == 0xc018aa3f, "ioctl number of UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == 0xc020aa00, "ioctl number of UFFDIO_REGISTER");

/* madvise: fault pages in for writing, or say why not instead of a signal. Linux 5.14. */
#define MADVISE_POPULATE_WRITE 23

#endif
