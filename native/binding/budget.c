/* The bandwidth that channels share. */
#include "binding.h"

#include "budget.h"

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
    return none_or_error(0);
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

PyMethodDef BUDGET_METHODS[] = {
    {"budget_set_rate", native_budget_set_rate, METH_VARARGS, NULL},
    {"budget_take", native_budget_take, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
