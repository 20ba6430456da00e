/* Counting and limiting on a clock of our own. Exit code 0: all held. */
#include "../dirty_ring.h"

#include "check.h"

#define PAGES 100u
#define MS UINT64_C(1000000)
#define NOW (UINT64_C(5000) * MS)

static uint64_t counted(struct dirty_ring *ring)
{
    return atomic_load(&ring->dirty_pages);
}

static void a_page_counts_once_in_a_period(void)
{
    struct dirty_ring ring;

    CHECK(dirty_ring_init(&ring, PAGES) == 0);
    dirty_ring_note(&ring, 7);
    CHECK(counted(&ring) == 0); /* nobody asked for it */
    dirty_ring_tick(&ring, NOW);
    for (int i = 0; i < 3; i++) {
        dirty_ring_note(&ring, 0);
        dirty_ring_note(&ring, 63);
        dirty_ring_note(&ring, 64);
        dirty_ring_note(&ring, PAGES - 1);
    }
    CHECK(counted(&ring) == 4);
    dirty_ring_tick(&ring, NOW + 999 * MS);
    dirty_ring_note(&ring, 64);
    CHECK(counted(&ring) == 4);
    dirty_ring_tick(&ring, NOW + 1000 * MS);
    dirty_ring_note(&ring, 64);
    CHECK(counted(&ring) == 5);
    dirty_ring_rest(&ring);
    dirty_ring_note(&ring, 1);
    CHECK(counted(&ring) == 5);
    dirty_ring_tick(&ring, NOW + 1001 * MS); /* a new beginning: all is clean */
    dirty_ring_note(&ring, 64);
    CHECK(counted(&ring) == 6);
    dirty_ring_free(&ring);
    dirty_ring_free(&ring);
}

/* Pages written in a second when every page is a new one and nothing else takes time. */
static uint64_t pages_in(struct dirty_ring *ring, uint64_t from_ns, uint64_t to_ns)
{
    uint64_t before = counted(ring), page = 0;

    for (uint64_t now = from_ns; now < to_ns;) {
        uint64_t due = dirty_ring_due(ring, now);

        CHECK(due == 0 || due > now);
        if (due != 0) {
            now = due;
            continue;
        }
        if (page % PAGES == 0) { /* all are clean again: not what is tested here */
            dirty_ring_rest(ring);
            dirty_ring_tick(ring, now);
        }
        dirty_ring_note(ring, page++ % PAGES);
        now += 1000;
    }
    return counted(ring) - before;
}

static void a_limit_holds_from_when_it_is_set(void)
{
    struct dirty_ring ring;

    CHECK(dirty_ring_init(&ring, PAGES) == 0);
    CHECK(dirty_ring_due(&ring, NOW) == 0);
    atomic_store(&ring.limit_bytes_per_s, UINT64_C(4096000)); /* 1000 pages a second */
    uint64_t pages = pages_in(&ring, NOW, NOW + 1000 * MS);
    CHECK(pages >= 999 && pages <= 1001);
    /* Ten seconds without a write give 100 ms of them, not ten seconds. */
    pages = pages_in(&ring, NOW + 11000 * MS, NOW + 12000 * MS);
    CHECK(pages >= 1099 && pages <= 1102);
    /* After a pause nothing is made up for. */
    dirty_ring_restart(&ring, NOW + 20000 * MS);
    pages = pages_in(&ring, NOW + 20000 * MS, NOW + 21000 * MS);
    CHECK(pages >= 999 && pages <= 1001);
    atomic_store(&ring.limit_bytes_per_s, 0);
    CHECK(dirty_ring_due(&ring, NOW + 21000 * MS) == 0);
    atomic_store(&ring.limit_bytes_per_s, 1);
    CHECK(dirty_ring_due(&ring, NOW + 22000 * MS) == 0);
    dirty_ring_tick(&ring, NOW + 22000 * MS);
    dirty_ring_note(&ring, 5);
    CHECK(dirty_ring_due(&ring, NOW + 22001 * MS) == NOW + 22000 * MS + 4096000 * MS);
    dirty_ring_free(&ring);
}

int main(void)
{
    a_page_counts_once_in_a_period();
    a_limit_holds_from_when_it_is_set();
    puts("dirty_ring: all right");
    return 0;
}
