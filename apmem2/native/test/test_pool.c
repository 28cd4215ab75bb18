/* test_pool.c - jobs, rounds, drains, pins and the end of the pool, without Python. Runs plain and under sanitizers. */
#include "apm_internal.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static char directory[] = "/var/tmp/apm-test-XXXXXX"; /* a disk: /tmp may be tmpfs */
static int codes[1 << 16];                            /* by tag: what came back, 1 = nothing yet */
static int came_last[1 << 16], came;

static struct apm_channel *new_channel(uint32_t capacity) {
    struct apm_channel *channel = NULL;
    CHECK(apm_channel_new(capacity, &channel) == 0);
    return channel;
}

/* Waits for the eventfd and takes, until count more have come. */
static void take(struct apm_channel *channel, int count) {
    struct apm_result results[64];
    while (count > 0) {
        struct pollfd waiting = {.fd = apm_channel_fd(channel), .events = POLLIN};
        uint64_t ignored;
        CHECK(poll(&waiting, 1, 30000) == 1);
        CHECK(read(waiting.fd, &ignored, sizeof ignored) == sizeof ignored);
        for (int n; (n = apm_channel_take(channel, results, 64)) > 0;)
            for (int i = 0; i < n; i++, count--) {
                codes[results[i].tag] = results[i].code;
                came_last[results[i].tag] = ++came;
            }
    }
    CHECK(count == 0);
}

static int run(struct apm_channel *channel, struct apm_job job) {
    codes[job.tag] = 1;
    int accepted = apm_pool_submit(channel, &job, 1);
    if (accepted != 1)
        return accepted;
    take(channel, 1);
    return codes[job.tag];
}

static struct apm_map *open_map(struct apm_channel *channel, const char *name, uint64_t size) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    struct apm_open_request open_it = {.path = path, .fd = -1, .flags = APM_OPEN_CREATE, .mode = 0600, .size = size};
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_OPEN, .data = (uintptr_t)&open_it}) == 0);
    struct apm_map_request map_it = {.file = open_it.file, .length = size, .sharing = APM_SHARED,
                                     .protection = APM_PROT_READ | APM_PROT_WRITE,
                                     .required_granularity = APM_PAGE};
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_MAP, .data = (uintptr_t)&map_it}) == 0);
    apm_file_release(open_it.file);
    return map_it.map;
}

static void close_map(struct apm_channel *channel, struct apm_map *map) {
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .flags = APM_DRAIN_ALL, .map = map}) == 0);
    apm_map_disown(map);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .flags = APM_DRAIN_ALL, .map = map}) == 0);
    apm_map_release(map);
}

static int descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void wait_held(uint32_t count) {
    while (apm_observe_held() < count)
        sched_yield();
}

static void test_round_trips(void) {
    struct apm_channel *channel = new_channel(1000);
    static struct apm_job jobs[1000];
    for (int i = 0; i < 1000; i++) {
        jobs[i] = (struct apm_job){.kind = APM_JOB_NOOP, .tag = (uint64_t)i};
        codes[i] = 1;
    }
    CHECK(apm_pool_submit(channel, jobs, 1000) == 1000);
    take(channel, 1000);
    for (int i = 0; i < 1000; i++)
        CHECK(codes[i] == 0);
    /* A tag out of range or in use is refused, alone. */
    struct apm_job bad = {.kind = APM_JOB_NOOP, .tag = 1000};
    CHECK(apm_pool_submit(channel, &bad, 1) == -EINVAL);
    struct apm_job twice[2] = {{.kind = APM_JOB_NOOP, .tag = 5}, {.kind = APM_JOB_NOOP, .tag = 5}};
    CHECK(apm_pool_submit(channel, twice, 2) == 1);
    take(channel, 1);
    CHECK(apm_channel_free(channel) == 0);
}

