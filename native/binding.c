/* `engine._native`: arguments in, kernel, result out. engine/_native.pyi is the contract; here is no
 * logic but the checks that keep a kernel inside the buffers it was given.
 *
 * Buffers stay held while the GIL is released, so the memory cannot move or go. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <stdint.h>

#include "batch.h"
#include "bitmap.h"
#include "budget.h"
#include "compressibility.h"
#include "delta_cache.h"
#include "elision.h"
#include "faults.h"
#include "insertion.h"
#include "linux_abi.h"
#include "page_hash.h"
#include "page_service.h"
#include "pages.h"
#include "placement.h"
#include "schedule.h"
#include "tracking.h"
#include "userfault.h"
#include "workload.h"
#include "xbzrle.h"
#include "zero_scan.h"

/* -- converters for PyArg_ParseTuple("O&"): a wrong value is a ValueError, never a wrapped one ----- */

static int to_u64(PyObject *object, void *output)
{
    PyObject *number = PyNumber_Index(object);
    unsigned long long value;

    if (!number)
        return 0;
    value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_ValueError, "%R is not in the range of 0 to 2**64-1", object);
        return 0;
    }
    *(uint64_t *)output = value;
    return 1;
}

/* A file offset or size, or a count of something in memory. */
static int to_size(PyObject *object, void *output)
{
    uint64_t value;

    if (!to_u64(object, &value))
        return 0;
    if (value > INT64_MAX) {
        PyErr_Format(PyExc_ValueError, "%R is not in the range of 0 to 2**63-1", object);
        return 0;
    }
    *(uint64_t *)output = value;
    return 1;
}

static int to_int(PyObject *object, void *output)
{
    PyObject *number = PyNumber_Index(object);
    long value;

    if (!number)
        return 0;
    value = PyLong_AsLong(number);
    Py_DECREF(number);
    if (PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return 0;
        PyErr_Clear();
        value = LONG_MAX;
    }
    if (value < INT_MIN || value > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "%R does not fit a C int", object);
        return 0;
    }
    *(int *)output = (int)value;
    return 1;
}

static int to_slice(PyObject *object, void *output)
{
    struct page_slice *slice = output;
    uint64_t *fields[] = {&slice->page_count, &slice->stripe_pages, &slice->worker_index,
                          &slice->worker_count};

    if (!PyTuple_Check(object) || PyTuple_Size(object) != 4) {
        PyErr_SetString(PyExc_TypeError, "a slice is a tuple of four integers: page_count, "
                                         "stripe_pages, worker_index, worker_count");
        return 0;
    }
    for (Py_ssize_t i = 0; i < 4; ++i)
        if (!to_u64(PyTuple_GetItem(object, i), fields[i]))
            return 0;
    if (slice_is_valid(slice))
        return 1;
    PyErr_Format(PyExc_ValueError,
                 "slice %R is impossible: at most 2**32 pages, stripes of a positive multiple of 64 "
                 "up to 2**32, worker_index < worker_count <= 65536",
                 object);
    return 0;
}

/* -- checks: each returns 1, or 0 with a ValueError set -------------------------------------------- */

static int is_aligned(const Py_buffer *buffer, const char *what, size_t alignment)
{
    if ((uintptr_t)buffer->buf % alignment == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is not aligned to %zu bytes", what, alignment);
    return 0;
}

static int page_count_fits(uint64_t page_count)
{
    if (page_count <= PAGE_COUNT_MAX)
        return 1;
    PyErr_Format(PyExc_ValueError, "%llu pages are more than the 2**32 that a block may have",
                 (unsigned long long)page_count);
    return 0;
}

static int bitmap_fits(const Py_buffer *bitmap, const char *what, uint64_t page_count)
{
    if (!page_count_fits(page_count) || !is_aligned(bitmap, what, sizeof(bitmap_word)))
        return 0;
    if (bitmap->len % 8 == 0 && (uint64_t)bitmap->len * 8 >= page_count)
        return 1;
    PyErr_Format(PyExc_ValueError,
                 "%s of %zd bytes is not whole 64-bit words with a bit for each of %llu pages", what,
                 bitmap->len, (unsigned long long)page_count);
    return 0;
}

/* Whether `buffer` has `unit` bytes for each of `page_count` pages. */
static int pages_fit(const Py_buffer *buffer, const char *what, uint64_t page_count, size_t unit)
{
    if (page_count_fits(page_count) && (uint64_t)buffer->len / unit >= page_count)
        return 1;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s of %zd bytes does not hold %llu pages of %zu bytes", what,
                     buffer->len, (unsigned long long)page_count, unit);
    return 0;
}

static int range_fits(uint64_t first_page, uint64_t page_count)
{
    if (first_page <= PAGE_COUNT_MAX && page_count <= PAGE_COUNT_MAX - first_page)
        return 1;
    PyErr_Format(PyExc_ValueError, "pages %llu and %llu more are beyond the 2**32 of a block",
                 (unsigned long long)first_page, (unsigned long long)page_count);
    return 0;
}

/* Where a scan begins; behind the slice there is nothing to scan. */
static int first_page_fits(uint64_t first_page)
{
    return range_fits(first_page, 0);
}

static int is_page_multiple(const char *what, uint64_t value)
{
    if (value % PAGE_BYTES == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s %llu is not a multiple of %zu", what,
                 (unsigned long long)value, PAGE_BYTES);
    return 0;
}

/* Whether a block at `address` ends within what a process can have. */
static int address_fits(uint64_t address, uint64_t page_count)
{
    if (!is_page_multiple("address", address))
        return 0;
    if (address <= INT64_MAX - page_count * PAGE_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "RAM of %llu pages at address %llu reaches beyond 2**63-1",
                 (unsigned long long)page_count, (unsigned long long)address);
    return 0;
}

static int fresh_address_fits(int uffd, uint64_t address)
{
    if (uffd >= 0 && address == 0) {
        PyErr_SetString(PyExc_ValueError, "fresh_address is 0, but a uffd is given");
        return 0;
    }
    return is_page_multiple("fresh_address", address);
}

/* Check a run table by itself and against `page_count`; sum its pages. */
static int runs_fit(const Py_buffer *runs, uint64_t run_count, uint64_t page_count, uint64_t *total)
{
    struct page_range bad;
    size_t bad_run;

    if (run_count > (uint64_t)runs->len / RUN_BYTES) {
        PyErr_Format(PyExc_ValueError, "run table of %zd bytes does not hold %llu runs", runs->len,
                     (unsigned long long)run_count);
        return 0;
    }
    if (runs_check(runs->buf, (size_t)run_count, page_count, total, &bad_run) == 0)
        return 1;
    bad = run_at(runs->buf, bad_run);
    PyErr_Format(PyExc_ValueError, "run %zu, %llu pages from page %llu, is empty or not within %llu",
                 bad_run, (unsigned long long)bad.page_count, (unsigned long long)bad.first_page,
                 (unsigned long long)page_count);
    return 0;
}

static int payload_fits(const Py_buffer *payload, const char *what, uint64_t total_pages)
{
    if ((uint64_t)payload->len == total_pages * PAGE_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes is not the %llu pages that the runs say", what,
                 payload->len, (unsigned long long)total_pages);
    return 0;
}

static int run_table_fits(const Py_buffer *runs, const char *what)
{
    if (runs->len >= (Py_ssize_t)RUN_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes has no room for a run of 8 bytes", what,
                 runs->len);
    return 0;
}

