#include "zero_scan.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* The truth for all others: no tricks. */
static size_t zero_scan_scalar(const unsigned char *pages, size_t page_count, size_t page_size,
                               unsigned char *is_zero)
{
    size_t zero_count = 0;

    for (size_t i = 0; i < page_count; ++i) {
        const unsigned char *page = pages + i * page_size;
        size_t at = 0;

        for (uint64_t word; at < page_size; at += sizeof word) {
            memcpy(&word, page + at, sizeof word);
            if (word != 0)
                break;
        }
        is_zero[i] = at == page_size;
        zero_count += is_zero[i];
    }
    return zero_count;
}

/* Each kernel is this loop over its own STEP_IS_ZERO(address of ZERO_SCAN_STEP bytes). A macro,
 * because a function cannot be inlined into another one with a different target. */
#define ZERO_SCAN_BODY(STEP_IS_ZERO)                                                              \
    size_t zero_count = 0;                                                                        \
    for (size_t i = 0; i < page_count; ++i) {                                                     \
        const unsigned char *page = pages + i * page_size;                                        \
        size_t at = 0;                                                                            \
        while (at < page_size && STEP_IS_ZERO(page + at))                                         \
            at += ZERO_SCAN_STEP;                                                                 \
        is_zero[i] = at >= page_size;                                                             \
        zero_count += is_zero[i];                                                                 \
    }                                                                                             \
    return zero_count;

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
#include <immintrin.h>

static inline bool step_is_zero_sse2(const unsigned char *at)
{
    const __m128i *vector = (const __m128i *)(const void *)at;
    __m128i any = _mm_setzero_si128();

    for (size_t i = 0; i < ZERO_SCAN_STEP / sizeof any; ++i)
        any = _mm_or_si128(any, _mm_loadu_si128(vector + i));
    return _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff;
}

static size_t zero_scan_sse2(const unsigned char *pages, size_t page_count, size_t page_size,
                             unsigned char *is_zero)
{
    ZERO_SCAN_BODY(step_is_zero_sse2)
}

__attribute__((target("avx2"))) static inline bool step_is_zero_avx2(const unsigned char *at)
{
    const __m256i *vector = (const __m256i *)(const void *)at;
    __m256i any = _mm256_setzero_si256();

    for (size_t i = 0; i < ZERO_SCAN_STEP / sizeof any; ++i)
        any = _mm256_or_si256(any, _mm256_loadu_si256(vector + i));
    return _mm256_testz_si256(any, any);
}

__attribute__((target("avx2"))) static size_t
zero_scan_avx2(const unsigned char *pages, size_t page_count, size_t page_size,
               unsigned char *is_zero)
{
    ZERO_SCAN_BODY(step_is_zero_avx2)
}

__attribute__((target("avx512f"))) static inline bool step_is_zero_avx512(const unsigned char *at)
{
    __m512i any = _mm512_setzero_si512();

    for (size_t i = 0; i < ZERO_SCAN_STEP / sizeof any; ++i)
        any = _mm512_or_si512(any, _mm512_loadu_si512(at + i * sizeof any));
    return _mm512_test_epi64_mask(any, any) == 0;
}

__attribute__((target("avx512f"))) static size_t
zero_scan_avx512(const unsigned char *pages, size_t page_count, size_t page_size,
                 unsigned char *is_zero)
{
    ZERO_SCAN_BODY(step_is_zero_avx512)
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}
#elif defined(__aarch64__)
#include <arm_neon.h>

static inline bool step_is_zero_neon(const unsigned char *at)
{
    uint8x16_t any = vdupq_n_u8(0);

    for (size_t i = 0; i < ZERO_SCAN_STEP / sizeof any; ++i)
        any = vorrq_u8(any, vld1q_u8(at + i * sizeof any));
    return vmaxvq_u8(any) == 0;
}

static size_t zero_scan_neon(const unsigned char *pages, size_t page_count, size_t page_size,
                             unsigned char *is_zero)
{
    ZERO_SCAN_BODY(step_is_zero_neon)
}
#endif

struct zero_scan_kernel {
    const char *name;
    zero_scan_fn *scan;
    bool (*is_supported)(void);
};

/* Fastest first, as measured; the first one that the CPU can run is the default. GB/s over 512 MiB of
 * touched shared memory, and over 512 KiB in the cache: avx2 32.2 and 111, sse2 31.0 and 91, avx512
 * 27.3 and 102, scalar 26.7 and 28 (AMD EPYC 9004, Zen 4, one core, gcc 12). NEON is not measured. */
static const struct zero_scan_kernel KERNELS[] = {
#if defined(__x86_64__)
    {"avx2", zero_scan_avx2, has_avx2},
    {"sse2", zero_scan_sse2, always},
    {"avx512", zero_scan_avx512, has_avx512},
#elif defined(__aarch64__)
    {"neon", zero_scan_neon, always},
#endif
    {"scalar", zero_scan_scalar, always},
};

#define KERNEL_COUNT (sizeof KERNELS / sizeof KERNELS[0])

int zero_scan_select(const char *name, zero_scan_fn **kernel)
{
    for (size_t i = 0; i < KERNEL_COUNT; ++i) {
        if (strcmp(KERNELS[i].name, name) != 0)
            continue;
        if (!KERNELS[i].is_supported())
            return -ENOTSUP;
        *kernel = KERNELS[i].scan;
        return 0;
    }
    return -EINVAL;
}

static const struct zero_scan_kernel *supported_kernel(size_t index)
{
    for (size_t i = 0; i < KERNEL_COUNT; ++i)
        if (KERNELS[i].is_supported() && index-- == 0)
            return &KERNELS[i];
    return NULL;
}

const char *zero_scan_name(size_t index)
{
    const struct zero_scan_kernel *kernel = supported_kernel(index);

    return kernel ? kernel->name : NULL;
}

zero_scan_fn *zero_scan_default(void)
{
    return supported_kernel(0)->scan;
}
