/* trip.c - one trip to another thread and back, without Python: what of an empty job is the core, what the kernel?
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -Werror -I CORE -o trip trip.c CORE/apm_*.c -pthread
 *   ./trip OPERATION
 *
 * OPERATION  pool      an empty job through the core: apm_pool_submit, epoll_wait, read, apm_channel_take
 *            handoff   the least that such a trip can be: a condition variable wakes a thread, which writes an eventfd;
 *                      epoll_wait, read
 *            eventfd   the same without another thread: write, epoll_wait, read
 *
 * Reads "COUNT PAUSE_NS" lines, and answers each with one line of JSON: {"ns": [...]}. PAUSE_NS: slept before each, because
 * processors that were idle are slower to wake, as they are beside a disk. */
#define _GNU_SOURCE
#include "apm.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static struct apm_channel *channel;
static int event_fd, epoll_fd, asked;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;

static void fail(const char *what) {
    fprintf(stderr, "trip: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void signal_event(void) {
    uint64_t one = 1;
    if (write(event_fd, &one, sizeof one) != sizeof one)
        fail("write");
}

static void wait_event(void) {
    struct epoll_event event;
    uint64_t value;
    if (epoll_wait(epoll_fd, &event, 1, -1) != 1 || read(event_fd, &value, sizeof value) != sizeof value)
        fail("waiting");
}

static void *answering(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!asked)
            pthread_cond_wait(&turn, &lock);
        asked = 0;
        pthread_mutex_unlock(&lock);
        signal_event();
        pthread_mutex_lock(&lock);
    }
    return NULL;
}

static void one_pool(void) {
    struct apm_job job = {.kind = APM_JOB_NOOP};
    struct apm_result result;
    if (apm_pool_submit(channel, &job, 1) != 1)
        fail("apm_pool_submit");
    wait_event();
    if (apm_channel_take(channel, &result, 1) != 1 || result.code != 0)
        fail("apm_channel_take");
}

static void one_handoff(void) {
    pthread_mutex_lock(&lock);
    asked = 1;
    pthread_cond_signal(&turn);
    pthread_mutex_unlock(&lock);
    wait_event();
}

static void one_eventfd(void) {
    signal_event();
    wait_event();
}

int main(int argc, char **argv) {
    void (*run)(void) = NULL;
    pthread_t thread;
    if (argc == 2 && strcmp(argv[1], "pool") == 0) {
        if (apm_channel_new(16, &channel) < 0)
            fail("apm_channel_new");
        event_fd = apm_channel_fd(channel);
        run = one_pool;
    } else if (argc == 2 && strcmp(argv[1], "handoff") == 0) {
        if (pthread_create(&thread, NULL, answering, NULL))
            fail("pthread_create");
        run = one_handoff;
    } else if (argc == 2 && strcmp(argv[1], "eventfd") == 0) {
        run = one_eventfd;
    } else {
        fprintf(stderr, "usage: trip pool|handoff|eventfd\n");
        return 2;
    }
    if (!channel)
        event_fd = eventfd(0, EFD_CLOEXEC);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN};
    if (event_fd < 0 || epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, event_fd, &wanted) < 0)
        fail("epoll");

    char line[128];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long count, pause_ns;
        if (sscanf(line, "%llu %llu", &count, &pause_ns) != 2 || count == 0)
            return fprintf(stderr, "trip: not understood: %s", line), 2;
        struct timespec pause = {(time_t)(pause_ns / 1000000000u), (long)(pause_ns % 1000000000u)};
        printf("{\"ns\": [");
        for (unsigned long long i = 0; i < count; i++) {
            if (pause_ns)
                nanosleep(&pause, NULL);
            uint64_t began = now_ns();
            run();
            uint64_t took = now_ns() - began;
            printf("%s%llu", i ? "," : "", (unsigned long long)took);
        }
        printf("]}\n");
        fflush(stdout);
    }
    return 0;
}