static PyObject *os_error(int64_t rc)
{
    errno = (int)-rc;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Kernels that return a count or -errno end here; NULL if an error is set already. */
static PyObject *count_or_error(int64_t rc)
{
    if (PyErr_Occurred())
        return NULL;
    return rc < 0 ? os_error(rc) : PyLong_FromLongLong(rc);
}

static PyObject *none_or_error(int64_t rc)
{
    if (rc < 0)
        return os_error(rc);
    Py_RETURN_NONE;
}

/* -- zero scan ------------------------------------------------------------------------------------ */

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
    for (size_t i = 0; names && (name = name_at(i)); ++i) {
        PyObject *item = PyUnicode_FromString(name);

        if (!item || PyList_Append(names, item) < 0)
            Py_CLEAR(names);
        Py_XDECREF(item);
    }
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
    PyBuffer_Release(&is_zero);
    PyBuffer_Release(&pages);
    return count_or_error(rc);
}

/* -- bitmaps -------------------------------------------------------------------------------------- */

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
    PyBuffer_Release(&target);
    PyBuffer_Release(&source);
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

/* -- source --------------------------------------------------------------------------------------- */

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

static struct run_table run_table_over(const Py_buffer *runs)
{
    return (struct run_table){.bytes = runs->buf, .capacity = (size_t)runs->len / RUN_BYTES};
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
    PyBuffer_Release(&zero);
    PyBuffer_Release(&data);
    PyBuffer_Release(&in_flight);
    PyBuffer_Release(&dirty);
    PyBuffer_Release(&ram);
    return result;
}

static PyObject *native_gather(PyObject *module, PyObject *args)
{
    Py_buffer ram, runs;
    uint64_t run_count, total;
    PyObject *result = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*O&:gather", &ram, &runs, to_u64, &run_count))
        return NULL;
    if (runs_fit(&runs, run_count, (uint64_t)ram.len / PAGE_BYTES, &total)) {
        if (total > PY_SSIZE_T_MAX / PAGE_BYTES)
            PyErr_NoMemory();
        else
            result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(total * PAGE_BYTES));
    }
    if (result) {
        char *output = PyBytes_AsString(result);

        Py_BEGIN_ALLOW_THREADS
        gather(ram.buf, runs.buf, (size_t)run_count, (unsigned char *)output);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&runs);
    PyBuffer_Release(&ram);
    return result;
}

/* Whether one call may take so many pages. */
static int batch_is_small(uint64_t total, uint64_t pages_max)
{
    if (total <= pages_max)
        return 1;
    PyErr_Format(PyExc_ValueError, "runs of %llu pages; at most %llu are taken at once",
                 (unsigned long long)total, (unsigned long long)pages_max);
    return 0;
}

/* Whether `buffer` has `unit` bytes for each of so many pages. */
static int has_room(const Py_buffer *buffer, const char *what, uint64_t total, size_t unit)
{
    if ((uint64_t)buffer->len / unit >= total)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes has no room for %zu bytes of each of %llu pages",
                 what, buffer->len, unit, (unsigned long long)total);
    return 0;
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
        result = Py_BuildValue("(nKn)", (Py_ssize_t)split.compressible_runs,
                               (unsigned long long)split.compressible_pages,
                               (Py_ssize_t)split.raw_runs);
    }
    PyBuffer_Release(&output);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&ram);
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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&pages);
    return PyErr_Occurred() ? NULL : none_or_error(0);
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
    PyBuffer_Release(&changed);
    PyBuffer_Release(&pages);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&known);
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&ram);
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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&known);
    return PyErr_Occurred() ? NULL : none_or_error(0);
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
    PyBuffer_Release(&dirty);
    PyBuffer_Release(&candidates);
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&ram);
    return count_or_error(rc);
}

/* -- deltas --------------------------------------------------------------------------------------- */

#define DELTA_CACHE_CAPSULE "engine._native.DeltaCache"

struct held_cache {
    struct delta_cache *cache;
    int is_used; /* by a thread without the GIL */
};

static void release_cache(PyObject *capsule)
{
    struct held_cache *held = PyCapsule_GetPointer(capsule, DELTA_CACHE_CAPSULE);

    delta_cache_free(held->cache);
    PyMem_Free(held);
}

static int to_delta_cache(PyObject *object, void *output)
{
    struct held_cache *held = PyCapsule_GetPointer(object, DELTA_CACHE_CAPSULE);

    *(struct held_cache **)output = held;
    if (held && held->is_used)
        PyErr_SetString(PyExc_RuntimeError, "another thread uses the delta cache");
    return held && !held->is_used;
}

/* The slice of a block; NULL and a ValueError when there is none. */
static const struct page_slice *cached_block(const struct held_cache *held, uint64_t index)
{
    const struct page_slice *slice = delta_cache_block(held->cache, index);

    if (!slice)
        PyErr_Format(PyExc_ValueError, "the cache knows no block %llu", (unsigned long long)index);
    return slice;
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
    PyBuffer_Release(&output);
    PyBuffer_Release(&new_page);
    PyBuffer_Release(&old_page);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(length);
}

/* A sequence of slices as a new array; NULL if an error is set. */
static struct page_slice *to_slices(PyObject *sequence, Py_ssize_t count)
{
    struct page_slice *slices = PyMem_Calloc((size_t)count + 1, sizeof *slices);

    if (!slices)
        return (struct page_slice *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject *item = PySequence_GetItem(sequence, i);
        int is_slice = item && to_slice(item, &slices[i]);

        Py_XDECREF(item);
        if (!is_slice) {
            PyMem_Free(slices);
            return NULL;
        }
    }
    return slices;
}

static PyObject *cache_error(int rc, uint64_t slot_count)
{
    if (rc == -EINVAL)
        return PyErr_Format(PyExc_ValueError,
                            "a cache of %llu pages; a power of two up to 2**32 is allowed",
                            (unsigned long long)slot_count);
    return os_error(rc);
}

static PyObject *native_delta_cache_new(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    struct page_slice *slices;
    PyObject *sequence, *capsule;
    Py_ssize_t count;
    uint64_t slot_count;
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO&:delta_cache_new", &sequence, to_u64, &slot_count))
        return NULL;
    count = PySequence_Size(sequence);
    if (count < 0)
        return NULL;
    if ((size_t)count > DELTA_BLOCKS_MAX)
        return PyErr_Format(PyExc_ValueError, "%zd blocks; at most %zu are allowed", count,
                            DELTA_BLOCKS_MAX);
    held = PyMem_Calloc(1, sizeof *held);
    if (!held)
        return PyErr_NoMemory();
    slices = to_slices(sequence, count);
    if (!slices) {
        PyMem_Free(held);
        return NULL;
    }
    rc = delta_cache_new(&held->cache, slices, (size_t)count, slot_count);
    PyMem_Free(slices);
    capsule = rc < 0 ? cache_error(rc, slot_count)
                     : PyCapsule_New(held, DELTA_CACHE_CAPSULE, release_cache);
    if (!capsule) {
        delta_cache_free(held->cache);
        PyMem_Free(held);
    }
    return capsule;
}

static PyObject *native_delta_cache_resize(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    uint64_t slot_count;
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:delta_cache_resize", to_delta_cache, &held, to_u64,
                          &slot_count))
        return NULL;
    held->is_used = 1;
    Py_BEGIN_ALLOW_THREADS
    rc = delta_cache_resize(held->cache, slot_count);
    Py_END_ALLOW_THREADS
    held->is_used = 0;
    return rc < 0 ? cache_error(rc, slot_count) : none_or_error(0);
}

