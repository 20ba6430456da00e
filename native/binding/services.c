/* Postcopy: the services. */
#include "binding.h"

#include "faults.h"
#include "page_service.h"
#include "schedule.h"

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
    while (list && faults_news(service, &block, &page))
        append_or_clear(&list, Py_BuildValue("(KK)", (unsigned long long)block,
                                             (unsigned long long)page));
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

PyMethodDef SERVICE_METHODS[] = {
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
