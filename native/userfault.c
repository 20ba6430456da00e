#define _GNU_SOURCE
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "linux_abi.h"

int uffd_negotiate(int uffd, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};

    return ioctl(uffd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

int uffd_open(int flags, uint64_t features)
{
    long uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    int rc;

    if (uffd < 0)
        return -errno;
    rc = uffd_negotiate((int)uffd, features);
    if (rc < 0)
        close((int)uffd);
    return rc < 0 ? rc : (int)uffd;
}

int uffd_register(int uffd, uint64_t address, uint64_t size, uint64_t mode)
{
    struct uffdio_register request = {.range = {address, size}, .mode = mode};

    return ioctl(uffd, UFFDIO_REGISTER, &request) < 0 ? -errno : 0;
}

int uffd_unregister(int uffd, uint64_t address, uint64_t size)
{
    struct uffdio_range range = {address, size};

    return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int punch_hole(int fd, off_t offset, off_t size)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size) < 0 ? -errno
                                                                                      : 0;
}