static PyObject *native_delta_cache_forget(PyObject *module, PyObject *args)
{
    struct held_cache *held;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:delta_cache_forget", to_delta_cache, &held))
        return NULL;
    held->is_used = 1;
    Py_BEGIN_ALLOW_THREADS
    delta_cache_forget(held->cache);
    Py_END_ALLOW_THREADS
    held->is_used = 0;
    return none_or_error(0);
}

static PyObject *native_delta_cache_get(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    const struct page_slice *block;
    unsigned char page_bytes[PAGE_BYTES];
    uint64_t block_index, page;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&:delta_cache_get", to_delta_cache, &held, to_u64,
                          &block_index, to_u64, &page))
        return NULL;
    block = cached_block(held, block_index);
    if (!block)
        return NULL;
    if (page >= block->page_count)
        return PyErr_Format(PyExc_ValueError, "page %llu is not within %llu",
                            (unsigned long long)page, (unsigned long long)block->page_count);
    if (!delta_cache_get(held->cache, block_index, page, page_bytes))
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)page_bytes, (Py_ssize_t)PAGE_BYTES);
}

static PyObject *native_delta_cache_set_zero(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    const struct page_slice *block;
    Py_buffer runs;
    uint64_t block_index, generation, run_count, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&y*O&:delta_cache_set_zero", to_delta_cache, &held, to_u64,
                          &block_index, to_size, &generation, &runs, to_u64, &run_count))
        return NULL;
    block = cached_block(held, block_index);
    if (block && runs_fit(&runs, run_count, block->page_count, &total)) {
        held->is_used = 1;
        Py_BEGIN_ALLOW_THREADS
        delta_cache_set_zero(held->cache, block_index, generation, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
        held->is_used = 0;
    }
    PyBuffer_Release(&runs);
    return PyErr_Occurred() ? NULL : none_or_error(0);
}

static PyObject *native_delta_cache_drop(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    const struct page_slice *block;
    Py_buffer runs;
    uint64_t block_index, run_count, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&y*O&:delta_cache_drop", to_delta_cache, &held, to_u64,
                          &block_index, &runs, to_u64, &run_count))
        return NULL;
    block = cached_block(held, block_index);
    if (block && runs_fit(&runs, run_count, block->page_count, &total)) {
        held->is_used = 1;
        Py_BEGIN_ALLOW_THREADS
        delta_cache_drop(held->cache, block_index, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
        held->is_used = 0;
    }
    PyBuffer_Release(&runs);
    return PyErr_Occurred() ? NULL : none_or_error(0);
}

/* What a delta batch writes to. */
struct delta_output {
    Py_buffer full_pages, full_runs, deltas, delta_runs;
};

static int delta_output_fits(const struct delta_output *output, uint64_t delta_bytes_max,
                             uint64_t total)
{
    if (delta_bytes_max == 0 || delta_bytes_max > DELTA_BYTES_MAX) {
        PyErr_Format(PyExc_ValueError, "delta_bytes_max %llu; 1 to %zu are allowed",
                     (unsigned long long)delta_bytes_max, DELTA_BYTES_MAX);
        return 0;
    }
    return has_room(&output->full_pages, "full_pages", total, PAGE_BYTES) &&
           has_room(&output->full_runs, "full_runs", total, RUN_BYTES) &&
           has_room(&output->deltas, "deltas", total, DELTA_LENGTH_BYTES + (size_t)delta_bytes_max) &&
           has_room(&output->delta_runs, "delta_runs", total, RUN_BYTES);
}

static PyObject *delta_batch_result(const struct delta_batch *batch)
{
    return Py_BuildValue("(KnKnKKKK)", (unsigned long long)batch->full.pages,
                         (Py_ssize_t)batch->full.count, (unsigned long long)batch->delta.pages,
                         (Py_ssize_t)batch->delta.count, (unsigned long long)batch->deltas_size,
                         (unsigned long long)batch->unchanged_pages,
                         (unsigned long long)batch->miss_pages,
                         (unsigned long long)batch->overflow_pages);
}

static PyObject *native_delta_batch(PyObject *module, PyObject *args)
{
    struct held_cache *held;
    const struct page_slice *block;
    struct delta_output output;
    struct delta_batch batch = {0};
    Py_buffer ram, runs;
    PyObject *result = NULL;
    uint64_t run_count, delta_bytes_max, total;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&y*y*O&O&w*w*w*w*:delta_batch", to_delta_cache, &held, to_u64,
                          &batch.block_index, to_size, &batch.generation, &ram, &runs, to_u64,
                          &run_count, to_u64, &delta_bytes_max, &output.full_pages,
                          &output.full_runs, &output.deltas, &output.delta_runs))
        return NULL;
    block = cached_block(held, batch.block_index);
    if (block && pages_fit(&ram, "ram", block->page_count, PAGE_BYTES) &&
        runs_fit(&runs, run_count, block->page_count, &total) &&
        batch_is_small(total, DELTA_PAGES_MAX) &&
        delta_output_fits(&output, delta_bytes_max, total)) {
        batch.ram = ram.buf;
        batch.delta_bytes_max = (size_t)delta_bytes_max;
        batch.full_pages = output.full_pages.buf;
        batch.deltas = output.deltas.buf;
        batch.full = run_table_over(&output.full_runs);
        batch.delta = run_table_over(&output.delta_runs);
        held->is_used = 1;
        Py_BEGIN_ALLOW_THREADS
        delta_batch(held->cache, &batch, runs.buf, (size_t)run_count);
        Py_END_ALLOW_THREADS
        held->is_used = 0;
        result = delta_batch_result(&batch);
    }
    PyBuffer_Release(&output.delta_runs);
    PyBuffer_Release(&output.deltas);
    PyBuffer_Release(&output.full_runs);
    PyBuffer_Release(&output.full_pages);
    PyBuffer_Release(&runs);
    PyBuffer_Release(&ram);
    return result;
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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&deltas);
    PyBuffer_Release(&placed);
    PyBuffer_Release(&ram);
    if (PyErr_Occurred())
        return NULL;
    if (rc == -EINVAL)
        return PyErr_Format(PyExc_ValueError, "delta %llu of %llu is wrong, or bytes are left over",
                            (unsigned long long)bad_delta, (unsigned long long)total);
    return none_or_error(rc);
}

/* -- dirty tracking ------------------------------------------------------------------------------- */

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

static PyObject *native_soft_dirty_scan(PyObject *module, PyObject *args)
{
    (void)module;
    return tracking_scan(args, "O&O&w*O&|O&:soft_dirty_scan", soft_dirty_scan);
}

/* -- userfaultfd ---------------------------------------------------------------------------------- */

static PyObject *native_mapping_address(PyObject *module, PyObject *args)
{
    Py_buffer mapping;
    unsigned long long address;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*:mapping_address", &mapping))
        return NULL;
    address = (uintptr_t)mapping.buf;
    PyBuffer_Release(&mapping);
    return PyLong_FromUnsignedLongLong(address);
}

static PyObject *native_uffd_open(PyObject *module, PyObject *args)
{
    uint64_t features;
    int flags;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:uffd_open", to_int, &flags, to_u64, &features))
        return NULL;
    return count_or_error(uffd_open(flags, features));
}

