/* PID 1 of a Linux guest: a memory workload that checks every word that it reads, and says so.
 *
 * Two processes fill memory of their own and a file in the page cache with words that follow from
 * their place and the round in which they were written last: in every round, in every second one,
 * in one of eight, or never again. In each round all of it is looked at before its part is written
 * anew, and a child that was forked looks at what it has inherited, overwrites it for itself and
 * fills fresh memory, which must be zero.
 *
 * After each round "R" and its number (8 hexadecimal digits) go to the first serial port, and for
 * the first wrong word "W" and its address, which is in the same place in each process. The port is
 * polled: a console that is driven by interrupts stalls where the machine is busy. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    PORT = 0x3f8,
    LINE_STATUS = PORT + 5,
    CAN_TAKE = 0x20,
    WORKERS = 2,
    PAGE_WORDS = 512,
    PAGE_BYTES = PAGE_WORDS * 8,
    ARENA_PAGES = 40 * 256,
    FILE_PAGES = 8 * 256,
    FRESH_PAGES = 256,
    CHILD_STEP = 16, /* of so many pages a child looks at one */
};
#define ARENA_AT 0x40000000UL
#define FILE_AT 0x50000000UL /* what a word of the file is called; nothing is there */
#define FRESH_AT 0x60000000UL

/* What a worker says at the end of a round: a wrong word, or none. */
struct report {
    uint64_t at; /* 0: none */
    uint64_t wanted, found;
};

struct worker {
    int orders, reports; /* pipes */
};

static void say(const char *text)
{
    for (; *text; text++) {
        while (!(inb(LINE_STATUS) & CAN_TAKE))
            continue;
        outb((unsigned char)*text, PORT);
    }
}

/* Say this, and do nothing more: the guest's end would be QEMU's, and what it said may be read. */
static _Noreturn void give_up(uint64_t at, const char *why)
{
    char text[200];

    snprintf(text, sizeof text, "W%08x\n%s\n", (unsigned)at, why);
    say(text);
    for (;;)
        pause();
}

/* The round in which a page was written last, not after `round`. */
static uint64_t written(uint64_t page, uint64_t round)
{
    static const uint64_t every[4] = {1, 2, 8, 0};
    uint64_t step = every[page % 4], behind;

    if (step == 0)
        return 0;
    behind = (round + page / 4) % step;
    return behind > round ? 0 : round - behind;
}

static uint64_t mixed(uint64_t number)
{
    number = (number ^ number >> 31) * 0x9e3779b97f4a7c15U;
    return number ^ number >> 29;
}

/* A page as it is from the round `last` on: words that differ, one number throughout, or zeros with
 * one word that wanders and is at times not there. */
static void draw(uint64_t *words, uint64_t seed, uint64_t page, uint64_t last)
{
    uint64_t number = mixed(seed << 56 | page << 32 | last), i;

    switch (page / 4 % 3) {
    case 0:
        for (i = 0; i < PAGE_WORDS; i++)
            words[i] = mixed(number + i);
        break;
    case 1:
        for (i = 0; i < PAGE_WORDS; i++)
            words[i] = number;
        break;
    default:
        memset(words, 0, PAGE_BYTES);
        if (last % 4 != 3)
            words[last % PAGE_WORDS] = number;
    }
}

/* Compare a page with what it should be; the first word that is wrong goes into the report. */
static bool is_right(const uint64_t *found, const uint64_t *wanted, uint64_t at,
                     struct report *report)
{
    for (uint64_t i = 0; i < PAGE_WORDS; i++)
        if (found[i] != wanted[i]) {
            *report = (struct report){at + i * 8, wanted[i], found[i]};
            return false;
        }
    return true;
}

