/* The source's delta cache. */
#include "binding.h"

#include <errno.h>

#include "delta_cache.h"

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
    return none_or_error(0);
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
    RELEASE(&output.delta_runs, &output.deltas, &output.full_runs, &output.full_pages, &runs, &ram);
    return result;
}

PyMethodDef DELTA_METHODS[] = {
    {"delta_cache_new", native_delta_cache_new, METH_VARARGS, NULL},
    {"delta_cache_resize", native_delta_cache_resize, METH_VARARGS, NULL},
    {"delta_cache_forget", native_delta_cache_forget, METH_VARARGS, NULL},
    {"delta_cache_get", native_delta_cache_get, METH_VARARGS, NULL},
    {"delta_cache_set_zero", native_delta_cache_set_zero, METH_VARARGS, NULL},
    {"delta_batch", native_delta_batch, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
