/* Kernels that are asked for by name: zero pages, and one page's delta. */
#include "binding.h"

#include <errno.h>
#include <string.h>

#include "xbzrle.h"
#include "zero_scan.h"

static PyObject *native_kernel_names(PyObject *module, PyObject *args)
{
    const char *kind, *name, *(*name_at)(size_t);
    PyObject *names;

    (void)module;
    if (!PyArg_ParseTuple(args, "s:kernel_names", &kind))
        return NULL;
    if (strcmp(kind, "zero_scan") == 0)
        name_at = zero_scan_name;
    else if (strcmp(kind, "xbzrle") == 0)
        name_at = xbzrle_name;
    else
        return PyErr_Format(PyExc_ValueError, "no kernels of kind '%s'; there are: zero_scan, xbzrle",
                            kind);
    names = PyList_New(0);
    for (size_t i = 0; names && (name = name_at(i)); ++i)
        append_or_clear(&names, PyUnicode_FromString(name));
    return names;
}

/* 1, or 0 and a ValueError that says why a kernel cannot be had. */
static int kernel_is_there(const char *kind, const char *name, int selected)
{
    if (selected < 0)
        PyErr_Format(PyExc_ValueError, "%s kernel '%s' %s", kind, name,
                     selected == -EINVAL ? "is not known" : "does not run on this CPU");
    return selected == 0;
}

static int zero_scan_fits(const Py_buffer *pages, const Py_buffer *is_zero, uint64_t page_size)
{
    if (page_size == 0 || page_size % ZERO_SCAN_STEP != 0) {
        PyErr_Format(PyExc_ValueError, "page size %llu is not a positive multiple of %zu",
                     (unsigned long long)page_size, ZERO_SCAN_STEP);
        return 0;
    }
    if ((uint64_t)pages->len % page_size == 0 &&
        (uint64_t)is_zero->len == (uint64_t)pages->len / page_size)
        return 1;
    PyErr_Format(PyExc_ValueError, "%zd flags do not fit %zd bytes of pages of %llu bytes",
                 is_zero->len, pages->len, (unsigned long long)page_size);
    return 0;
}

static PyObject *native_zero_scan(PyObject *module, PyObject *args)
{
    Py_buffer pages, is_zero;
    const char *name;
    uint64_t page_size;
    zero_scan_fn *kernel = NULL;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "sy*w*O&:zero_scan", &name, &pages, &is_zero, to_size, &page_size))
        return NULL;
    if (kernel_is_there("zero_scan", name, zero_scan_select(name, &kernel)) &&
        zero_scan_fits(&pages, &is_zero, page_size)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)kernel(pages.buf, (size_t)is_zero.len, (size_t)page_size, is_zero.buf);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&is_zero, &pages);
    return count_or_error(rc);
}

static PyObject *native_xbzrle_encode(PyObject *module, PyObject *args)
{
    Py_buffer old_page, new_page, output;
    xbzrle_encode_fn *kernel = NULL;
    const char *name;
    int64_t length = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "sy*y*w*:xbzrle_encode", &name, &old_page, &new_page, &output))
        return NULL;
    if (kernel_is_there("xbzrle", name, xbzrle_select(name, &kernel)) &&
        payload_fits(&old_page, "old_page", 1) && payload_fits(&new_page, "new_page", 1)) {
        size_t used = kernel(old_page.buf, new_page.buf, output.buf, (size_t)output.len);

        length = used == XBZRLE_OVERFLOW ? -1 : (int64_t)used;
    }
    RELEASE(&output, &new_page, &old_page);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(length);
}

PyMethodDef KERNEL_METHODS[] = {
    {"kernel_names", native_kernel_names, METH_VARARGS, NULL},
    {"zero_scan", native_zero_scan, METH_VARARGS, NULL},
    {"xbzrle_encode", native_xbzrle_encode, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