static PyObject *native_uffd_register(PyObject *module, PyObject *args)
{
    uint64_t address, size, mode;
    int uffd, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:uffd_register", to_int, &uffd, to_u64, &address, to_u64,
                          &size, to_u64, &mode))
        return NULL;
    if (!is_page_multiple("address", address) || !is_page_multiple("size", size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = uffd_register(uffd, address, size, mode);
    Py_END_ALLOW_THREADS
    return none_or_error(rc);
}

static PyObject *native_uffd_unregister(PyObject *module, PyObject *args)
{
    uint64_t address, size;
    int uffd, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&:uffd_unregister", to_int, &uffd, to_u64, &address, to_u64,
                          &size))
        return NULL;
    if (!is_page_multiple("address", address) || !is_page_multiple("size", size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = uffd_unregister(uffd, address, size);
    Py_END_ALLOW_THREADS
    return none_or_error(rc);
}

/* -- destination ---------------------------------------------------------------------------------- */

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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&placed);
    PyBuffer_Release(&ram);
    if (PyErr_Occurred())
        return NULL;
    if (rc < 0)
        return os_error(rc);
    return Py_BuildValue("(KK)", (unsigned long long)counts.fresh,
                         (unsigned long long)counts.copied);
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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&placed);
    PyBuffer_Release(&ram);
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
    uint64_t encoded_count, gathered_count, page_count;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&O&y*O&:packet_runs_check", &data, to_u64, &encoded_count, to_u64,
                          &gathered_count, &zero, to_u64, &page_count))
        return NULL;
    if (page_count_fits(page_count) && run_count_fits(&data, "data_runs") &&
        run_count_fits(&zero, "zero_runs")) {
        size_t data_count = (size_t)data.len / RUN_BYTES;

        if (encoded_count > data_count || gathered_count > data_count - encoded_count)
            PyErr_Format(PyExc_ValueError, "%llu of %zu runs are encoded and %llu gathered",
                         (unsigned long long)encoded_count, data_count,
                         (unsigned long long)gathered_count);
        else {
            const unsigned char *encoded = data.buf;
            const unsigned char *gathered = encoded + encoded_count * RUN_BYTES;
            const unsigned char *direct = gathered + gathered_count * RUN_BYTES;

            runs = (struct packet_runs){
                {encoded, gathered, direct, zero.buf},
                {(size_t)encoded_count, (size_t)gathered_count,
                 data_count - (size_t)(encoded_count + gathered_count), (size_t)zero.len / RUN_BYTES},
            };
            if (packet_runs_check(&runs, page_count, &bad) < 0) /* some thousand instructions */
                PyErr_Format(PyExc_ValueError,
                             "the run of %llu pages from page %llu is empty, not within %llu, out of "
                             "order or there twice",
                             (unsigned long long)bad.page_count, (unsigned long long)bad.first_page,
                             (unsigned long long)page_count);
        }
    }
    PyBuffer_Release(&zero);
    PyBuffer_Release(&data);
    return PyErr_Occurred() ? NULL : none_or_error(0);
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

/* -- bandwidth ------------------------------------------------------------------------------------ */

static int budget_fits(const Py_buffer *budget)
{
    if (budget->len >= (Py_ssize_t)sizeof(struct budget))
        return is_aligned(budget, "budget", sizeof(uint64_t));
    PyErr_Format(PyExc_ValueError, "budget of %zd bytes is not three 64-bit words", budget->len);
    return 0;
}

static PyObject *native_budget_set_rate(PyObject *module, PyObject *args)
{
    Py_buffer budget;
    uint64_t rate_bytes_per_s, now_ns;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&O&:budget_set_rate", &budget, to_u64, &rate_bytes_per_s, to_u64,
                          &now_ns))
        return NULL;
    if (budget_fits(&budget))
        budget_set_rate(budget.buf, rate_bytes_per_s, now_ns);
    PyBuffer_Release(&budget);
    return PyErr_Occurred() ? NULL : none_or_error(0);
}

static PyObject *native_budget_take(PyObject *module, PyObject *args)
{
    Py_buffer budget;
    uint64_t byte_count, now_ns, burst_ns, may_go_ns = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&O&O&:budget_take", &budget, to_u64, &byte_count, to_u64,
                          &now_ns, to_u64, &burst_ns))
        return NULL;
    if (budget_fits(&budget))
        may_go_ns = budget_take(budget.buf, byte_count, now_ns, burst_ns); /* a few instructions */
    PyBuffer_Release(&budget);
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(may_go_ns);
}

/* -- the workload guest --------------------------------------------------------------------------- */

#define WORKLOAD_CAPSULE "engine._native.Workload"

/* What a capsule owns; the buffers keep RAM and bitmap mapped while threads use them. */
struct held_workload {
    struct workload *workload;
    Py_buffer ram, bitmap; /* .obj is NULL where there is none */
};

static void release_workload(PyObject *capsule)
{
    struct held_workload *held = PyCapsule_GetPointer(capsule, WORKLOAD_CAPSULE);

    Py_BEGIN_ALLOW_THREADS
    workload_free(held->workload);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&held->bitmap);
    PyBuffer_Release(&held->ram);
    PyMem_Free(held);
}

static int to_workload(PyObject *object, void *output)
{
    *(struct held_workload **)output = PyCapsule_GetPointer(object, WORKLOAD_CAPSULE);
    return *(struct held_workload **)output != NULL;
}

static int to_contents(PyObject *object, void *output)
{
    const char *name = PyUnicode_AsUTF8AndSize(object, NULL);

    if (!name)
        return 0;
    *(enum workload_kind *)output = workload_contents(name);
    if (*(enum workload_kind *)output)
        return 1;
    PyErr_Format(PyExc_ValueError, "contents '%s'; allowed: zero, text, heap, random, mixed", name);
    return 0;
}

static int to_pattern(PyObject *object, void *output)
{
    const char *name = PyUnicode_AsUTF8AndSize(object, NULL);

    if (!name)
        return 0;
    *(enum workload_pattern *)output = workload_pattern(name);
    if (*(enum workload_pattern *)output)
        return 1;
    PyErr_Format(PyExc_ValueError, "pattern '%s'; allowed: sweep, random, hotspot, append", name);
    return 0;
}

/* A bitmap or None; the buffer is held if it was a bitmap that fits. */
static int take_bitmap(PyObject *object, Py_buffer *bitmap, uint64_t page_count)
{
    memset(bitmap, 0, sizeof *bitmap);
    if (object == Py_None)
        return 1;
    if (PyObject_GetBuffer(object, bitmap, PyBUF_WRITABLE) < 0)
        return 0;
    if (bitmap_fits(bitmap, "written bitmap", page_count))
        return 1;
    PyBuffer_Release(bitmap);
    return 0;
}

static PyObject *native_workload_fill(PyObject *module, PyObject *args)
{
    Py_buffer ram;
    uint64_t first_page, page_count, seed;
    enum workload_kind contents;

    (void)module;
    if (!PyArg_ParseTuple(args, "w*O&O&O&O&:workload_fill", &ram, to_u64, &first_page, to_u64,
                          &page_count, to_contents, &contents, to_u64, &seed))
        return NULL;
    if (range_fits(first_page, page_count) &&
        pages_fit(&ram, "ram", first_page + page_count, PAGE_BYTES) &&
        is_aligned(&ram, "ram", sizeof(uint64_t))) {
        Py_BEGIN_ALLOW_THREADS
        workload_fill(ram.buf, first_page, page_count, contents, seed);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&ram);
    return PyErr_Occurred() ? NULL : none_or_error(0);
}

