/* The way out: see binding.h. */
#include "binding.h"

#include <errno.h>

void release_buffers(Py_buffer *const *buffers)
{
    while (*buffers)
        PyBuffer_Release(*buffers++);
}

void append_or_clear(PyObject **list, PyObject *item)
{
    if (!item || PyList_Append(*list, item) < 0)
        Py_CLEAR(*list);
    Py_XDECREF(item);
}

PyObject *os_error(int64_t rc)
{
    errno = (int)-rc;
    return PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *count_or_error(int64_t rc)
{
    if (PyErr_Occurred())
        return NULL;
    return rc < 0 ? os_error(rc) : PyLong_FromLongLong(rc);
}

PyObject *none_or_error(int64_t rc)
{
    if (PyErr_Occurred())
        return NULL;
    if (rc < 0)
        return os_error(rc);
    Py_RETURN_NONE;
}

PyObject *pair_or_error(int64_t rc, uint64_t first, uint64_t second)
{
    if (PyErr_Occurred())
        return NULL;
    if (rc < 0)
        return os_error(rc);
    return Py_BuildValue("(KK)", (unsigned long long)first, (unsigned long long)second);
}
