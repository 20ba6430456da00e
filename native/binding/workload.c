/* The workload guest. */
#include "binding.h"

#include <errno.h>
#include <string.h>

#include "workload.h"

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
    RELEASE(&held->bitmap, &held->ram);
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
    return none_or_error(0);
}

static PyObject *judgement_or_error(const struct workload_judgement *judgement)
{
    if (PyErr_Occurred())
        return NULL;
    return Py_BuildValue("(KL)", (unsigned long long)judgement->wrong_pages,
                         (long long)judgement->first_wrong); /* UINT64_MAX becomes -1 */
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
    RELEASE(&counters, &ram);
    return judgement_or_error(&judgement);
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
    return judgement_or_error(&judgement);
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
    uint64_t wait_ns, took_ns;
    int rc;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:workload_pause", to_workload, &held, to_u64, &wait_ns))
        return NULL;
    if (wait_ns > UINT64_C(1) << 62)
        return os_error(-EINVAL);
    Py_BEGIN_ALLOW_THREADS
    rc = workload_pause(held->workload, wait_ns, &took_ns);
    Py_END_ALLOW_THREADS
    return rc < 0 ? os_error(rc) : PyLong_FromUnsignedLongLong(took_ns);
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
    for (uint32_t i = 0; list && i < workload_vcpus(held->workload); ++i)
        append_or_clear(&list, PyLong_FromUnsignedLongLong(writes[i]));
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
    for (uint32_t i = 0; list && i < workload_vcpus(held->workload); ++i)
        append_or_clear(&list, Py_BuildValue("(KK)", (unsigned long long)pages[i],
                                             (unsigned long long)slept_ns[i]));
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

static PyObject *native_workload_end(PyObject *module, PyObject *args)
{
    struct held_workload *held;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&:workload_end", to_workload, &held))
        return NULL;
    workload_end(held->workload);
    Py_RETURN_NONE;
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

PyMethodDef WORKLOAD_METHODS[] = {
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
    {"workload_end", native_workload_end, METH_VARARGS, NULL},
    {"workload_stop", native_workload_stop, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
