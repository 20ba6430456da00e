/* A userfaultfd of another process's memory. */
#include "binding.h"

#include "inject.h"

static PyObject *native_inject_userfaultfd(PyObject *module, PyObject *args)
{
    struct injection injection;
    enum inject_obstacle obstacle;
    uint64_t wait_ns;
    int pid, flags;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&:inject_userfaultfd", to_int, &pid, to_int, &flags, to_size,
                          &wait_ns))
        return NULL;
    if (pid <= 0) {
        PyErr_SetString(PyExc_ValueError, "pid must be positive");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    obstacle = inject_userfaultfd(pid, flags, (int64_t)wait_ns, &injection);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("iiiiiLI", (int)obstacle, injection.uffd, injection.left_open,
                         injection.error, (int)injection.thread, (long long)injection.stopped_ns,
                         (unsigned)injection.attempts);
}

PyMethodDef INJECTION_METHODS[] = {
    {"inject_userfaultfd", native_inject_userfaultfd, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
