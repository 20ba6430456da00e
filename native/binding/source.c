/* The source: what to send, and what it need not send again. */
#include "binding.h"

#include "batch.h"
#include "compressibility.h"
#include "elision.h"
#include "page_hash.h"
#include "planes.h"

static int run_table_fits(const Py_buffer *runs, const char *what)
{
    if (runs->len >= (Py_ssize_t)RUN_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes has no room for a run of 8 bytes", what,
                 runs->len);
    return 0;
}

static int batch_fits(const struct batch *batch, const Py_buffer *ram, const Py_buffer *dirty,
                      const Py_buffer *in_flight, const Py_buffer *data, const Py_buffer *zero)
{
    uint64_t page_count = batch->slice.page_count;

    if (batch->cursor > page_count) {
        PyErr_Format(PyExc_ValueError, "cursor %llu is beyond the %llu pages of the slice",
                     (unsigned long long)batch->cursor, (unsigned long long)page_count);
        return 0;
    }
    if (batch->pages_max == 0) {
        PyErr_SetString(PyExc_ValueError, "pages_max is 0; a batch has at least one page");
        return 0;
    }
    return pages_fit(ram, "ram", page_count, PAGE_BYTES) &&
           bitmap_fits(dirty, "dirty bitmap", page_count) &&
           bitmap_fits(in_flight, "in_flight bitmap", page_count) &&
           run_table_fits(data, "data_runs") && (!batch->detect_zero || run_table_fits(zero, "zero_runs"));
}

static PyObject *native_take_batch(PyObject *module, PyObject *args)
{
    Py_buffer ram, dirty, in_flight, data, zero;
    struct batch batch;
    PyObject *result = NULL;
    int detect_zero;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*w*O&O&O&pw*w*:take_batch", &ram, &dirty, &in_flight, to_slice,
                          &batch.slice, to_u64, &batch.cursor, to_u64, &batch.pages_max,
                          &detect_zero, &data, &zero))
        return NULL;
    batch.detect_zero = detect_zero != 0;
    if (batch_fits(&batch, &ram, &dirty, &in_flight, &data, &zero)) {
        batch.ram = ram.buf;
        batch.dirty = dirty.buf;
        batch.in_flight = in_flight.buf;
        batch.data = run_table_over(&data);
        batch.zero = run_table_over(&zero);
        Py_BEGIN_ALLOW_THREADS
        take_batch(&batch);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(KnnKK)", (unsigned long long)batch.cursor,
                               (Py_ssize_t)batch.data.count, (Py_ssize_t)batch.zero.count,
                               (unsigned long long)batch.data.pages,
                               (unsigned long long)batch.zero.pages);
    }
    RELEASE(&zero, &data, &in_flight, &dirty, &ram);
    return result;
}

static PyObject *native_gather(PyObject *module, PyObject *args)
{
    Py_buffer ram, runs;
    uint64_t run_count, total, plane_runs = 0, plane_pages = 0;
    PyObject *result = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*O&|O&:gather", &ram, &runs, to_u64, &run_count, to_u64,
                          &plane_runs))
        return NULL;
    if (plane_runs > run_count)
        PyErr_Format(PyExc_ValueError, "plane_runs is %llu of %llu runs",
                     (unsigned long long)plane_runs, (unsigned long long)run_count);
    else if (runs_fit(&runs, plane_runs, (uint64_t)ram.len / PAGE_BYTES, &plane_pages) &&
             runs_fit(&runs, run_count, (uint64_t)ram.len / PAGE_BYTES, &total)) {
        if (total > PY_SSIZE_T_MAX / PAGE_BYTES)
            PyErr_NoMemory();
        else
            result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(total * PAGE_BYTES));
    }
    if (result) {
        char *output = PyBytes_AsString(result);

        Py_BEGIN_ALLOW_THREADS
        gather_planes(ram.buf, runs.buf, (size_t)plane_runs, (unsigned char *)output);
        gather(ram.buf, (unsigned char *)runs.buf + plane_runs * RUN_BYTES,
               (size_t)(run_count - plane_runs), (unsigned char *)output + plane_pages * PAGE_BYTES);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &ram);
    return result;
}

static PyObject *native_split_compressible(PyObject *module, PyObject *args)
{
    Py_buffer ram, runs, output;
    uint64_t run_count, total;
    struct split_runs split;
    PyObject *result = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*O&w*:split_compressible", &ram, &runs, to_u64, &run_count,
                          &output))
        return NULL;
    if (runs_fit(&runs, run_count, (uint64_t)ram.len / PAGE_BYTES, &total) &&
        batch_is_small(total, SPLIT_PAGES_MAX) && has_room(&output, "out_runs", total, RUN_BYTES)) {
        Py_BEGIN_ALLOW_THREADS
        split = split_compressible(ram.buf, runs.buf, (size_t)run_count, output.buf);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue(
            "(nnKn)", (Py_ssize_t)split.runs[PAGE_OF_WORDS], (Py_ssize_t)split.runs[PAGE_OF_BYTES],
            (unsigned long long)(split.pages[PAGE_OF_WORDS] + split.pages[PAGE_OF_BYTES]),
            (Py_ssize_t)split.runs[PAGE_RAW]);
    }
    RELEASE(&output, &runs, &ram);
    return result;
}