static PyObject *native_workload_judge(PyObject *module, PyObject *args)
{
    Py_buffer ram, counters;
    uint64_t first_page, page_count, seed;
    enum workload_kind contents;
    struct workload_judgement judgement = {0, 0};

    (void)module;
    if (!PyArg_ParseTuple(args, "y*O&O&O&O&w*:workload_judge", &ram, to_u64, &first_page, to_u64,
                          &page_count, to_contents, &contents, to_u64, &seed, &counters))
        return NULL;
    if (range_fits(first_page, page_count) &&
        pages_fit(&ram, "ram", first_page + page_count, PAGE_BYTES) &&
        pages_fit(&counters, "counters", page_count, sizeof(uint64_t)) &&
        is_aligned(&ram, "ram", sizeof(uint64_t)) &&
        is_aligned(&counters, "counters", sizeof(uint64_t))) {
        Py_BEGIN_ALLOW_THREADS
        judgement = workload_judge(ram.buf, first_page, page_count, contents, seed, counters.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&counters);
    PyBuffer_Release(&ram);
    if (PyErr_Occurred())
        return NULL;
    return Py_BuildValue("(KL)", (unsigned long long)judgement.wrong_pages,
                         (long long)judgement.first_wrong); /* UINT64_MAX becomes -1 */
}

static PyObject *native_workload_judge_hole(PyObject *module, PyObject *args)
{
    Py_buffer counters;
    uint64_t first_page, page_count, seed;
    enum workload_kind contents;
    struct workload_judgement judgement = {0, 0};

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&w*:workload_judge_hole", to_u64, &first_page, to_u64,
                          &page_count, to_contents, &contents, to_u64, &seed, &counters))
        return NULL;
    if (range_fits(first_page, page_count) &&
        pages_fit(&counters, "counters", page_count, sizeof(uint64_t)) &&
        is_aligned(&counters, "counters", sizeof(uint64_t))) {
        Py_BEGIN_ALLOW_THREADS
        judgement = workload_judge_hole(first_page, page_count, contents, seed, counters.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&counters);
    if (PyErr_Occurred())
        return NULL;
    return Py_BuildValue("(KL)", (unsigned long long)judgement.wrong_pages,
                         (long long)judgement.first_wrong);
}

static int vcpus_fit(uint64_t vcpus, uint64_t page_count, uint64_t words)
{
    if (vcpus >= 1 && vcpus <= WORKLOAD_VCPUS_MAX && vcpus <= page_count &&
        words <= WORKLOAD_BODY_WORDS)
        return 1;
    PyErr_Format(PyExc_ValueError,
                 "%llu vcpus on %llu pages, %llu words a write; allowed are 1 to %u vcpus with a page "
                 "for each, and 0 to %u words",
                 (unsigned long long)vcpus, (unsigned long long)page_count, (unsigned long long)words,
                 WORKLOAD_VCPUS_MAX, WORKLOAD_BODY_WORDS);
    return 0;
}

/* The capsule over a started workload; `held` is given up on failure. */
static PyObject *start_held(struct held_workload *held, struct workload_options *options)
{
    PyObject *capsule;
    int rc;

    options->ram = held->ram.buf;
    options->written_bitmap = held->bitmap.buf;
    rc = workload_start(&held->workload, options);
    capsule = rc < 0 ? os_error(rc) : PyCapsule_New(held, WORKLOAD_CAPSULE, release_workload);
    if (!capsule) {
        workload_free(held->workload);
        PyBuffer_Release(&held->bitmap);
        PyBuffer_Release(&held->ram);
        PyMem_Free(held);
    }
    return capsule;
}

static PyObject *native_workload_start(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    struct workload_options options = {0};
    uint64_t vcpus, words;
    PyObject *bitmap;

    (void)module;
    held = PyMem_Calloc(1, sizeof *held);
    if (!held)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "w*O&O&O&O&O&O&O:workload_start", &held->ram, to_u64,
                          &options.page_count, to_u64, &vcpus, to_pattern, &options.pattern, to_u64,
                          &options.rate_bytes_per_s, to_u64, &words, to_u64, &options.seed, &bitmap)) {
        PyMem_Free(held);
        return NULL;
    }
    if (pages_fit(&held->ram, "ram", options.page_count, PAGE_BYTES) &&
        is_aligned(&held->ram, "ram", sizeof(uint64_t)) &&
        vcpus_fit(vcpus, options.page_count, words) &&
        take_bitmap(bitmap, &held->bitmap, options.page_count)) {
        options.vcpus = (uint32_t)vcpus;
        options.words_per_write = (uint32_t)words;
        return start_held(held, &options);
    }
    PyBuffer_Release(&held->ram);
    PyMem_Free(held);
    return NULL;
}

static PyObject *native_workload_set_bitmap(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    PyObject *object;
    Py_buffer bitmap, before;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O:workload_set_bitmap", to_workload, &held, &object) ||
        !take_bitmap(object, &bitmap, workload_page_count(held->workload)))
        return NULL;
    before = held->bitmap;
    held->bitmap = bitmap;
    workload_set_bitmap(held->workload, bitmap.buf); /* with the GIL: one exchange at a time */
    PyBuffer_Release(&before);
    Py_RETURN_NONE;
}

static PyObject *native_workload_pause(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    uint64_t took_ns;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_pause", to_workload, &held))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    workload_pause(held->workload, &took_ns);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(took_ns);
}

static PyObject *native_workload_resume(PyObject *module, PyObject *args)
{
    struct held_workload *held;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_resume", to_workload, &held))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    workload_resume(held->workload);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *native_workload_throttle(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    int percent;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:workload_throttle", to_workload, &held, to_int, &percent))
        return NULL;
    if (percent < 0 || workload_throttle(held->workload, (unsigned)percent) < 0)
        return PyErr_Format(PyExc_ValueError, "throttle of %d percent; 0 to 99 are allowed", percent);
    Py_RETURN_NONE;
}

static PyObject *native_workload_writes(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    uint64_t writes[WORKLOAD_VCPUS_MAX];
    PyObject *list;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_writes", to_workload, &held))
        return NULL;
    workload_writes(held->workload, writes);
    list = PyList_New(0);
    for (uint32_t i = 0; list && i < workload_vcpus(held->workload); ++i) {
        PyObject *count = PyLong_FromUnsignedLongLong(writes[i]);

        if (!count || PyList_Append(list, count) < 0)
            Py_CLEAR(list);
        Py_XDECREF(count);
    }
    return list;
}

static PyObject *native_workload_count_dirty(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    int is_counting;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&p:workload_count_dirty", to_workload, &held, &is_counting))
        return NULL;
    workload_count_dirty(held->workload, is_counting);
    Py_RETURN_NONE;
}

static PyObject *native_workload_limit_dirty(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    int vcpu;
    uint64_t bytes_per_s;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&:workload_limit_dirty", to_workload, &held, to_int, &vcpu,
                          to_u64, &bytes_per_s))
        return NULL;
    if (vcpu < 0 || workload_limit_dirty(held->workload, (uint32_t)vcpu, bytes_per_s) < 0)
        return PyErr_Format(PyExc_ValueError, "there is no vCPU %d", vcpu);
    Py_RETURN_NONE;
}