static void test_bytes_arrive(void) {
    struct apm_channel *channel = new_channel(16);
    int before = descriptors();
    struct apm_map *map = open_map(channel, "bytes", 100000);
    char *memory = (char *)(uintptr_t)map->address;
    char source[300];
    memset(source, 'x', sizeof source);
    CHECK(map->granularity == APM_PAGE);
    memcpy(memory + 99995, "tail", 4);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_PERSIST, .map = map, .offset = 99995, .size = 5}) == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_COPY, .map = map, .offset = 10, .size = 300,
                                        .flags = APM_F_SOURCE_OWNED, .data = (uintptr_t)source}) == 0);
    CHECK(memcmp(memory + 10, source, 300) == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_FILL, .map = map, .offset = 5000, .size = 70000, .data = 7}) == 0);
    CHECK(memory[4999] == 0 && memory[5000] == 7 && memory[74999] == 7 && memory[75000] == 0);
    /* Overlapping, through the mapping itself, both ways; the source is not ours alone. */
    for (int i = 0; i < 90000; i++)
        memory[i] = (char)(i * 31 >> 3);
    char *copy = malloc(100000);
    memcpy(copy, memory, 100000);
    memmove(copy + 1000, copy, 60000);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_COPY, .map = map, .offset = 1000, .size = 60000,
                                        .data = (uintptr_t)memory}) == 0);
    CHECK(memcmp(memory, copy, 100000) == 0);
    memmove(copy + 3, copy + 4000, 60000);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_COPY, .map = map, .offset = 3, .size = 60000,
                                        .data = (uintptr_t)(memory + 4000)}) == 0);
    CHECK(memcmp(memory, copy, 100000) == 0);
    free(copy);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_PERSIST, .map = map, .offset = 99999, .size = 2}) ==
          APM_E_LENGTH_OUT_OF_RANGE);
    close_map(channel, map);
    CHECK(descriptors() == before);
    CHECK(apm_channel_free(channel) == 0);
}

/* Law 2: what is submitted while a round runs is in the next one; law 8: another file goes on meanwhile. */
static void test_rounds_and_lanes(void) {
    struct apm_channel *channel = new_channel(64);
    struct apm_map *one = open_map(channel, "one", 65536), *other = open_map(channel, "other", 65536);
    struct apm_statistics before, after;
    apm_pool_statistics(&before);
    apm_observe_hold(APM_CALL_MSYNC, one->file->inode, 1);
    struct apm_job first = {.kind = APM_JOB_PERSIST, .tag = 1, .map = one, .size = 1};
    codes[1] = codes[2] = codes[3] = 1;
    CHECK(apm_pool_submit(channel, &first, 1) == 1);
    wait_held(1);
    struct apm_job next[2] = {{.kind = APM_JOB_PERSIST, .tag = 2, .map = one, .size = 1},
                              {.kind = APM_JOB_PERSIST, .tag = 3, .map = one, .offset = 4096, .size = 1}};
    CHECK(apm_pool_submit(channel, next, 2) == 2);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_PERSIST, .tag = 9, .map = other, .size = 1}) == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_NOOP, .tag = 10}) == 0);
    CHECK(codes[1] == 1 && codes[2] == 1 && codes[3] == 1);
    apm_observe_hold(0, 0, 0);
    take(channel, 3);
    CHECK(codes[1] == 0 && codes[2] == 0 && codes[3] == 0);
    CHECK(came_last[1] < came_last[2]);
    apm_pool_statistics(&after);
    CHECK(after.rounds - before.rounds == 3);     /* one | two and three | the other file */
    CHECK(after.sync_calls - before.sync_calls == 3); /* two adjacent pages are one msync */
    close_map(channel, one);
    close_map(channel, other);
    CHECK(apm_channel_free(channel) == 0);
}

