#include "xbzrle.h"

#include <errno.h>

/* Bit i % 64 of word i / 64 stands for byte i of the page: whether it changed. */
#define MASK_WORDS (PAGE_BYTES / 64)

/* Short runs are copied in one piece, where both sides have so many bytes. */
#define COPY_BYTES ((size_t)16)

static inline size_t length_size(size_t length)
{
    return length < 0x80 ? 1 : 2;
}

static inline unsigned char *put_length(unsigned char *output, size_t length)
{
    *output++ = (unsigned char)(length < 0x80 ? length : (length & 0x7f) | 0x80);
    if (length >= 0x80)
        *output++ = (unsigned char)(length >> 7);
    return output;
}

/* The truth for all others: byte by byte. */
static size_t xbzrle_encode_scalar(const unsigned char *old_page, const unsigned char *new_page,
                                   unsigned char *output, size_t room)
{
    size_t used = 0;

    for (size_t at = 0;;) {
        size_t kept = at, changed, end, size;

        while (at < PAGE_BYTES && old_page[at] == new_page[at])
            ++at;
        if (at == PAGE_BYTES)
            return used;
        for (end = at; end < PAGE_BYTES && old_page[end] != new_page[end];)
            ++end;
        kept = at - kept;
        changed = end - at;
        size = length_size(kept) + length_size(changed) + changed;
        if (size > room - used)
            return XBZRLE_OVERFLOW;
        memcpy(put_length(put_length(output + used, kept), changed), new_page + at, changed);
        used += size;
        at = end;
    }
}

/* Write where each run of set bits begins and ends to `edges`; return how many there are, an even
 * number. */
static size_t find_edges(const uint64_t *mask, uint16_t *edges)
{
    uint16_t *edge = edges;
    uint64_t last = 0; /* the bit before the word */

    for (size_t i = 0; i < MASK_WORDS; ++i) {
        uint64_t turns = mask[i] ^ (mask[i] << 1 | last);

        for (; turns != 0; turns &= turns - 1)
            *edge++ = (uint16_t)(i * 64 + (size_t)__builtin_ctzll(turns));
        last = mask[i] >> 63;
    }
    if (last)
        *edge++ = PAGE_BYTES;
    return (size_t)(edge - edges);
}

/* The same delta from the bytes that changed. */
static size_t encode_mask(const uint64_t *mask, const unsigned char *new_page,
                          unsigned char *output, size_t room)
{
    uint16_t edges[PAGE_BYTES + 1];
    size_t edge_count = find_edges(mask, edges), used = 0, done = 0;

    for (size_t i = 0; i < edge_count; i += 2) {
        size_t at = edges[i], kept = at - done, changed = edges[i + 1] - at;

        if (kept < 0x80 && changed <= COPY_BYTES && at + COPY_BYTES <= PAGE_BYTES &&
            used + 2 + COPY_BYTES <= room) {
            output[used] = (unsigned char)kept;
            output[used + 1] = (unsigned char)changed;
            memcpy(output + used + 2, new_page + at, COPY_BYTES);
            used += 2 + changed;
        } else {
            size_t size = length_size(kept) + length_size(changed) + changed;

            if (size > room - used)
                return XBZRLE_OVERFLOW;
            memcpy(put_length(put_length(output + used, kept), changed), new_page + at, changed);
            used += size;
        }
        done = edges[i + 1];
    }
    return used;
}

/* Each kernel is this loop over its own CHANGED(old, new), the bits of 64 bytes. A macro, because a
 * function cannot be inlined into another one with a different target. */
#define ENCODE_BODY(CHANGED)                                                                      \
    uint64_t mask[MASK_WORDS];                                                                    \
    for (size_t i = 0; i < MASK_WORDS; ++i)                                                       \
        mask[i] = CHANGED(old_page + i * 64, new_page + i * 64);                                  \
    return encode_mask(mask, new_page, output, room);

/* Without vectors: eight bytes at a time. */
static inline uint64_t changed_word(const unsigned char *old_bytes, const unsigned char *new_bytes)
{
    const uint64_t low = UINT64_C(0x7f7f7f7f7f7f7f7f);
    uint64_t bits = 0;

    for (size_t i = 0; i < 8; ++i) {
        uint64_t left, right, differs;

        memcpy(&left, old_bytes + i * 8, 8);
        memcpy(&right, new_bytes + i * 8, 8);
        differs = left ^ right;
        differs = (((differs & low) + low) | differs) >> 7 & UINT64_C(0x0101010101010101);
        bits |= differs * UINT64_C(0x0102040810204080) >> 56 << (8 * i); /* a bit for each byte */
    }
    return bits;
}

static size_t xbzrle_encode_word(const unsigned char *old_page, const unsigned char *new_page,
                                 unsigned char *output, size_t room)
{
    ENCODE_BODY(changed_word)
}

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
#include <immintrin.h>

static inline uint64_t changed_sse2(const unsigned char *old_bytes, const unsigned char *new_bytes)
{
    uint64_t same = 0;

    for (size_t i = 0; i < 4; ++i) {
        __m128i left = _mm_loadu_si128((const __m128i *)(const void *)(old_bytes + i * 16));
        __m128i right = _mm_loadu_si128((const __m128i *)(const void *)(new_bytes + i * 16));

        same |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(left, right)) << (16 * i);
    }
    return ~same;
}

