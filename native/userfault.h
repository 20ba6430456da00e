/* userfaultfd as the engine needs it, and holes. All return 0 (or a descriptor) or -errno. */
#ifndef RAMFERRY_USERFAULT_H
#define RAMFERRY_USERFAULT_H

#include <stdint.h>
#include <sys/types.h>

/* Open a userfaultfd (close-on-exec, non-blocking) with exactly these features; the caller owns it.
 * -EINVAL: the kernel lacks a feature or flag; -EPERM: the user may not. */
int uffd_open(int flags, uint64_t features);

/* Ask for exactly these features of one that was just opened, here or in another process. */
int uffd_negotiate(int uffd, uint64_t features);

int uffd_register(int uffd, uint64_t address, uint64_t size, uint64_t mode);
int uffd_unregister(int uffd, uint64_t address, uint64_t size);

/* Free fd[offset, offset + size): it reads as zero, the file keeps its size. */
int punch_hole(int fd, off_t offset, off_t size);

#endif
