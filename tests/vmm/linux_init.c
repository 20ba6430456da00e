/* The only program of a Linux guest: in rounds it looks at all its memory and writes it anew.
 *
 * Two threads share the memory. Beside it there is what keeps the kernel's own memory moving: a
 * file, pages that come and go, and a child in each round.
 *
 * It says on the first serial port what `machines.py` reads: R and the round that has ended, C and
 * the clock in ms, W and what was wrong: a page's number, or one of `other`. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 2, PAGE = 4096, WORDS = PAGE / 8, FRESH = 512, FILE_PAGES = 256 };
enum other { IN_FILE = 0x10000000, NOT_ZERO = 0x20000000, CHILD = 0x30000000, NO_MEMORY = 0x40000000 };

static uint64_t (*memory)[WORDS];
static uint64_t pages; /* of `memory` */
static pthread_barrier_t begin, end;
static int port;

static void say(char what, uint32_t number)
{
    char line[11];

    snprintf(line, sizeof line, "%c%08x\n", what, number);
    if (write(port, line, 10) != 10)
        abort();
}

/* What a word of a page is after a round: every fourth page looks random, every eighth is empty now
 * and then, of the others a round changes only an eighth. */
static uint64_t word(uint64_t page, uint64_t round, uint64_t i)
{
    uint64_t mixed;

    if (round == 0 || (page % 8 == 1 && round % 4 == 2))
        return 0;
    if (page % 4 == 0) {
        mixed = (page << 42 ^ round << 16 ^ i) * 0x9e3779b97f4a7c15;
        return mixed ^ mixed >> 29;
    }
    return page << 40 | i << 28 | (round + 8 - (round - i) % 8);
}

static void check(const uint64_t *words, uint64_t page, uint64_t round, uint32_t where)
{
    for (uint64_t i = 0; i < WORDS; i++)
        if (words[i] != word(page, round, i)) {
            say('W', where | (uint32_t)page);
            return;
        }
}

static void fill(uint64_t *words, uint64_t page, uint64_t round)
{
    for (uint64_t i = 0; i < WORDS; i++)
        words[i] = word(page, round, i);
}

static void *sweep(void *first)
{
    for (uint64_t round = 1;; round++) {
        pthread_barrier_wait(&begin);
        for (uint64_t page = (uintptr_t)first; page < pages; page += THREADS) {
            check(memory[page], page, round - 1, 0);
            fill(memory[page], page, round);
        }
        pthread_barrier_wait(&end);
    }
    return NULL;
}

/* The page cache: what was written in the round before is still there. */
static void use_a_file(uint64_t round)
{
    uint64_t words[WORDS];
    int file = open("/file", O_RDWR | O_CREAT, 0600);

    for (uint64_t page = 0; page < FILE_PAGES; page++) {
        off_t place = (off_t)(page * PAGE);

        if (round > 1 && pread(file, words, PAGE, place) == PAGE)
            check(words, page, round - 1, IN_FILE);
        fill(words, page, round);
        if (pwrite(file, words, PAGE, place) != PAGE)
            say('W', IN_FILE | NO_MEMORY);
    }
    close(file);
}

/* Pages that the kernel gives are empty. A child has them, and all others, from its parent. */
static void use_fresh_pages(uint64_t round)
{
    int status = 1;
    uint64_t(*fresh)[WORDS] = mmap(NULL, FRESH * PAGE, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pid_t child;

    if (fresh == MAP_FAILED) {
        say('W', NO_MEMORY);
        return;
    }
    for (uint64_t page = 0; page < FRESH; page++) {
        check(fresh[page], page, 0, NOT_ZERO);
        fill(fresh[page], page, round);
    }
    child = fork();
    if (child == 0) {
        for (uint64_t page = 0; page < FRESH; page++) {
            check(fresh[page], page, round, CHILD);
            fill(fresh[page], page, round + 1);
        }
        _exit(0);
    }
    if (waitpid(child, &status, 0) != child || status != 0)
        say('W', CHILD | NO_MEMORY);
    for (uint64_t page = 0; page < FRESH; page++)
        check(fresh[page], page, round, CHILD);
    munmap(fresh, FRESH * PAGE);
}

static void open_port(void)
{
    struct termios plain;

    port = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (port < 0 || tcgetattr(port, &plain) < 0)
        abort();
    cfmakeraw(&plain);
    if (tcsetattr(port, TCSANOW, &plain) < 0)
        abort();
}

int main(void)
{
    const char *mib = getenv("MIB");
    pthread_t thread;

    open_port();
    pages = (mib ? strtoul(mib, NULL, 10) : 32) * 256;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        abort();
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (uintptr_t first = 0; first < THREADS; first++)
        if (pthread_create(&thread, NULL, sweep, (void *)first))
            abort();
    for (uint64_t round = 1;; round++) {
        struct timespec now;

        pthread_barrier_wait(&begin);
        use_a_file(round);
        use_fresh_pages(round);
        pthread_barrier_wait(&end);
        clock_gettime(CLOCK_MONOTONIC, &now);
        say('R', (uint32_t)round);
        say('C', (uint32_t)(now.tv_sec * 1000 + now.tv_nsec / 1000000));
    }
}
