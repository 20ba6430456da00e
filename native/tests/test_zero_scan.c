/* Every kernel finds every single byte, and writes nothing but its flags. */
#include "zero_scan.h"

#include <errno.h>
#include <string.h>

#include "check.h"

#define PAGE ((size_t)4096)
#define PAGES ((size_t)5)

static void every_byte_of_a_page_counts(zero_scan_fn *scan)
{
    unsigned char *memory = calloc(PAGES * PAGE + 1, 1), *pages = memory + 1;
    unsigned char is_zero[PAGES + 1];

    for (size_t at = 0; at < PAGE; ++at) {
        pages[2 * PAGE + at] = (unsigned char)(1 << at % 8);
        memset(is_zero, 9, sizeof is_zero);
        CHECK(scan(pages, PAGES, PAGE, is_zero) == PAGES - 1);
        CHECK(memcmp(is_zero, (unsigned char[]){1, 1, 0, 1, 1, 9}, sizeof is_zero) == 0);
        pages[2 * PAGE + at] = 0;
    }
    free(memory);
}

static void kernels_agree(zero_scan_fn *scan, zero_scan_fn *truth, uint64_t *state)
{
    size_t page_size = ZERO_SCAN_STEP * (1 + random_below(state, 20));
    size_t count = random_below(state, 9);
    unsigned char *pages = calloc(count * page_size + 1, 1);
    unsigned char is_zero[8], expected[8];

    for (size_t i = 0; i < count; ++i)
        if (random_below(state, 2))
            pages[i * page_size + random_below(state, page_size)] = 0x80;
    CHECK(scan(pages, count, page_size, is_zero) == truth(pages, count, page_size, expected));
    CHECK(memcmp(is_zero, expected, count) == 0);
    free(pages);
}

int main(void)
{
    uint64_t state = 7;
    zero_scan_fn *scan, *truth;
    const char *name;

    CHECK(zero_scan_select("scalar", &truth) == 0);
    CHECK(zero_scan_select("fastest", &scan) == -EINVAL);
    CHECK(zero_scan_select("", &scan) == -EINVAL);
    for (size_t i = 0; (name = zero_scan_name(i)); ++i) {
        CHECK(zero_scan_select(name, &scan) == 0);
        CHECK(i > 0 || scan == zero_scan_default());
        every_byte_of_a_page_counts(scan);
        for (int n = 0; n < 500; ++n)
            kernels_agree(scan, truth, &state);
    }
    return 0;
}
