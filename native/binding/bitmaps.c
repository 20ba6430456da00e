/* Dirty bitmaps. */
#include "binding.h"

#include "bitmap.h"

static PyObject *native_bitmap_set_range(PyObject *module, PyObject *args)
{
    Py_buffer bitmap;
    uint64_t first_page, page_count;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&O&:bitmap_set_range", &bitmap, to_u64, &first_page, to_u64,
                          &page_count))
        return NULL;
    if (range_fits(first_page, page_count) &&
        bitmap_fits(&bitmap, "bitmap", first_page + page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)bitmap_set_range(bitmap.buf, first_page, page_count);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

static PyObject *native_bitmap_clear_slice(PyObject *module, PyObject *args)
{
    Py_buffer bitmap;
    struct page_slice slice;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&:bitmap_clear_slice", &bitmap, to_slice, &slice))
        return NULL;
    if (bitmap_fits(&bitmap, "bitmap", slice.page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)bitmap_clear_slice(bitmap.buf, &slice);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

static PyObject *native_bitmap_count(PyObject *module, PyObject *args)
{
    Py_buffer bitmap;
    struct page_slice slice;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&:bitmap_count", &bitmap, to_slice, &slice))
        return NULL;
    if (bitmap_fits(&bitmap, "bitmap", slice.page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)bitmap_count(bitmap.buf, &slice);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

static PyObject *native_bitmap_move_slice(PyObject *module, PyObject *args)
{
    Py_buffer source, target;
    struct page_slice slice;
    uint64_t first_page = 0;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*w*O&|O&:bitmap_move_slice", &source, &target, to_slice, &slice,
                          to_u64, &first_page))
        return NULL;
    if (first_page_fits(first_page) && bitmap_fits(&source, "source bitmap", slice.page_count) &&
        bitmap_fits(&target, "target bitmap", slice.page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)bitmap_move_slice(source.buf, target.buf, &slice, first_page);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&target, &source);
    return count_or_error(rc);
}

static PyObject *native_bitmap_set_data(PyObject *module, PyObject *args)
{
    Py_buffer bitmap;
    uint64_t offset, size;
    int64_t rc = 0;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&w*:bitmap_set_data", to_int, &fd, to_size, &offset, to_size,
                          &size, &bitmap))
        return NULL;
    if (offset + size > INT64_MAX)
        PyErr_SetString(PyExc_ValueError, "offset and size reach beyond 2**63-1");
    else if (is_page_multiple("offset", offset) && is_page_multiple("size", size) &&
             bitmap_fits(&bitmap, "bitmap", size / PAGE_BYTES)) {
        Py_BEGIN_ALLOW_THREADS
        rc = bitmap_set_data(fd, (off_t)offset, (off_t)size, bitmap.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

PyMethodDef BITMAP_METHODS[] = {
    {"bitmap_set_range", native_bitmap_set_range, METH_VARARGS, NULL},
    {"bitmap_clear_slice", native_bitmap_clear_slice, METH_VARARGS, NULL},
    {"bitmap_count", native_bitmap_count, METH_VARARGS, NULL},
    {"bitmap_move_slice", native_bitmap_move_slice, METH_VARARGS, NULL},
    {"bitmap_set_data", native_bitmap_set_data, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
