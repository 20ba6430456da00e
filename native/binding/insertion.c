/* Postcopy: placing behind a running guest. */
#include "binding.h"

#include "insertion.h"

/* Whether every run, checked already, is whole units. */
static int runs_are_units(const Py_buffer *runs, uint64_t run_count, uint64_t unit_pages)
{
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs->buf, i);

        if (run.first_page % unit_pages != 0 || run.page_count % unit_pages != 0) {
            PyErr_Format(PyExc_ValueError, "run %zu, %llu pages from page %llu, is not whole units of "
                         "%llu", i, (unsigned long long)run.page_count,
                         (unsigned long long)run.first_page, (unsigned long long)unit_pages);
            return 0;
        }
    }
    return 1;
}

static PyObject *native_insert(PyObject *module, PyObject *args)
{
    struct insertion to;
    Py_buffer received, payload, runs;
    uint64_t run_count, page_count, total;
    struct inserted_pages counts = {0, 0};
    int rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&w*y*y*O&O&:insert", to_int, &to.uffd, to_size, &to.address,
                          to_size, &to.unit_pages, &received, &payload, &runs, to_size, &run_count,
                          to_size, &page_count))
        return NULL;
    if (insertion_fits(&to, &received, page_count) &&
        runs_fit(&runs, run_count, page_count, &total) &&
        runs_are_units(&runs, run_count, to.unit_pages) && payload_fits(&payload, "payload", total)) {
        to.received = received.buf;
        Py_BEGIN_ALLOW_THREADS
        rc = insert_runs(&to, payload.buf, runs.buf, (size_t)run_count, &counts);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &payload, &received);
    return pair_or_error(rc, counts.fresh, counts.present);
}

static PyObject *native_insert_zero(PyObject *module, PyObject *args)
{
    struct insertion to;
    Py_buffer received, runs;
    uint64_t run_count, page_count, total;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&w*y*O&O&:insert_zero", to_int, &to.uffd, to_size, &to.address,
                          to_size, &to.unit_pages, &received, &runs, to_size, &run_count, to_size,
                          &page_count))
        return NULL;
    if (insertion_fits(&to, &received, page_count) &&
        runs_fit(&runs, run_count, page_count, &total) &&
        runs_are_units(&runs, run_count, to.unit_pages)) {
        to.received = received.buf;
        Py_BEGIN_ALLOW_THREADS
        rc = insert_zero_runs(&to, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &received);
    return count_or_error(rc);
}

static PyObject *native_discard_stale(PyObject *module, PyObject *args)
{
    Py_buffer received, stale;
    uint64_t page_count, unit_pages;
    int64_t rc = 0;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&w*w*O&O&:discard_stale", to_int, &fd, &received, &stale, to_size,
                          &page_count, to_size, &unit_pages))
        return NULL;
    if (bitmap_fits(&received, "received", page_count) &&
        bitmap_fits(&stale, "stale", page_count) && unit_fits(unit_pages)) {
        Py_BEGIN_ALLOW_THREADS
        rc = discard_stale(fd, received.buf, stale.buf, page_count, unit_pages);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&stale, &received);
    return count_or_error(rc);
}

static PyObject *native_bitmap_widen(PyObject *module, PyObject *args)
{
    Py_buffer bitmap;
    uint64_t page_count, unit_pages;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&O&:bitmap_widen", &bitmap, to_size, &page_count, to_size,
                          &unit_pages))
        return NULL;
    if (bitmap_fits(&bitmap, "bitmap", page_count) && unit_fits(unit_pages)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)bitmap_widen(bitmap.buf, page_count, unit_pages);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&bitmap);
    return count_or_error(rc);
}

PyMethodDef INSERTION_METHODS[] = {
    {"insert", native_insert, METH_VARARGS, NULL},
    {"insert_zero", native_insert_zero, METH_VARARGS, NULL},
    {"discard_stale", native_discard_stale, METH_VARARGS, NULL},
    {"bitmap_widen", native_bitmap_widen, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
