/* The module, put together from the tables of the other files. */
#include "binding.h"

#include "batch.h"
#include "compressibility.h"
#include "delta_cache.h"
#include "faults.h"
#include "inject.h"
#include "insertion.h"
#include "linux_abi.h"
#include "page_service.h"

static int add_methods(PyObject *module)
{
    PyMethodDef *const TABLES[] = {
        KERNEL_METHODS,   BITMAP_METHODS,    SOURCE_METHODS,      DELTA_METHODS,
        TRACKING_METHODS, USERFAULT_METHODS, DESTINATION_METHODS, BUDGET_METHODS,
        WORKLOAD_METHODS, INSERTION_METHODS, SERVICE_METHODS,     INJECTION_METHODS,
    };

    for (size_t i = 0; i < sizeof TABLES / sizeof TABLES[0]; ++i)
        if (PyModule_AddFunctions(module, TABLES[i]) < 0)
            return -1;
    return 0;
}

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } CONSTANTS[] = {
        {"PAGE_SIZE", (long)PAGE_BYTES},
        {"BATCH_WALK_PAGES_MAX", (long)BATCH_WALK_PAGES_MAX},
        {"DELTA_PAGES_MAX", (long)DELTA_PAGES_MAX},
        {"DELTA_BYTES_MAX", (long)DELTA_BYTES_MAX},
        {"DELTA_LENGTH_BYTES", (long)DELTA_LENGTH_BYTES},
        {"SPLIT_PAGES_MAX", (long)SPLIT_PAGES_MAX},
        {"UFFD_USER_MODE_ONLY", UFFD_USER_MODE_ONLY_FLAG},
        {"UFFD_FEATURE_MISSING_SHMEM", UFFD_FEATURE_MISSING_SHMEM},
        {"UFFD_FEATURE_MISSING_HUGETLBFS", UFFD_FEATURE_MISSING_HUGETLBFS},
        {"UFFD_FEATURE_PAGEFAULT_FLAG_WP", UFFD_FEATURE_PAGEFAULT_FLAG_WP},
        {"UFFD_FEATURE_WP_HUGETLBFS_SHMEM", UFFD_FEATURE_WP_HUGETLBFS_SHMEM},
        {"UFFD_FEATURE_WP_UNPOPULATED", (long)UFFD_WP_UNPOPULATED_FEATURE},
        {"UFFD_FEATURE_WP_ASYNC", (long)UFFD_WP_ASYNC_FEATURE},
        {"UFFD_REGISTER_MISSING", (long)UFFDIO_REGISTER_MODE_MISSING},
        {"UFFD_REGISTER_WP", (long)UFFDIO_REGISTER_MODE_WP},
        {"UFFD_FEATURE_THREAD_ID", UFFD_FEATURE_THREAD_ID},
        {"UFFD_FEATURE_EVENT_FORK", UFFD_FEATURE_EVENT_FORK},
        {"HUGE_UNIT_PAGES", (long)HUGE_UNIT_PAGES},
        {"FAULTS_WOKEN", FAULTS_WOKEN},
        {"FAULTS_NEWS", FAULTS_NEWS},
        {"FAULTS_LOST", FAULTS_LOST},
        {"FAULTS_COMPLETE", FAULTS_COMPLETE},
        {"PAGES_WOKEN", PAGES_WOKEN},
        {"PAGES_LOST", PAGES_LOST},
        {"INJECT_DONE", INJECT_DONE},
        {"INJECT_GONE", INJECT_GONE},
        {"INJECT_NOT_ALLOWED", INJECT_NOT_ALLOWED},
        {"INJECT_TRACED", INJECT_TRACED},
        {"INJECT_NOT_64_BIT", INJECT_NOT_64_BIT},
        {"INJECT_FILTERED", INJECT_FILTERED},
        {"INJECT_SHADOW_STACK", INJECT_SHADOW_STACK},
        {"INJECT_NO_CODE", INJECT_NO_CODE},
        {"INJECT_NO_SAFE_THREAD", INJECT_NO_SAFE_THREAD},
        {"INJECT_TOO_OLD", INJECT_TOO_OLD},
        {"INJECT_REFUSED", INJECT_REFUSED},
        {"INJECT_FAILED", INJECT_FAILED},
    };

    for (size_t i = 0; i < sizeof CONSTANTS / sizeof CONSTANTS[0]; ++i)
        if (PyModule_AddIntConstant(module, CONSTANTS[i].name, CONSTANTS[i].value) < 0)
            return -1;
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)add_methods},
    {Py_mod_exec, (void *)add_constants},
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "engine._native",
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&MODULE);
}