static void test_withdrawal(void) {
    struct apm_channel *channel = new_channel(16);
    struct apm_map *map = open_map(channel, "withdrawal", 65536);
    apm_observe_hold(APM_CALL_MSYNC, 0, 1);
    struct apm_job running = {.kind = APM_JOB_PERSIST, .tag = 1, .map = map, .size = 1};
    struct apm_job waiting = {.kind = APM_JOB_PERSIST, .tag = 2, .map = map, .offset = 8192, .size = 1};
    CHECK(apm_pool_submit(channel, &running, 1) == 1);
    wait_held(1);
    CHECK(apm_pool_submit(channel, &waiting, 1) == 1);
    CHECK(apm_pool_withdraw(channel, 1) == 0);
    CHECK(apm_pool_withdraw(channel, 2) == 1);
    take(channel, 1);
    CHECK(codes[2] == APM_E_WITHDRAWN);
    apm_observe_hold(0, 0, 0);
    take(channel, 1);
    CHECK(codes[1] == 0);
    CHECK(apm_pool_withdraw(channel, 1) == 0);
    close_map(channel, map);
    CHECK(apm_channel_free(channel) == 0);
}

static void test_drain_waits_and_tells(void) {
    struct apm_channel *channel = new_channel(16);
    struct apm_map *map = open_map(channel, "drain", 65536);
    CHECK(apm_map_idle(map) == 1);
    apm_observe_hold(APM_CALL_MSYNC, 0, 1);
    struct apm_job flush = {.kind = APM_JOB_PERSIST, .flags = APM_PERSIST_UNAWAITED, .tag = 1, .map = map, .size = 1};
    struct apm_job drain = {.kind = APM_JOB_DRAIN, .tag = 2, .map = map};
    CHECK(apm_pool_submit(channel, &flush, 1) == 1);
    CHECK(apm_pool_submit(channel, &drain, 1) == 1);
    CHECK(apm_map_idle(map) == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_NOOP, .tag = 3}) == 0);
    codes[2] = 1;
    wait_held(1);
    CHECK(codes[2] == 1);
    CHECK(apm_fault_set(APM_CALL_MSYNC, 1, 1, EIO, 0) == 0);
    apm_observe_hold(0, 0, 0);
    take(channel, 2);
    CHECK(codes[1] == -EIO && codes[2] == -EIO && came_last[1] < came_last[2]);
    CHECK(map->file->failed == -EIO);
    apm_fault_clear();
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_PERSIST, .map = map, .size = 1}) == APM_E_FILE_FAILED);
    /* Nobody waited for this flush: every later drain tells, for its bytes are not durable. */
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_PERSIST, .flags = APM_PERSIST_UNAWAITED, .map = map, .size = 1}) ==
          APM_E_FILE_FAILED);
    CHECK(apm_map_idle(map) == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .map = map}) == APM_E_FILE_FAILED);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .map = map}) == APM_E_FILE_FAILED);
    CHECK(apm_map_failed(map) == -EIO);
    apm_map_disown(map);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .flags = APM_DRAIN_ALL, .map = map}) == 0);
    CHECK(apm_map_failed(map) == -EIO);
    apm_map_release(map);
    CHECK(apm_channel_free(channel) == 0);
}

/* Law 5: the memory stays until the last job that uses it has ended. */
static void test_memory_outlives_its_jobs(void) {
    struct apm_channel *channel = new_channel(16);
    struct apm_map *map = open_map(channel, "pins", 65536);
    char *memory = (char *)(uintptr_t)map->address;
    apm_observe_hold(APM_CALL_MSYNC, 0, 1);
    struct apm_job running = {.kind = APM_JOB_PERSIST, .tag = 1, .map = map, .size = 65536};
    CHECK(apm_pool_submit(channel, &running, 1) == 1);
    wait_held(1);
    apm_map_disown(map);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_NOOP, .tag = 2}) == 0);
    CHECK(memory[100] == 0); /* a sanitizer or the kernel would say if it were gone */
    struct apm_job drain = {.kind = APM_JOB_DRAIN, .flags = APM_DRAIN_ALL, .tag = 3, .map = map};
    CHECK(apm_pool_submit(channel, &drain, 1) == 1);
    apm_observe_hold(0, 0, 0);
    take(channel, 2);
    CHECK(codes[1] == 0 && codes[3] == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_DRAIN, .flags = APM_DRAIN_ALL, .tag = 4, .map = map}) == 0);
    unsigned char vector[16];
    CHECK(mincore(memory, 65536, vector) == -1 && errno == ENOMEM);
    apm_map_release(map);
    CHECK(apm_channel_free(channel) == 0);
}