static uint64_t *map(uint64_t at, size_t pages)
{
    void *place = mmap((void *)at, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

    if (place == MAP_FAILED)
        _exit(2);
    return place;
}

/* Look at memory as it is after `round`, and write what the next one writes. */
static bool sweep(uint64_t seed, uint64_t round, struct report *report)
{
    static uint64_t page_wanted[PAGE_WORDS];
    uint64_t *words = (uint64_t *)ARENA_AT;

    for (uint64_t page = 0; page < ARENA_PAGES; page++, words += PAGE_WORDS) {
        draw(page_wanted, seed, page, written(page, round));
        if (!is_right(words, page_wanted, (uint64_t)words, report))
            return false;
        if (written(page, round + 1) == round + 1)
            draw(words, seed, page, round + 1);
    }
    return true;
}

/* The same for the file. */
static void sweep_file(int file, uint64_t seed, uint64_t round, struct report *report)
{
    static uint64_t wanted[PAGE_WORDS], found[PAGE_WORDS];

    for (uint64_t page = 0; page < FILE_PAGES; page++) {
        off_t place = (off_t)(page * PAGE_BYTES);

        if (pread(file, found, PAGE_BYTES, place) != PAGE_BYTES)
            _exit(3);
        draw(wanted, seed, page, written(page, round));
        if (!is_right(found, wanted, FILE_AT + (uint64_t)place, report))
            return;
        if (written(page, round + 1) != round + 1)
            continue;
        draw(wanted, seed, page, round + 1);
        if (pwrite(file, wanted, PAGE_BYTES, place) != PAGE_BYTES)
            _exit(3);
    }
}

/* What a child does with memory as it is after `round`: the parent must not see any of it. */
static bool live_as_child(uint64_t seed, uint64_t round, struct report *report)
{
    static uint64_t wanted[PAGE_WORDS];
    static const uint64_t zeros[PAGE_WORDS];
    uint64_t *fresh = map(FRESH_AT, FRESH_PAGES);

    for (uint64_t i = 0; i < FRESH_PAGES; i++, fresh += PAGE_WORDS) {
        if (!is_right(fresh, zeros, (uint64_t)fresh, report))
            return false;
        memset(fresh, 0xee, PAGE_BYTES);
    }
    for (uint64_t page = round % CHILD_STEP; page < ARENA_PAGES; page += CHILD_STEP) {
        uint64_t *words = (uint64_t *)ARENA_AT + page * PAGE_WORDS;

        draw(wanted, seed, page, written(page, round));
        if (!is_right(words, wanted, (uint64_t)words, report))
            return false;
        memset(words, 0xdd, PAGE_BYTES);
    }
    return true;
}

static void tell(int reports, const struct report *report)
{
    if (write(reports, report, sizeof *report) != sizeof *report)
        _exit(4);
}

/* How a child ended that looked at everything: 0, or as a shell says it. */
static int run_child(uint64_t seed, uint64_t round, int reports)
{
    struct report report = {0};
    int status;
    pid_t child = fork();

    if (child == 0) {
        if (live_as_child(seed, round, &report))
            _exit(0);
        tell(reports, &report);
        _exit(1);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        return 6;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* One round for each byte of orders. */
static _Noreturn void work(uint64_t seed, int file, int orders, int reports)
{
    struct report report = {0};
    uint64_t *words = map(ARENA_AT, ARENA_PAGES);
    char order;

    for (uint64_t page = 0; page < ARENA_PAGES; page++)
        draw(words + page * PAGE_WORDS, seed, page, 0);
    for (uint64_t page = 0; page < FILE_PAGES; page++) {
        static uint64_t first[PAGE_WORDS];

        draw(first, seed + WORKERS, page, 0);
        if (write(file, first, PAGE_BYTES) != PAGE_BYTES)
            _exit(3);
    }
    for (uint64_t round = 0; read(orders, &order, 1) == 1; round++) {
        int ended = run_child(seed, round, reports);

        if (ended != 0)
            _exit(ended);
        if (sweep(seed, round, &report))
            sweep_file(file, seed + WORKERS, round, &report);
        tell(reports, &report);
    }
    _exit(5);
}

static struct worker start(uint64_t seed)
{
    struct worker worker;
    int orders[2], reports[2], file;
    char name[] = "/0";

    name[1] = (char)('0' + seed);
    file = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0 || pipe(orders) < 0 || pipe(reports) < 0)
        give_up(0, "no file or pipe");
    switch (fork()) {
    case -1:
        give_up(0, "no process");
    case 0:
        close(orders[1]);
        close(reports[0]);
        work(seed, file, orders[0], reports[1]);
    default:
        close(file);
        close(orders[0]);
        close(reports[1]);
    }
    worker.orders = orders[1];
    worker.reports = reports[0];
    return worker;
}

static void await(const struct worker *worker)
{
    struct report report;
    char why[120];
    int status;

    if (read(worker->reports, &report, sizeof report) != sizeof report) {
        wait(&status);
        snprintf(why, sizeof why, "a process has ended, wait status %#x", (unsigned)status);
        give_up(0, why);
    }
    if (report.at == 0)
        return;
    snprintf(why, sizeof why, "is %016lx instead of %016lx", report.found, report.wanted);
    give_up(report.at, why);
}

int main(void)
{
    struct worker workers[WORKERS];
    char text[16];

    if (ioperm(PORT, 8, 1) < 0)
        return 1; /* the kernel says that PID 1 has ended */
    for (unsigned i = 0; i < WORKERS; i++)
        workers[i] = start(i + 1);
    for (unsigned round = 1;; round++) {
        for (unsigned i = 0; i < WORKERS; i++)
            if (write(workers[i].orders, "", 1) != 1)
                give_up(0, "a process takes no order");
        for (unsigned i = 0; i < WORKERS; i++)
            await(&workers[i]);
        snprintf(text, sizeof text, "R%08x\n", round);
        say(text);
    }
}
