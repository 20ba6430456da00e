/* The destination: what came is checked and placed. */
#include "binding.h"

#include <errno.h>

#include "placement.h"
#include "planes.h"
#include "userfault.h"

static int fresh_address_fits(int uffd, uint64_t address)
{
    if (uffd >= 0 && address == 0) {
        PyErr_SetString(PyExc_ValueError, "fresh_address is 0, but a uffd is given");
        return 0;
    }
    return is_page_multiple("fresh_address", address);
}

static PyObject *native_place(PyObject *module, PyObject *args)
{
    Py_buffer ram, placed, payload, runs;
    struct placement to = {0};
    struct placed_pages counts = {0, 0};
    uint64_t run_count, page_count, total;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&w*w*y*y*O&O&:place", to_int, &to.uffd, to_size,
                          &to.fresh_address, &ram, &placed, &payload, &runs, to_u64, &run_count,
                          to_u64, &page_count))
        return NULL;
    if (fresh_address_fits(to.uffd, to.fresh_address) && is_aligned(&ram, "ram", PAGE_BYTES) &&
        pages_fit(&ram, "ram", page_count, PAGE_BYTES) &&
        bitmap_fits(&placed, "placed bitmap", page_count) &&
        runs_fit(&runs, run_count, page_count, &total) && payload_fits(&payload, "payload", total)) {
        to.ram = ram.buf;
        to.placed = placed.buf;
        Py_BEGIN_ALLOW_THREADS
        rc = place_runs(&to, payload.buf, runs.buf, (size_t)run_count, &counts);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &payload, &placed, &ram);
    return pair_or_error(rc, counts.fresh, counts.copied);
}

static PyObject *native_delta_apply(PyObject *module, PyObject *args)
{
    Py_buffer ram, placed, deltas, runs;
    struct placement to = {.uffd = -1};
    uint64_t run_count, page_count, total = 0, bad_delta = 0;
    int rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*w*y*y*O&O&:delta_apply", &ram, &placed, &deltas, &runs, to_u64,
                          &run_count, to_u64, &page_count))
        return NULL;
    if (is_aligned(&ram, "ram", PAGE_BYTES) && pages_fit(&ram, "ram", page_count, PAGE_BYTES) &&
        bitmap_fits(&placed, "placed bitmap", page_count) &&
        runs_fit(&runs, run_count, page_count, &total)) {
        to.ram = ram.buf;
        to.placed = placed.buf;
        Py_BEGIN_ALLOW_THREADS
        rc = place_deltas(&to, deltas.buf, (size_t)deltas.len, runs.buf, (size_t)run_count, total,
                          &bad_delta);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &deltas, &placed, &ram);
    if (rc == -EINVAL)
        return PyErr_Format(PyExc_ValueError, "delta %llu of %llu is wrong, or bytes are left over",
                            (unsigned long long)bad_delta, (unsigned long long)total);
    return none_or_error(rc);
}

static PyObject *native_clear(PyObject *module, PyObject *args)
{
    Py_buffer ram, placed, runs;
    uint64_t run_count, page_count, total;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*w*y*O&O&:clear", &ram, &placed, &runs, to_u64, &run_count, to_u64,
                          &page_count))
        return NULL;
    if (pages_fit(&ram, "ram", page_count, PAGE_BYTES) &&
        bitmap_fits(&placed, "placed bitmap", page_count) &&
        runs_fit(&runs, run_count, page_count, &total)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)clear_runs(ram.buf, placed.buf, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &placed, &ram);
    return count_or_error(rc);
}

static int run_count_fits(const Py_buffer *runs, const char *what)
{
    if (runs->len % (Py_ssize_t)RUN_BYTES == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes is not whole runs of 8 bytes", what, runs->len);
    return 0;
}

static PyObject *native_packet_runs_check(PyObject *module, PyObject *args)
{
    Py_buffer data, zero;
    struct packet_runs runs;
    struct page_range bad;
    uint64_t plane_count, encoded_count, gathered_count, page_count, unit_pages;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&O&O&y*O&O&:packet_runs_check", &data, to_u64, &plane_count, to_u64,
                          &encoded_count, to_u64, &gathered_count, &zero, to_u64, &page_count, to_size,
                          &unit_pages))
        return NULL;
    if (page_count_fits(page_count) && unit_fits(unit_pages) && run_count_fits(&data, "data_runs") &&
        run_count_fits(&zero, "zero_runs")) {
        size_t data_count = (size_t)data.len / RUN_BYTES;

        if (encoded_count > data_count || gathered_count > data_count - encoded_count ||
            plane_count > encoded_count)
            PyErr_Format(PyExc_ValueError,
                         "%llu of %zu runs are encoded, %llu of these as planes, and %llu gathered",
                         (unsigned long long)encoded_count, data_count,
                         (unsigned long long)plane_count, (unsigned long long)gathered_count);
        else {
            const unsigned char *planes = data.buf;
            const unsigned char *encoded = planes + plane_count * RUN_BYTES;
            const unsigned char *gathered = planes + encoded_count * RUN_BYTES;
            const unsigned char *direct = gathered + gathered_count * RUN_BYTES;

            runs = (struct packet_runs){
                {planes, encoded, gathered, direct, zero.buf},
                {(size_t)plane_count, (size_t)(encoded_count - plane_count), (size_t)gathered_count,
                 data_count - (size_t)(encoded_count + gathered_count), (size_t)zero.len / RUN_BYTES},
            };
            if (packet_runs_check(&runs, page_count, unit_pages, &bad) < 0) /* some thousand instructions */
                PyErr_Format(PyExc_ValueError,
                             "the run of %llu pages from page %llu is empty, not within %llu, out of "
                             "order or there twice, or not whole units of %llu",
                             (unsigned long long)bad.page_count, (unsigned long long)bad.first_page,
                             (unsigned long long)page_count, (unsigned long long)unit_pages);
        }
    }
    RELEASE(&zero, &data);
    return none_or_error(0);
}

static PyObject *native_restore_planes(PyObject *module, PyObject *args)
{
    Py_buffer planes;
    uint64_t page_count;
    PyObject *result = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&:restore_planes", &planes, to_u64, &page_count))
        return NULL;
    if (pages_fit(&planes, "planes", page_count, PAGE_BYTES))
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(page_count * PAGE_BYTES));
    if (result) {
        char *output = PyBytes_AsString(result);

        Py_BEGIN_ALLOW_THREADS
        restore_planes(planes.buf, page_count, (unsigned char *)output);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&planes);
    return result;
}

static PyObject *native_punch_hole(PyObject *module, PyObject *args)
{
    uint64_t offset, size;
    int fd, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&:punch_hole", to_int, &fd, to_size, &offset, to_size, &size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = punch_hole(fd, (off_t)offset, (off_t)size);
    Py_END_ALLOW_THREADS
    return none_or_error(rc);
}

PyMethodDef DESTINATION_METHODS[] = {
    {"delta_apply", native_delta_apply, METH_VARARGS, NULL},
    {"place", native_place, METH_VARARGS, NULL},
    {"clear", native_clear, METH_VARARGS, NULL},
    {"packet_runs_check", native_packet_runs_check, METH_VARARGS, NULL},
    {"restore_planes", native_restore_planes, METH_VARARGS, NULL},
    {"punch_hole", native_punch_hole, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
