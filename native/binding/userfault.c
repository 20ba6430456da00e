/* userfaultfd. */
#include "binding.h"

#include "userfault.h"

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

static PyObject *native_uffd_negotiate(PyObject *module, PyObject *args)
{
    uint64_t features;
    int uffd;

    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&:uffd_negotiate", to_int, &uffd, to_u64, &features))
        return NULL;
    return none_or_error(uffd_negotiate(uffd, features));
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

PyMethodDef USERFAULT_METHODS[] = {
    {"mapping_address", native_mapping_address, METH_VARARGS, NULL},
    {"uffd_open", native_uffd_open, METH_VARARGS, NULL},
    {"uffd_negotiate", native_uffd_negotiate, METH_VARARGS, NULL},
    {"uffd_register", native_uffd_register, METH_VARARGS, NULL},
    {"uffd_unregister", native_uffd_unregister, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