/* Many threads with a channel each on the same two files: for the race detector above all. */
static struct apm_map *shared_maps[2];

static void *busy(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    struct apm_channel *channel = new_channel(64);
    char source[64];
    memset(source, (int)seed, sizeof source);
    for (int turn = 0; turn < 60; turn++) {
        struct apm_job jobs[16];
        struct apm_result results[16];
        for (uint64_t i = 0; i < 16; i++) {
            struct apm_map *map = shared_maps[rand_r(&seed) % 2];
            uint64_t offset = (uint64_t)(rand_r(&seed) % 1000) * 64;
            static const uint32_t kinds[] = {APM_JOB_PERSIST, APM_JOB_COPY, APM_JOB_FILL, APM_JOB_DRAIN, APM_JOB_NOOP};
            uint32_t kind = kinds[rand_r(&seed) % 5], flags = 0;
            if (kind == APM_JOB_COPY || kind == APM_JOB_FILL)
                flags = APM_F_SOURCE_OWNED | (rand_r(&seed) % 2 ? APM_F_NOFLUSH : 0u);
            jobs[i] = (struct apm_job){.kind = kind, .flags = flags, .tag = i,
                                       .map = kind == APM_JOB_NOOP ? NULL : map, .offset = offset, .size = 64,
                                       .data = kind == APM_JOB_COPY ? (uintptr_t)source : 3};
        }
        int left = apm_pool_submit(channel, jobs, 16);
        if (left != 16)
            return "submit";
        if (turn % 3 == 0)
            (void)apm_pool_withdraw(channel, (uint32_t)(turn % 16));
        while (left > 0) {
            struct pollfd waiting = {.fd = apm_channel_fd(channel), .events = POLLIN};
            uint64_t ignored;
            if (poll(&waiting, 1, 30000) != 1 || read(waiting.fd, &ignored, sizeof ignored) < 0)
                return "wait";
            for (int n; (n = apm_channel_take(channel, results, 16)) > 0; left -= n)
                for (int i = 0; i < n; i++)
                    if (results[i].code != 0 && results[i].code != APM_E_WITHDRAWN)
                        return "code";
        }
    }
    return apm_channel_free(channel) == 0 ? NULL : "free";
}

static void test_many_channels(void) {
    struct apm_channel *channel = new_channel(16);
    pthread_t threads[6];
    shared_maps[0] = open_map(channel, "shared", 65536);
    shared_maps[1] = open_map(channel, "shared2", 65536);
    for (uintptr_t i = 0; i < 6; i++)
        CHECK(pthread_create(&threads[i], NULL, busy, (void *)(i + 1)) == 0);
    for (int i = 0; i < 6; i++) {
        void *complaint;
        CHECK(pthread_join(threads[i], &complaint) == 0);
        if (complaint)
            fprintf(stderr, "a thread could not %s\n", (const char *)complaint);
        CHECK(complaint == NULL);
    }
    struct apm_statistics now;
    apm_pool_statistics(&now);
    CHECK(now.in_flight == 0 && now.submitted == now.completed);
    close_map(channel, shared_maps[0]);
    close_map(channel, shared_maps[1]);
    CHECK(apm_channel_free(channel) == 0);
}