static size_t xbzrle_encode_sse2(const unsigned char *old_page, const unsigned char *new_page,
                                 unsigned char *output, size_t room)
{
    ENCODE_BODY(changed_sse2)
}

__attribute__((target("avx2"))) static inline uint64_t changed_avx2(const unsigned char *old_bytes,
                                                                    const unsigned char *new_bytes)
{
    uint64_t same = 0;

    for (size_t i = 0; i < 2; ++i) {
        __m256i left = _mm256_loadu_si256((const __m256i *)(const void *)(old_bytes + i * 32));
        __m256i right = _mm256_loadu_si256((const __m256i *)(const void *)(new_bytes + i * 32));

        same |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(left, right)) << (32 * i);
    }
    return ~same;
}

__attribute__((target("avx2"))) static size_t
xbzrle_encode_avx2(const unsigned char *old_page, const unsigned char *new_page,
                   unsigned char *output, size_t room)
{
    ENCODE_BODY(changed_avx2)
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}
#endif

struct xbzrle_kernel {
    const char *name;
    xbzrle_encode_fn *encode;
    bool (*is_supported)(void);
};

/* Fastest first, as measured; the first one that the CPU can run is the default. GB/s of new pages in
 * memory, half of the bytes changed in runs of 8, of 16 and of 1 to 32, and none changed: avx2 5.1, 8.3,
 * 2.9 and 13, sse2 4.7, 7.9, 2.8 and 12, word 3.5, 4.3, 2.2 and 6.2, scalar 1.5, 1.8, 1.0 and 1.8; of
 * pages in the cache, runs of 8: 6.3, 5.6, 3.3 and 1.4 (AMD EPYC, Zen 4, one core, gcc 12). AVX-512BW,
 * measured too, was up to 15 % slower than avx2 on pages in memory. */
static const struct xbzrle_kernel KERNELS[] = {
#if defined(__x86_64__)
    {"avx2", xbzrle_encode_avx2, has_avx2},
    {"sse2", xbzrle_encode_sse2, always},
#endif
    {"word", xbzrle_encode_word, always},
    {"scalar", xbzrle_encode_scalar, always},
};

#define KERNEL_COUNT (sizeof KERNELS / sizeof KERNELS[0])

int xbzrle_select(const char *name, xbzrle_encode_fn **kernel)
{
    for (size_t i = 0; i < KERNEL_COUNT; ++i) {
        if (strcmp(KERNELS[i].name, name) != 0)
            continue;
        if (!KERNELS[i].is_supported())
            return -ENOTSUP;
        *kernel = KERNELS[i].encode;
        return 0;
    }
    return -EINVAL;
}

static const struct xbzrle_kernel *supported_kernel(size_t index)
{
    for (size_t i = 0; i < KERNEL_COUNT; ++i)
        if (KERNELS[i].is_supported() && index-- == 0)
            return &KERNELS[i];
    return NULL;
}

const char *xbzrle_name(size_t index)
{
    const struct xbzrle_kernel *kernel = supported_kernel(index);

    return kernel ? kernel->name : NULL;
}

xbzrle_encode_fn *xbzrle_default(void)
{
    return supported_kernel(0)->encode;
}

/* Read a length at *at; false when it is cut off or longer than two bytes. */
static bool get_length(const unsigned char *delta, size_t length, size_t *at, size_t *value)
{
    if (*at >= length)
        return false;
    *value = delta[(*at)++];
    if (*value < 0x80)
        return true;
    if (*at >= length || delta[*at] >= 0x80)
        return false;
    *value = (*value & 0x7f) | (size_t)delta[(*at)++] << 7;
    return true;
}

bool xbzrle_is_valid(const unsigned char *delta, size_t length)
{
    size_t at = 0, page_at = 0;

    do {
        bool is_first = at == 0;
        size_t kept, changed;

        if (!get_length(delta, length, &at, &kept) || (kept == 0 && !is_first) ||
            !get_length(delta, length, &at, &changed) || changed == 0)
            return false;
        page_at += kept + changed; /* each below 2^14 */
        if (page_at > PAGE_BYTES || changed > length - at)
            return false;
        at += changed;
    } while (at < length);
    return true;
}

int deltas_check(const unsigned char *deltas, size_t size, uint64_t count, uint64_t *bad_delta)
{
    size_t at = 0;

    for (*bad_delta = 0; *bad_delta < count; ++*bad_delta) {
        size_t length;

        if (size - at < DELTA_LENGTH_BYTES)
            return -EINVAL;
        length = delta_length(deltas + at);
        at += DELTA_LENGTH_BYTES;
        if (length > size - at || !xbzrle_is_valid(deltas + at, length))
            return -EINVAL;
        at += length;
    }
    return at == size ? 0 : -EINVAL;
}

void xbzrle_apply(const unsigned char *delta, size_t length, unsigned char *page)
{
    for (size_t at = 0; at < length;) {
        size_t kept = 0, changed = 0;

        get_length(delta, length, &at, &kept);
        get_length(delta, length, &at, &changed);
        memcpy(page + kept, delta + at, changed);
        page += kept + changed;
        at += changed;
    }
}
