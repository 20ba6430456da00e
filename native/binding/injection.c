/* A userfaultfd of another process's memory. */
#include "binding.h"

#include "inject.h"

static PyObject *told(enum inject_obstacle obstacle, const struct injection *injection)
{
    return Py_BuildValue("iiiiiLI", (int)obstacle, injection->uffd, injection->left_open,
                         injection->error, (int)injection->thread,
                         (long long)injection->stopped_ns, (unsigned)injection->attempts);
}

static int is_process(int pid)
{
    if (pid <= 0)
        PyErr_SetString(PyExc_ValueError, "pid must be positive");
    return pid > 0;
}

static PyObject *native_inject_userfaultfd(PyObject *module, PyObject *args)
{
    struct injection injection;
    enum inject_obstacle obstacle;
    uint64_t wait_ns;
    int pid, flags, keeps = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&|p:inject_userfaultfd", to_int, &pid, to_int, &flags,
                          to_size, &wait_ns, &keeps) ||
        !is_process(pid))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    obstacle = inject_userfaultfd(pid, flags, keeps, (int64_t)wait_ns, &injection);
    Py_END_ALLOW_THREADS
    return told(obstacle, &injection);
}

static PyObject *native_inject_close(PyObject *module, PyObject *args)
{
    struct injection injection;
    enum inject_obstacle obstacle;
    uint64_t wait_ns;
    int pid, number, fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:inject_close", to_int, &pid, to_int, &number, to_int, &fd,
                          to_size, &wait_ns) ||
        !is_process(pid))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    obstacle = inject_close(pid, number, fd, (int64_t)wait_ns, &injection);
    Py_END_ALLOW_THREADS
    return told(obstacle, &injection);
}

PyMethodDef INJECTION_METHODS[] = {
    {"inject_userfaultfd", native_inject_userfaultfd, METH_VARARGS, NULL},
    {"inject_close", native_inject_close, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