static PyObject *native_workload_dirtied(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    uint64_t pages[WORKLOAD_VCPUS_MAX], slept_ns[WORKLOAD_VCPUS_MAX];
    PyObject *list;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_dirtied", to_workload, &held))
        return NULL;
    workload_dirtied(held->workload, pages, slept_ns);
    list = PyList_New(0);
    for (uint32_t i = 0; list && i < workload_vcpus(held->workload); ++i) {
        PyObject *pair = Py_BuildValue("(KK)", pages[i], slept_ns[i]);

        if (!pair || PyList_Append(list, pair) < 0)
            Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

static PyObject *native_workload_save(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    char state[WORKLOAD_STATE_BYTES_MAX];
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_save", to_workload, &held))
        return NULL;
    rc = workload_save(held->workload, state);
    if (rc < 0)
        return os_error(rc);
    return PyBytes_FromStringAndSize(state, (Py_ssize_t)workload_state_size(held->workload));
}

static PyObject *native_workload_load(PyObject *module, PyObject *args)
{
    struct held_workload *held;
    Py_buffer state;
    const char *wrong = NULL;
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&y*:workload_load", to_workload, &held, &state))
        return NULL;
    rc = workload_load(held->workload, state.buf, (size_t)state.len, &wrong);
    PyBuffer_Release(&state);
    if (rc == -EINVAL)
        return PyErr_Format(PyExc_ValueError, "workload state: %s", wrong);
    return none_or_error(rc);
}

static PyObject *native_workload_stop(PyObject *module, PyObject *args)
{
    struct held_workload *held;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_stop", to_workload, &held))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    workload_stop(held->workload);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* -- postcopy: placing behind a running guest ----------------------------------------------------- */

/* Checks what native/insertion.h takes for granted of a block. */
static int insertion_fits(const struct insertion *to, const Py_buffer *received, uint64_t page_count)
{
    if (to->unit_pages != 1 && to->unit_pages != HUGE_UNIT_PAGES) {
        PyErr_Format(PyExc_ValueError, "pages are placed one by one or by %llu, not by %llu",
                     (unsigned long long)HUGE_UNIT_PAGES, (unsigned long long)to->unit_pages);
        return 0;
    }
    if (page_count % to->unit_pages != 0) {
        PyErr_Format(PyExc_ValueError, "%llu pages are not whole units of %llu",
                     (unsigned long long)page_count, (unsigned long long)to->unit_pages);
        return 0;
    }
    return bitmap_fits(received, "received", page_count) && address_fits(to->address, page_count);
}

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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&received);
    if (PyErr_Occurred())
        return NULL;
    if (rc < 0)
        return os_error(rc);
    return Py_BuildValue("(KK)", (unsigned long long)counts.fresh,
                         (unsigned long long)counts.present);
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
    PyBuffer_Release(&runs);
    PyBuffer_Release(&received);
    return count_or_error(rc);
}

static int unit_fits(uint64_t unit_pages)
{
    if (unit_pages > 0 && unit_pages <= PAGE_COUNT_MAX)
        return 1;
    PyErr_Format(PyExc_ValueError, "units of %llu pages", (unsigned long long)unit_pages);
    return 0;
}

static PyObject *native_discard_missing(PyObject *module, PyObject *args)
{
    Py_buffer received;
    uint64_t page_count, unit_pages;
    int64_t rc = 0;
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&w*O&O&:discard_missing", to_int, &fd, &received, to_size,
                          &page_count, to_size, &unit_pages))
        return NULL;
    if (bitmap_fits(&received, "received", page_count) && unit_fits(unit_pages)) {
        Py_BEGIN_ALLOW_THREADS
        rc = discard_missing(fd, received.buf, page_count, unit_pages);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&received);
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

/* -- postcopy: the services ----------------------------------------------------------------------- */

/* A service and the buffers that it works in: one bitmap a block, then the statistics page. */
struct held_service {
    void *service;
    Py_ssize_t held_count;
    Py_buffer held[];
};

static void give_up_held(struct held_service *held)
{
    while (held->held_count > 0)
        PyBuffer_Release(&held->held[--held->held_count]);
    PyMem_Free(held);
}

static struct held_service *hold_for(PyObject *blocks)
{
    if (!PyList_Check(blocks)) {
        PyErr_SetString(PyExc_TypeError, "blocks are a list of tuples");
        return NULL;
    }
    return PyMem_Calloc(1, sizeof(struct held_service) +
                               (size_t)(PyList_Size(blocks) + 1) * sizeof(Py_buffer));
}

/* Hold the statistics page: `words` 64-bit words. */
static int hold_statistics(struct held_service *held, PyObject *statistics, size_t words)
{
    Py_buffer *buffer = &held->held[held->held_count];

    if (PyObject_GetBuffer(statistics, buffer, PyBUF_WRITABLE) < 0)
        return 0;
    ++held->held_count;
    return is_aligned(buffer, "statistics", sizeof(uint64_t)) &&
           pages_fit(buffer, "statistics", words, sizeof(uint64_t));
}

static int session_fits(Py_ssize_t size)
{
    if (size == 16)
        return 1;
    PyErr_Format(PyExc_ValueError, "a session has 16 bytes, not %zd", size);
    return 0;
}

#define FAULTS_CAPSULE "engine._native.FaultService"
#define PAGES_CAPSULE "engine._native.PageService"

static void release_faults(PyObject *capsule)
{
    struct held_service *held = PyCapsule_GetPointer(capsule, FAULTS_CAPSULE);

    faults_close(held->service);
    give_up_held(held);
}

static void release_pages(PyObject *capsule)
{
    struct held_service *held = PyCapsule_GetPointer(capsule, PAGES_CAPSULE);

    pages_close(held->service);
    give_up_held(held);
}

static int to_faults(PyObject *object, void *output)
{
    struct held_service *held = PyCapsule_GetPointer(object, FAULTS_CAPSULE);

    *(struct fault_service **)output = held ? held->service : NULL;
    return held != NULL;
}

static int to_pages(PyObject *object, void *output)
{
    struct held_service *held = PyCapsule_GetPointer(object, PAGES_CAPSULE);

    *(struct page_service **)output = held ? held->service : NULL;
    return held != NULL;
}

/* Read the blocks' tuples and hold their bitmaps. */
static int read_fault_blocks(PyObject *list, struct held_service *held, struct fault_block *blocks)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
        struct fault_block *block = &blocks[i];
        Py_buffer *received = &held->held[held->held_count];

        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "O&O&O&O&w*", to_int, &block->to.uffd, to_size,
                              &block->to.address, to_size, &block->page_count, to_size,
                              &block->to.unit_pages, received))
            return 0;
        ++held->held_count;
        if (!insertion_fits(&block->to, received, block->page_count))
            return 0;
        block->to.received = received->buf;
    }
    return 1;
}