static PyObject *native_hash_pages(PyObject *module, PyObject *args)
{
    Py_buffer pages, hashes, runs;
    uint64_t seed, run_count, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&w*y*O&:hash_pages", &pages, to_u64, &seed, &hashes, &runs,
                          to_u64, &run_count))
        return NULL;
    if (runs_fit(&runs, run_count, (uint64_t)hashes.len / PAGE_HASH_BYTES, &total) &&
        payload_fits(&pages, "pages", total)) {
        Py_BEGIN_ALLOW_THREADS
        hash_pages(pages.buf, seed, hashes.buf, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &hashes, &pages);
    return none_or_error(0);
}

static PyObject *native_gather_changed(PyObject *module, PyObject *args)
{
    Py_buffer ram, hashes, known, runs, pages, changed;
    struct elision to = {0};
    PyObject *result = NULL;
    uint64_t run_count, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&w*w*y*O&w*w*:gather_changed", &ram, to_u64, &to.seed, &hashes,
                          &known, &runs, to_u64, &run_count, &pages, &changed))
        return NULL;
    if (runs_fit(&runs, run_count, (uint64_t)ram.len / PAGE_BYTES, &total) &&
        pages_fit(&hashes, "hashes", (uint64_t)ram.len / PAGE_BYTES, PAGE_HASH_BYTES) &&
        bitmap_fits(&known, "known bitmap", (uint64_t)ram.len / PAGE_BYTES) &&
        has_room(&pages, "out_pages", total, PAGE_BYTES) &&
        has_room(&changed, "out_runs", total, RUN_BYTES)) {
        to.hashes = hashes.buf;
        to.known = known.buf;
        to.output = pages.buf;
        to.changed = run_table_over(&changed);
        Py_BEGIN_ALLOW_THREADS
        gather_changed(&to, ram.buf, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(KnK)", (unsigned long long)to.changed.pages,
                               (Py_ssize_t)to.changed.count,
                               (unsigned long long)(total - to.changed.pages));
    }
    RELEASE(&changed, &pages, &runs, &known, &hashes, &ram);
    return result;
}

static PyObject *native_forget_pages(PyObject *module, PyObject *args)
{
    Py_buffer known, runs;
    uint64_t run_count, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*y*O&:forget_pages", &known, &runs, to_u64, &run_count))
        return NULL;
    if (bitmap_fits(&known, "known bitmap", 0) &&
        runs_fit(&runs, run_count, (uint64_t)known.len * 8, &total)) {
        Py_BEGIN_ALLOW_THREADS
        forget_pages(known.buf, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&runs, &known);
    return none_or_error(0);
}

static PyObject *native_hash_scan(PyObject *module, PyObject *args)
{
    Py_buffer ram, hashes, candidates, dirty;
    struct page_slice slice;
    uint64_t seed, first_page = 0;
    int64_t rc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&y*y*w*O&|O&:hash_scan", &ram, to_u64, &seed, &hashes, &candidates,
                          &dirty, to_slice, &slice, to_u64, &first_page))
        return NULL;
    if (first_page_fits(first_page) &&
        pages_fit(&ram, "ram", slice.page_count, PAGE_BYTES) &&
        pages_fit(&hashes, "hashes", slice.page_count, PAGE_HASH_BYTES) &&
        bitmap_fits(&candidates, "candidates bitmap", slice.page_count) &&
        bitmap_fits(&dirty, "dirty bitmap", slice.page_count)) {
        Py_BEGIN_ALLOW_THREADS
        rc = (int64_t)hash_scan(ram.buf, seed, hashes.buf, candidates.buf, dirty.buf, &slice,
                                first_page);
        Py_END_ALLOW_THREADS
    }
    RELEASE(&dirty, &candidates, &hashes, &ram);
    return count_or_error(rc);
}

PyMethodDef SOURCE_METHODS[] = {
    {"take_batch", native_take_batch, METH_VARARGS, NULL},
    {"gather", native_gather, METH_VARARGS, NULL},
    {"split_compressible", native_split_compressible, METH_VARARGS, NULL},
    {"hash_pages", native_hash_pages, METH_VARARGS, NULL},
    {"gather_changed", native_gather_changed, METH_VARARGS, NULL},
    {"forget_pages", native_forget_pages, METH_VARARGS, NULL},
    {"hash_scan", native_hash_scan, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
