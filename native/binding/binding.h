/* What the files of `engine._native` share. They are one a noun: arguments in, kernel, result out.
 * engine/_native.pyi is the contract; here is no logic but the checks that keep a kernel
 * inside the buffers it was given. Only this directory knows Python.
 *
 * Buffers stay held while the GIL is released, so the memory cannot move or go. */
#ifndef RAMFERRY_BINDING_H
#define RAMFERRY_BINDING_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stddef.h>
#include <stdint.h>

#include "pages.h"

/* -- what module.c puts together ------------------------------------------------------------------- */

extern PyMethodDef BITMAP_METHODS[], BUDGET_METHODS[], DELTA_METHODS[], DESTINATION_METHODS[],
    INJECTION_METHODS[], INSERTION_METHODS[], KERNEL_METHODS[], SERVICE_METHODS[], SOURCE_METHODS[],
    TRACKING_METHODS[], USERFAULT_METHODS[], WORKLOAD_METHODS[];

/* -- converters for PyArg_ParseTuple("O&"): a wrong value is a ValueError, never a wrapped one ----- */

int to_u64(PyObject *object, void *output);   /* uint64_t */
int to_size(PyObject *object, void *output);  /* uint64_t: an offset, a size or count; below 2**63 */
int to_int(PyObject *object, void *output);   /* int */
int to_slice(PyObject *object, void *output); /* struct page_slice, a valid one */

/* -- checks: each returns 1, or 0 with a ValueError set; `what` names the argument ----------------- */

int is_aligned(const Py_buffer *buffer, const char *what, size_t alignment);
int is_page_multiple(const char *what, uint64_t value);
int page_count_fits(uint64_t page_count);
int unit_fits(uint64_t unit_pages);
int range_fits(uint64_t first_page, uint64_t page_count);

/* Where a scan begins; behind the slice there is nothing to scan. */
int first_page_fits(uint64_t first_page);

/* Whether a block at `address` ends within what a process can have. */
int address_fits(uint64_t address, uint64_t page_count);

int bitmap_fits(const Py_buffer *bitmap, const char *what, uint64_t page_count);

/* Whether `buffer` has `unit` bytes for each of a block's pages. */
int pages_fit(const Py_buffer *buffer, const char *what, uint64_t page_count, size_t unit);

/* Check a run table by itself and against `page_count`; sum its pages. */
int runs_fit(const Py_buffer *runs, uint64_t run_count, uint64_t page_count, uint64_t *total);

/* Whether `payload` is exactly the pages that runs_fit summed. */
int payload_fits(const Py_buffer *payload, const char *what, uint64_t total_pages);

/* Whether one call may take so many pages. */
int batch_is_small(uint64_t total, uint64_t pages_max);

/* Whether `buffer` has `unit` bytes for each of a batch's pages. */
int has_room(const Py_buffer *buffer, const char *what, uint64_t total, size_t unit);

/* What native/insertion.h takes for granted of a block. */
struct insertion;
int insertion_fits(const struct insertion *to, const Py_buffer *received, uint64_t page_count);

struct run_table run_table_over(const Py_buffer *runs);

/* -- the way out ----------------------------------------------------------------------------------- */

/* Give buffers back: RELEASE(&runs, &ram). */
#define RELEASE(...) release_buffers((Py_buffer *const[]){__VA_ARGS__, NULL})
void release_buffers(Py_buffer *const *buffers);

/* Append a new `item`, which is given up, to a new list. No item, or a failure: *list becomes NULL. */
void append_or_clear(PyObject **list, PyObject *item);

PyObject *os_error(int64_t rc);

/* For kernels that return something or -errno; NULL if an error is set already. */
PyObject *count_or_error(int64_t rc);
PyObject *none_or_error(int64_t rc);
PyObject *pair_or_error(int64_t rc, uint64_t first, uint64_t second);

#endif