static PyObject *native_faults_open(PyObject *module, PyObject *args)
{
    PyObject *list, *statistics, *capsule = NULL;
    const char *session;
    Py_ssize_t session_size;
    struct held_service *held;
    struct fault_block *blocks;
    struct fault_service *service;
    uint64_t vcpus;
    int wants_news, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "Oy#OO&p:faults_open", &list, &session, &session_size, &statistics,
                          to_size, &vcpus, &wants_news) ||
        !session_fits(session_size))
        return NULL;
    held = hold_for(list);
    if (!held)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    blocks = PyMem_Calloc((size_t)PyList_Size(list) + 1, sizeof *blocks);
    if (!blocks)
        PyErr_NoMemory();
    else if (read_fault_blocks(list, held, blocks) && hold_statistics(held, statistics, FAULT_WORDS)) {
        rc = faults_open(&service, blocks, (size_t)PyList_Size(list), (const unsigned char *)session,
                         held->held[held->held_count - 1].buf, vcpus, wants_news);
        held->service = service;
        capsule = rc < 0 ? os_error(rc) : PyCapsule_New(held, FAULTS_CAPSULE, release_faults);
        if (rc == 0 && !capsule)
            faults_close(service);
    }
    PyMem_Free(blocks);
    if (!capsule)
        give_up_held(held);
    return capsule;
}

static PyObject *native_faults_reconnect(PyObject *module, PyObject *args)
{
    struct fault_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:faults_reconnect", to_faults, &service))
        return NULL;
    faults_reconnect(service);
    Py_RETURN_NONE;
}

static PyObject *native_faults_wake_all(PyObject *module, PyObject *args)
{
    struct fault_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:faults_wake_all", to_faults, &service))
        return NULL;
    return none_or_error(faults_wake_all(service));
}

static PyObject *native_faults_run(PyObject *module, PyObject *args)
{
    struct fault_service *service;
    int channel, wake_fd, wait_ms, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:faults_run", to_faults, &service, to_int, &channel, to_int,
                          &wake_fd, to_int, &wait_ms))
        return NULL;
    if (wait_ms < 0)
        return PyErr_Format(PyExc_ValueError, "waiting for %d ms", wait_ms);
    Py_BEGIN_ALLOW_THREADS
    rc = faults_run(service, channel, wake_fd, wait_ms);
    Py_END_ALLOW_THREADS
    return count_or_error(rc);
}

static PyObject *native_faults_news(PyObject *module, PyObject *args)
{
    struct fault_service *service;
    uint64_t block, page;
    PyObject *list;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:faults_news", to_faults, &service))
        return NULL;
    list = PyList_New(0);
    while (list && faults_news(service, &block, &page)) {
        PyObject *pair = Py_BuildValue("(KK)", (unsigned long long)block, (unsigned long long)page);

        if (!pair || PyList_Append(list, pair) < 0)
            Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

static PyObject *native_faults_prefetch(PyObject *module, PyObject *args)
{
    struct fault_service *service;
    uint64_t block, first_page, page_count;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:faults_prefetch", to_faults, &service, to_size, &block,
                          to_size, &first_page, to_size, &page_count))
        return NULL;
    if (!faults_has_range(service, block, first_page, page_count))
        return PyErr_Format(PyExc_ValueError, "pages %llu and %llu more are not in a RAM block %llu",
                            (unsigned long long)first_page, (unsigned long long)page_count,
                            (unsigned long long)block);
    return PyLong_FromUnsignedLongLong(faults_prefetch(service, block, first_page, page_count));
}

static PyObject *native_faults_fetch_rest(PyObject *module, PyObject *args)
{
    struct fault_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:faults_fetch_rest", to_faults, &service))
        return NULL;
    faults_fetch_rest(service);
    Py_RETURN_NONE;
}

static PyObject *native_faults_reason(PyObject *module, PyObject *args)
{
    struct fault_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:faults_reason", to_faults, &service))
        return NULL;
    return PyUnicode_FromString(faults_reason(service));
}

static int read_page_blocks(PyObject *list, struct held_service *held, struct page_block *blocks)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
        struct page_block *block = &blocks[i];
        struct insertion shape = {0};
        Py_buffer *dirty = &held->held[held->held_count];

        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "O&O&O&w*", to_int, &block->fd, to_size,
                              &block->page_count, to_size, &block->unit_pages, dirty))
            return 0;
        ++held->held_count;
        shape.unit_pages = block->unit_pages;
        if (!insertion_fits(&shape, dirty, block->page_count))
            return 0;
        block->dirty = dirty->buf;
    }
    return 1;
}

static PyObject *native_pages_open(PyObject *module, PyObject *args)
{
    PyObject *list, *statistics, *capsule = NULL;
    const char *session;
    Py_ssize_t session_size;
    struct held_service *held;
    struct page_block *blocks;
    struct page_service *service;
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "Oy#O:pages_open", &list, &session, &session_size, &statistics) ||
        !session_fits(session_size))
        return NULL;
    held = hold_for(list);
    if (!held)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    blocks = PyMem_Calloc((size_t)PyList_Size(list) + 1, sizeof *blocks);
    if (!blocks)
        PyErr_NoMemory();
    else if (read_page_blocks(list, held, blocks) && hold_statistics(held, statistics, PAGE_SERVICE_WORDS)) {
        rc = pages_open(&service, blocks, (size_t)PyList_Size(list), (const unsigned char *)session,
                        held->held[held->held_count - 1].buf);
        held->service = service;
        capsule = rc < 0 ? os_error(rc) : PyCapsule_New(held, PAGES_CAPSULE, release_pages);
        if (rc == 0 && !capsule)
            pages_close(service);
    }
    PyMem_Free(blocks);
    if (!capsule)
        give_up_held(held);
    return capsule;
}

static PyObject *native_pages_reconnect(PyObject *module, PyObject *args)
{
    struct page_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:pages_reconnect", to_pages, &service))
        return NULL;
    pages_reconnect(service);
    Py_RETURN_NONE;
}

static PyObject *native_pages_run(PyObject *module, PyObject *args)
{
    struct page_service *service;
    int channel, wake_fd, wait_ms, rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:pages_run", to_pages, &service, to_int, &channel, to_int,
                          &wake_fd, to_int, &wait_ms))
        return NULL;
    if (wait_ms < 0)
        return PyErr_Format(PyExc_ValueError, "waiting for %d ms", wait_ms);
    Py_BEGIN_ALLOW_THREADS
    rc = pages_run(service, channel, wake_fd, wait_ms);
    Py_END_ALLOW_THREADS
    return count_or_error(rc);
}

static PyObject *native_pages_reason(PyObject *module, PyObject *args)
{
    struct page_service *service;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:pages_reason", to_pages, &service))
        return NULL;
    return PyUnicode_FromString(pages_reason(service));
}

static PyObject *native_schedule_slice(PyObject *module, PyObject *args)
{
    uint64_t slice_ns;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:schedule_slice", to_size, &slice_ns))
        return NULL;
    return none_or_error(schedule_slice(slice_ns));
}

/* -- the module ----------------------------------------------------------------------------------- */