static void *adopt_loop(void *argument) {
    struct apm_channel *channel = new_channel(4);
    char path[128];
    snprintf(path, sizeof path, "%s/adopted", directory);
    for (int turn = 0; turn < 20; turn++) {
        int fd = open(path, O_RDWR);
        void *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        struct apm_adopt_request request = {.address = (uintptr_t)memory + 10, .length = 5000, .claimed = -1};
        struct apm_job job = {.kind = APM_JOB_ADOPT, .data = (uintptr_t)&request};
        struct apm_result result;
        uint64_t ignored;
        for (int step = 0; step < 2; step++) {
            if (apm_pool_submit(channel, &job, 1) != 1)
                return "submit";
            struct pollfd waiting = {.fd = apm_channel_fd(channel), .events = POLLIN};
            if (poll(&waiting, 1, 30000) != 1 || read(waiting.fd, &ignored, sizeof ignored) < 0 ||
                apm_channel_take(channel, &result, 1) != 1 || result.code != 0)
                return "adopt or persist";
            job = (struct apm_job){.kind = APM_JOB_PERSIST, .map = request.map, .size = 5000};
        }
        apm_map_disown(request.map);
        apm_map_release(request.map);
        munmap(memory, 8192);
        close(fd);
    }
    (void)argument;
    return apm_channel_free(channel) == 0 ? NULL : "free";
}

/* The table of files under contention: found, dropped and found again by many threads. */
static void test_files_come_and_go(void) {
    char path[128];
    snprintf(path, sizeof path, "%s/adopted", directory);
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, 8192) == 0 && close(fd) == 0);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, adopt_loop, NULL) == 0);
    for (int i = 0; i < 4; i++) {
        void *complaint;
        CHECK(pthread_join(threads[i], &complaint) == 0);
        CHECK(complaint == NULL);
    }
}

static void test_a_child_is_told(void) {
    struct apm_channel *channel = new_channel(4);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_NOOP}) == 0);
    pid_t child = fork();
    if (child == 0) {
        struct apm_job job = {.kind = APM_JOB_NOOP};
        _exit(apm_pool_submit(channel, &job, 1) == APM_E_FORKED && apm_is_forked() ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(run(channel, (struct apm_job){.kind = APM_JOB_NOOP}) == 0);
    CHECK(apm_channel_free(channel) == 0);
}

/* The last test: afterwards nothing is accepted any more. */
static void test_the_end(void) {
    struct apm_channel *channel = new_channel(16);
    static struct apm_map *map; /* never given back: nothing is unmapped any more */
    map = open_map(channel, "end", 65536);
    apm_observe_hold(APM_CALL_MSYNC, 0, 1);
    struct apm_job running = {.kind = APM_JOB_PERSIST, .tag = 1, .map = map, .size = 1};
    struct apm_job waiting = {.kind = APM_JOB_PERSIST, .tag = 2, .map = map, .size = 1};
    CHECK(apm_pool_submit(channel, &running, 1) == 1);
    wait_held(1);
    CHECK(apm_pool_submit(channel, &waiting, 1) == 1);
    CHECK(apm_pool_stop(10) == 1); /* the one at the gate */
    CHECK(apm_pool_submit(channel, &(struct apm_job){.kind = APM_JOB_NOOP, .tag = 3}, 1) == APM_E_STOPPED);
    apm_observe_hold(0, 0, 0);
    CHECK(apm_pool_stop(30000) == 0);
    take(channel, 2);
    CHECK(codes[1] == 0 && codes[2] == APM_E_STOPPED); /* it waited behind the running round */
    CHECK(apm_channel_free(channel) == 0);
}

int main(void) {
    CHECK(mkdtemp(directory) != NULL);
    CHECK(apm_pool_configure(5) == -EINVAL && apm_pool_configure(8) == 0 && apm_pool_configure(8) == -EALREADY);
    test_round_trips();
    test_bytes_arrive();
    test_rounds_and_lanes();
    test_withdrawal();
    test_drain_waits_and_tells();
    test_memory_outlives_its_jobs();
    test_many_channels();
    test_files_come_and_go();
    test_a_child_is_told();
    test_the_end();
    char command[160];
    snprintf(command, sizeof command, "rm -r %s", directory);
    CHECK(system(command) == 0);
    printf("test_pool: %ld checks\n", checks);
    return 0;
}
