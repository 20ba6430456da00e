/* Every kernel writes what the scalar one does, the decoder takes it back, and refuses all else. */
#include "xbzrle.h"

#include <errno.h>

#include "check.h"

/* An allocation of exactly this size: whatever reads or writes past it is seen. */
static unsigned char *exactly(const unsigned char *bytes, size_t size)
{
    unsigned char *copy = malloc(size ? size : 1);

    memcpy(copy, bytes, size);
    return copy;
}

/* QEMU's docs/xbzrle.txt. */
static void the_documented_example(xbzrle_encode_fn *encode)
{
    static const unsigned char old_middle[] = {0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b,
                                               0x0c, 0x0d, 0x0e, 0x0f, 0x10, 0x11, 0x12,
                                               0x13, 0x68, 0x00, 0x00, 0x6b, 0x00, 0x6d};
    static const unsigned char new_middle[] = {0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07,
                                               0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e,
                                               0x0f, 0x68, 0x00, 0x00, 0x67, 0x00, 0x69};
    static const unsigned char delta[24] = {0xe9, 0x07, 0x0f, 0x01, 0x02, 0x03, 0x04, 0x05,
                                            0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d,
                                            0x0e, 0x0f, 0x03, 0x01, 0x67, 0x01, 0x01, 0x69};
    unsigned char old_page[PAGE_BYTES] = {0}, new_page[PAGE_BYTES] = {0}, output[24];

    memcpy(old_page + 1001, old_middle, sizeof old_middle);
    memcpy(new_page + 1001, new_middle, sizeof new_middle);
    CHECK(encode(old_page, new_page, output, sizeof output) == sizeof delta);
    CHECK(memcmp(output, delta, sizeof delta) == 0);
    CHECK(encode(old_page, new_page, output, sizeof output - 1) == XBZRLE_OVERFLOW);
    CHECK(encode(old_page, old_page, output, 0) == 0);
    CHECK(xbzrle_is_valid(delta, sizeof delta));
    xbzrle_apply(delta, sizeof delta, old_page);
    CHECK(memcmp(old_page, new_page, PAGE_BYTES) == 0);
}

/* Runs of kept and changed bytes, 1 .. `run_max` long. */
static void change_runs(unsigned char *page, size_t run_max, uint64_t *state)
{
    bool is_changed = random_below(state, 2);

    for (size_t at = 0; at < PAGE_BYTES; is_changed = !is_changed) {
        for (size_t end = at + 1 + random_below(state, run_max); at < end && at < PAGE_BYTES; ++at)
            page[at] = (unsigned char)(page[at] + (is_changed ? 1 + random_below(state, 255) : 0));
    }
}

static void round_trip(xbzrle_encode_fn *encode, xbzrle_encode_fn *truth, uint64_t *state)
{
    static unsigned char pages[2 * PAGE_BYTES + 2];
    unsigned char *old_page = pages + random_below(state, 2);
    unsigned char *new_page = old_page + PAGE_BYTES;
    size_t room = random_below(state, 3) ? PAGE_BYTES : random_below(state, PAGE_BYTES), length;
    unsigned char *expected = malloc(PAGE_BYTES), *output = malloc(room ? room : 1), *delta;

    for (size_t i = 0; i < PAGE_BYTES; ++i)
        old_page[i] = (unsigned char)random_word(state);
    memcpy(new_page, old_page, PAGE_BYTES);
    change_runs(new_page, (size_t)1 << random_below(state, 13), state);
    length = truth(old_page, new_page, expected, room);
    CHECK(encode(old_page, new_page, output, room) == length);
    if (length != XBZRLE_OVERFLOW && length != 0) {
        CHECK(memcmp(output, expected, length) == 0);
        delta = exactly(output, length);
        CHECK(xbzrle_is_valid(delta, length));
        xbzrle_apply(delta, length, old_page);
        CHECK(memcmp(old_page, new_page, PAGE_BYTES) == 0);
        free(delta);
    }
    free(output);
    free(expected);
}

static bool valid(const char *bytes, size_t length)
{
    unsigned char *delta = exactly((const unsigned char *)bytes, length);
    bool is_valid = xbzrle_is_valid(delta, length);

    free(delta);
    return is_valid;
}

static void wrong_deltas_are_refused(void)
{
    CHECK(!valid("", 0));
    CHECK(!valid("\x05", 1));                 /* no second length */
    CHECK(!valid("\x05\x02x", 3));            /* cut off */
    CHECK(!valid("\x05\x01xx", 4));           /* a byte too many: a length */
    CHECK(valid("\x05\x01x", 3));
    CHECK(valid("\x00\x01x", 3));             /* only the first may be 0 */
    CHECK(!valid("\x00\x00", 2));
    CHECK(!valid("\x00\x01x\x00\x01x", 6));
    CHECK(!valid("\x00\x01x\x01\x00", 5));
    CHECK(!valid("\x80\x80\x00\x01x", 5));    /* a length of three bytes */
    CHECK(!valid("\x80", 1));
    CHECK(valid("\x85\x00\x01x", 4));         /* longer than it need be, as QEMU's takes it */
    CHECK(valid("\xff\x1f\x01x", 4));         /* the last byte of the page */
    CHECK(!valid("\x80\x20\x01x", 4));        /* behind it */
    CHECK(!valid("\xff\x1f\x02xx", 5));
    CHECK(!valid("\xff\x1f\x01x\xff\x7f\x01x", 8));
}

/* Random bytes with short lengths, so that many are nearly right: whatever is valid stays within. */
static void random_deltas_stay_within_the_page(uint64_t *state)
{
    unsigned accepted = 0;

    for (int i = 0; i < 200000; ++i) {
        unsigned char bytes[40], page[PAGE_BYTES], *delta;
        size_t length = random_below(state, sizeof bytes);

        for (size_t n = 0; n < length; ++n)
            bytes[n] = (unsigned char)(random_word(state) & (random_below(state, 4) ? 7 : 0xff));
        delta = exactly(bytes, length);
        if (xbzrle_is_valid(delta, length)) {
            xbzrle_apply(delta, length, page);
            ++accepted;
        }
        free(delta);
    }
    CHECK(accepted > 1000);
}

int main(void)
{
    uint64_t state = 3;
    xbzrle_encode_fn *encode, *truth;
    const char *name;

    CHECK(xbzrle_select("scalar", &truth) == 0);
    CHECK(xbzrle_select("fastest", &encode) == -EINVAL);
    for (size_t i = 0; (name = xbzrle_name(i)); ++i) {
        CHECK(xbzrle_select(name, &encode) == 0);
        CHECK(i > 0 || encode == xbzrle_default());
        the_documented_example(encode);
        for (int n = 0; n < 1500; ++n)
            round_trip(encode, truth, &state);
    }
    wrong_deltas_are_refused();
    random_deltas_stay_within_the_page(&state);
    return 0;
}