static PyMethodDef METHODS[] = {
    {"kernel_names", native_kernel_names, METH_VARARGS, NULL},
    {"zero_scan", native_zero_scan, METH_VARARGS, NULL},
    {"bitmap_set_range", native_bitmap_set_range, METH_VARARGS, NULL},
    {"bitmap_clear_slice", native_bitmap_clear_slice, METH_VARARGS, NULL},
    {"bitmap_count", native_bitmap_count, METH_VARARGS, NULL},
    {"bitmap_move_slice", native_bitmap_move_slice, METH_VARARGS, NULL},
    {"bitmap_set_data", native_bitmap_set_data, METH_VARARGS, NULL},
    {"take_batch", native_take_batch, METH_VARARGS, NULL},
    {"gather", native_gather, METH_VARARGS, NULL},
    {"split_compressible", native_split_compressible, METH_VARARGS, NULL},
    {"xbzrle_encode", native_xbzrle_encode, METH_VARARGS, NULL},
    {"delta_cache_new", native_delta_cache_new, METH_VARARGS, NULL},
    {"delta_cache_resize", native_delta_cache_resize, METH_VARARGS, NULL},
    {"delta_cache_forget", native_delta_cache_forget, METH_VARARGS, NULL},
    {"delta_cache_get", native_delta_cache_get, METH_VARARGS, NULL},
    {"delta_cache_set_zero", native_delta_cache_set_zero, METH_VARARGS, NULL},
    {"delta_cache_drop", native_delta_cache_drop, METH_VARARGS, NULL},
    {"delta_batch", native_delta_batch, METH_VARARGS, NULL},
    {"delta_apply", native_delta_apply, METH_VARARGS, NULL},
    {"hash_pages", native_hash_pages, METH_VARARGS, NULL},
    {"gather_changed", native_gather_changed, METH_VARARGS, NULL},
    {"forget_pages", native_forget_pages, METH_VARARGS, NULL},
    {"hash_scan", native_hash_scan, METH_VARARGS, NULL},
    {"pagemap_scan_supported", native_pagemap_scan_supported, METH_VARARGS, NULL},
    {"pagemap_scan", native_pagemap_scan, METH_VARARGS, NULL},
    {"soft_dirty_scan", native_soft_dirty_scan, METH_VARARGS, NULL},
    {"mapping_address", native_mapping_address, METH_VARARGS, NULL},
    {"uffd_open", native_uffd_open, METH_VARARGS, NULL},
    {"uffd_register", native_uffd_register, METH_VARARGS, NULL},
    {"uffd_unregister", native_uffd_unregister, METH_VARARGS, NULL},
    {"place", native_place, METH_VARARGS, NULL},
    {"clear", native_clear, METH_VARARGS, NULL},
    {"packet_runs_check", native_packet_runs_check, METH_VARARGS, NULL},
    {"budget_set_rate", native_budget_set_rate, METH_VARARGS, NULL},
    {"budget_take", native_budget_take, METH_VARARGS, NULL},
    {"punch_hole", native_punch_hole, METH_VARARGS, NULL},
    {"workload_fill", native_workload_fill, METH_VARARGS, NULL},
    {"workload_judge", native_workload_judge, METH_VARARGS, NULL},
    {"workload_judge_hole", native_workload_judge_hole, METH_VARARGS, NULL},
    {"workload_start", native_workload_start, METH_VARARGS, NULL},
    {"workload_set_bitmap", native_workload_set_bitmap, METH_VARARGS, NULL},
    {"workload_pause", native_workload_pause, METH_VARARGS, NULL},
    {"workload_resume", native_workload_resume, METH_VARARGS, NULL},
    {"workload_throttle", native_workload_throttle, METH_VARARGS, NULL},
    {"workload_writes", native_workload_writes, METH_VARARGS, NULL},
    {"workload_count_dirty", native_workload_count_dirty, METH_VARARGS, NULL},
    {"workload_limit_dirty", native_workload_limit_dirty, METH_VARARGS, NULL},
    {"workload_dirtied", native_workload_dirtied, METH_VARARGS, NULL},
    {"workload_save", native_workload_save, METH_VARARGS, NULL},
    {"workload_load", native_workload_load, METH_VARARGS, NULL},
    {"workload_stop", native_workload_stop, METH_VARARGS, NULL},
    {"insert", native_insert, METH_VARARGS, NULL},
    {"insert_zero", native_insert_zero, METH_VARARGS, NULL},
    {"discard_missing", native_discard_missing, METH_VARARGS, NULL},
    {"bitmap_widen", native_bitmap_widen, METH_VARARGS, NULL},
    {"faults_open", native_faults_open, METH_VARARGS, NULL},
    {"faults_reconnect", native_faults_reconnect, METH_VARARGS, NULL},
    {"faults_wake_all", native_faults_wake_all, METH_VARARGS, NULL},
    {"faults_run", native_faults_run, METH_VARARGS, NULL},
    {"faults_news", native_faults_news, METH_VARARGS, NULL},
    {"faults_prefetch", native_faults_prefetch, METH_VARARGS, NULL},
    {"faults_fetch_rest", native_faults_fetch_rest, METH_VARARGS, NULL},
    {"faults_reason", native_faults_reason, METH_VARARGS, NULL},
    {"pages_open", native_pages_open, METH_VARARGS, NULL},
    {"pages_reconnect", native_pages_reconnect, METH_VARARGS, NULL},
    {"pages_run", native_pages_run, METH_VARARGS, NULL},
    {"pages_reason", native_pages_reason, METH_VARARGS, NULL},
    {"schedule_slice", native_schedule_slice, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } CONSTANTS[] = {
        {"PAGE_SIZE", (long)PAGE_BYTES},
        {"BATCH_WALK_PAGES_MAX", (long)BATCH_WALK_PAGES_MAX},
        {"DELTA_PAGES_MAX", (long)DELTA_PAGES_MAX},
        {"DELTA_BYTES_MAX", (long)DELTA_BYTES_MAX},
        {"DELTA_LENGTH_BYTES", (long)DELTA_LENGTH_BYTES},
        {"SPLIT_PAGES_MAX", (long)SPLIT_PAGES_MAX},
        {"UFFD_USER_MODE_ONLY", UFFD_USER_MODE_ONLY_FLAG},
        {"UFFD_FEATURE_MISSING_SHMEM", UFFD_FEATURE_MISSING_SHMEM},
        {"UFFD_FEATURE_MISSING_HUGETLBFS", UFFD_FEATURE_MISSING_HUGETLBFS},
        {"UFFD_FEATURE_PAGEFAULT_FLAG_WP", UFFD_FEATURE_PAGEFAULT_FLAG_WP},
        {"UFFD_FEATURE_WP_HUGETLBFS_SHMEM", UFFD_FEATURE_WP_HUGETLBFS_SHMEM},
        {"UFFD_FEATURE_WP_UNPOPULATED", (long)UFFD_WP_UNPOPULATED_FEATURE},
        {"UFFD_FEATURE_WP_ASYNC", (long)UFFD_WP_ASYNC_FEATURE},
        {"UFFD_REGISTER_MISSING", (long)UFFDIO_REGISTER_MODE_MISSING},
        {"UFFD_REGISTER_WP", (long)UFFDIO_REGISTER_MODE_WP},
        {"UFFD_FEATURE_THREAD_ID", UFFD_FEATURE_THREAD_ID},
        {"HUGE_UNIT_PAGES", (long)HUGE_UNIT_PAGES},
        {"FAULTS_WOKEN", FAULTS_WOKEN},
        {"FAULTS_NEWS", FAULTS_NEWS},
        {"FAULTS_LOST", FAULTS_LOST},
        {"FAULTS_COMPLETE", FAULTS_COMPLETE},
        {"PAGES_WOKEN", PAGES_WOKEN},
        {"PAGES_LOST", PAGES_LOST},
    };

    for (size_t i = 0; i < sizeof CONSTANTS / sizeof CONSTANTS[0]; ++i)
        if (PyModule_AddIntConstant(module, CONSTANTS[i].name, CONSTANTS[i].value) < 0)
            return -1;
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)add_constants},
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "engine._native",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&MODULE);
}
