/* Converters and checks: see binding.h. */
#include "binding.h"

#include <limits.h>

#include "bitmap.h"
#include "insertion.h"

int to_u64(PyObject *object, void *output)
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

int to_size(PyObject *object, void *output)
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

int to_int(PyObject *object, void *output)
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

int to_slice(PyObject *object, void *output)
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

int is_aligned(const Py_buffer *buffer, const char *what, size_t alignment)
{
    if ((uintptr_t)buffer->buf % alignment == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is not aligned to %zu bytes", what, alignment);
    return 0;
}

int unit_fits(uint64_t unit_pages)
{
    if (unit_pages > 0 && unit_pages <= PAGE_COUNT_MAX)
        return 1;
    PyErr_Format(PyExc_ValueError, "units of %llu pages", (unsigned long long)unit_pages);
    return 0;
}

int page_count_fits(uint64_t page_count)
{
    if (page_count <= PAGE_COUNT_MAX)
        return 1;
    PyErr_Format(PyExc_ValueError, "%llu pages are more than the 2**32 that a block may have",
                 (unsigned long long)page_count);
    return 0;
}

int range_fits(uint64_t first_page, uint64_t page_count)
{
    if (first_page <= PAGE_COUNT_MAX && page_count <= PAGE_COUNT_MAX - first_page)
        return 1;
    PyErr_Format(PyExc_ValueError, "pages %llu and %llu more are beyond the 2**32 of a block",
                 (unsigned long long)first_page, (unsigned long long)page_count);
    return 0;
}

int first_page_fits(uint64_t first_page)
{
    return range_fits(first_page, 0);
}

int is_page_multiple(const char *what, uint64_t value)
{
    if (value % PAGE_BYTES == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s %llu is not a multiple of %zu", what,
                 (unsigned long long)value, PAGE_BYTES);
    return 0;
}

int address_fits(uint64_t address, uint64_t page_count)
{
    if (!is_page_multiple("address", address))
        return 0;
    if (address <= INT64_MAX - page_count * PAGE_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "RAM of %llu pages at address %llu reaches beyond 2**63-1",
                 (unsigned long long)page_count, (unsigned long long)address);
    return 0;
}

int bitmap_fits(const Py_buffer *bitmap, const char *what, uint64_t page_count)
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

int pages_fit(const Py_buffer *buffer, const char *what, uint64_t page_count, size_t unit)
{
    if (page_count_fits(page_count) && (uint64_t)buffer->len / unit >= page_count)
        return 1;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s of %zd bytes does not hold %llu pages of %zu bytes", what,
                     buffer->len, (unsigned long long)page_count, unit);
    return 0;
}

int has_room(const Py_buffer *buffer, const char *what, uint64_t total, size_t unit)
{
    if ((uint64_t)buffer->len / unit >= total)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes has no room for %zu bytes of each of %llu pages",
                 what, buffer->len, unit, (unsigned long long)total);
    return 0;
}

int runs_fit(const Py_buffer *runs, uint64_t run_count, uint64_t page_count, uint64_t *total)
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

int payload_fits(const Py_buffer *payload, const char *what, uint64_t total_pages)
{
    if ((uint64_t)payload->len == total_pages * PAGE_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s of %zd bytes is not the %llu pages that the runs say", what,
                 payload->len, (unsigned long long)total_pages);
    return 0;
}

int batch_is_small(uint64_t total, uint64_t pages_max)
{
    if (total <= pages_max)
        return 1;
    PyErr_Format(PyExc_ValueError, "runs of %llu pages; at most %llu are taken at once",
                 (unsigned long long)total, (unsigned long long)pages_max);
    return 0;
}

int insertion_fits(const struct insertion *to, const Py_buffer *received, uint64_t page_count)
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

struct run_table run_table_over(const Py_buffer *runs)
{
    return (struct run_table){.bytes = runs->buf, .capacity = (size_t)runs->len / RUN_BYTES};
}
