/* Pages that can be judged by themselves: see workload.h. */
#define _GNU_SOURCE
#include "workload_pages.h"

#include <string.h>

_Static_assert(WORKLOAD_PAGE_WORDS * sizeof(uint64_t) == WORKLOAD_PAGE_SIZE, "page of words");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pages are little-endian");

static uint64_t checksum(const uint64_t *page, uint64_t seed)
{
    uint64_t sum = seed_part(seed);
    for (unsigned i = 0; i < CHECKSUM_WORD; i++)
        sum += page[i] * weight(i);
    for (unsigned i = WORKLOAD_HEADER_WORDS; i < WORKLOAD_PAGE_WORDS; i++)
        sum += page[i] * weight(i);
    return sum;
}

enum workload_kind workload_contents(const char *name)
{
    static const char *const names[] = {"zero", "text", "heap", "random", "mixed"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum workload_kind)(i + 1);
    return 0;
}

enum workload_kind workload_page_kind(enum workload_kind contents, uint64_t seed, uint64_t page)
{
    if (contents != WORKLOAD_MIXED)
        return contents;
    uint64_t tenth = mix(~seed, page / WORKLOAD_MIXED_RUN_PAGES) % 10;
    if (tenth < 4)
        return WORKLOAD_ZERO;
    if (tenth < 7)
        return WORKLOAD_TEXT;
    return tenth < 9 ? WORKLOAD_HEAP : WORKLOAD_RANDOM;
}

/* Words drawn with a skew, separated by blanks and line ends: compresses like source and prose. Each is
 * padded to 16 bytes, so that it is copied in one go. */
static void fill_text(uint64_t *body, uint64_t state)
{
    static const char vocabulary[64][16] = {
        "the ",     "of ",        "and ",     "to ",      "in ",       "page ",    "guest ",
        "memory ",  "return ",    "struct ",  "static ",  "int ",      "if ",      "else ",
        "for ",     "while ",     "= ",       "== ",      "->",        "();\n",    "{\n",
        "}\n",      "0 ",         "1 ",       "NULL ",    "size ",     "index ",   "address ",
        "channel ", "block ",     "dirty ",   "round ",   "migrate ",  "monitor ", "command ",
        "capacity ", "transfer ", "response ", "server ", "client ",   "request ", "timeout ",
        "error: ",  "warning: ",  "message ", "value ",   "name ",     "2024-",    "127.0.0.1 ",
        "http://",  "<div>\n",    "</div>\n", "\"text\" ", "function ", "export ",  "const ",
        "include ", "define ",    "unsigned ", "pointer ", "buffer ",  "length ",  "offset ",
        "document.\n",
    };
    char text[WORKLOAD_BODY_WORDS * sizeof(uint64_t) + 16];
    size_t used = 0;
    while (used < WORKLOAD_BODY_WORDS * sizeof(uint64_t)) {
        uint64_t random = next_random(&state);
        if (random % 8 == 0) { /* something that was not seen before */
            size_t length = 4 + (random >> 4) % 6;
            for (size_t i = 0; i < length; i++)
                text[used + i] = (char)('a' + (random >> (8 + 5 * i)) % 26);
            used += length;
            text[used++] = ' ';
            continue;
        }
        for (unsigned i = 0; i < 4 && used < WORKLOAD_BODY_WORDS * sizeof(uint64_t); i++) {
            random >>= 12;
            unsigned one = random % 64, other = random / 64 % 64;
            const char *word = vocabulary[one < other ? one : other];
            memcpy(text + used, word, 16);
            used += strnlen(word, 16);
        }
    }
    memcpy(body, text, WORKLOAD_BODY_WORDS * sizeof *body);
}

/* What an allocator leaves: pointers into one arena, small integers, and nothing. */
static void fill_heap(uint64_t *body, uint64_t state)
{
    uint64_t arena = UINT64_C(0x7f0000000000) + (next_random(&state) & UINT64_C(0xfff000000));
    for (unsigned i = 0; i < WORKLOAD_BODY_WORDS; i++) {
        uint64_t random = next_random(&state);
        if (random % 8 < 3)
            body[i] = arena + ((random >> 8) & UINT64_C(0x3fffff0));
        else if (random % 8 < 6)
            body[i] = (random >> 8) % 1000;
        else
            body[i] = 0;
    }
}

static void fill_random(uint64_t *body, uint64_t state)
{
    for (unsigned i = 0; i < WORKLOAD_BODY_WORDS; i++)
        body[i] = next_random(&state);
}

void workload_fill(void *ram, uint64_t first_page, uint64_t page_count, enum workload_kind contents,
                   uint64_t seed)
{
    for (uint64_t index = first_page; index < first_page + page_count; index++) {
        enum workload_kind kind = workload_page_kind(contents, seed, index);
        if (kind == WORKLOAD_ZERO)
            continue;
        uint64_t *page = page_at(ram, index);
        uint64_t state = mix(seed, index);
        page[MAGIC_WORD] = WORKLOAD_MAGIC | kind;
        page[INDEX_WORD] = index;
        page[COUNTER_WORD] = 0;
        if (kind == WORKLOAD_TEXT)
            fill_text(page + WORKLOAD_HEADER_WORDS, state);
        else if (kind == WORKLOAD_HEAP)
            fill_heap(page + WORKLOAD_HEADER_WORDS, state);
        else
            fill_random(page + WORKLOAD_HEADER_WORDS, state);
        page[CHECKSUM_WORD] = checksum(page, seed);
    }
}

static bool is_all_zero(const uint64_t *page)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < WORKLOAD_PAGE_WORDS; i++)
        any |= page[i];
    return any == 0;
}

struct workload_judgement workload_judge(const void *ram, uint64_t first_page, uint64_t page_count,
                                         enum workload_kind contents, uint64_t seed,
                                         uint64_t *counters)
{
    struct workload_judgement judgement = {0, UINT64_MAX};
    for (uint64_t i = 0; i < page_count; i++) {
        const uint64_t *page = page_at(ram, first_page + i);
        enum workload_kind kind = workload_page_kind(contents, seed, first_page + i);
        bool is_right;
        if (page[MAGIC_WORD] == 0)
            is_right = kind == WORKLOAD_ZERO && is_all_zero(page);
        else
            is_right = page[MAGIC_WORD] == (WORKLOAD_MAGIC | kind) &&
                       page[INDEX_WORD] == first_page + i && page[COUNTER_WORD] != WORKLOAD_WRONG &&
                       page[CHECKSUM_WORD] == checksum(page, seed);
        counters[i] = is_right ? page[COUNTER_WORD] : WORKLOAD_WRONG;
        if (!is_right && judgement.wrong_pages++ == 0)
            judgement.first_wrong = first_page + i;
    }
    return judgement;
}

struct workload_judgement workload_judge_hole(uint64_t first_page, uint64_t page_count,
                                              enum workload_kind contents, uint64_t seed,
                                              uint64_t *counters)
{
    struct workload_judgement judgement = {0, UINT64_MAX};
    for (uint64_t i = 0; i < page_count; i++) {
        if (workload_page_kind(contents, seed, first_page + i) == WORKLOAD_ZERO)
            continue;
        counters[i] = WORKLOAD_WRONG;
        if (judgement.wrong_pages++ == 0)
            judgement.first_wrong = first_page + i;
    }
    return judgement;
}
