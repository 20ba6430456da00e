/* Dirty tracking of a process's memory. */
#include "binding.h"

#include "tracking.h"

static PyObject *native_pagemap_scan_supported(PyObject *module, PyObject *args)
{
    int pagemap_fd, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:pagemap_scan_supported", to_int, &pagemap_fd))
        return NULL;
    rc = pagemap_scan_supported(pagemap_fd);
    return rc < 0 ? os_error(rc) : PyBool_FromLong(rc);
}

typedef int64_t tracking_scan_fn(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                                 const struct page_slice *slice, uint64_t first_page);

static PyObject *tracking_scan(PyObject *args, const char *format, tracking_scan_fn *scan)
{
    Py_buffer bitmap;
    struct page_slice slice;
    uint64_t address, first_page = 0;
    int64_t rc = 0;
    int pagemap_fd;

    if (!PyArg_ParseTuple(args, format, to_int, &pagemap_fd, to_size, &address, &bitmap, to_slice,
                          &slice, to_u64, &first_page))
        return NULL;
    if (first_page_fits(first_page) && address_fits(address, slice.page_count) &&
        bitmap_fits(&bitmap, "bitmap", slice.page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = scan(pagemap_fd, address, bitmap.buf, &slice, first_page);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

static PyObject *native_pagemap_scan(PyObject *module, PyObject *args)
{
    (void)module;
    return tracking_scan(args, "O&O&w*O&|O&:pagemap_scan", pagemap_scan);
}

static PyObject *native_pagemap_peek(PyObject *module, PyObject *args)
{
    (void)module;
    return tracking_scan(args, "O&O&w*O&|O&:pagemap_peek", pagemap_peek);
}

static PyObject *native_soft_dirty_scan(PyObject *module, PyObject *args)
{
    (void)module;
    return tracking_scan(args, "O&O&w*O&|O&:soft_dirty_scan", soft_dirty_scan);
}

PyMethodDef TRACKING_METHODS[] = {
    {"pagemap_scan_supported", native_pagemap_scan_supported, METH_VARARGS, NULL},
    {"pagemap_scan", native_pagemap_scan, METH_VARARGS, NULL},
    {"pagemap_peek", native_pagemap_peek, METH_VARARGS, NULL},
    {"soft_dirty_scan", native_soft_dirty_scan, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
