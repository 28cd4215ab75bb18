/* apm_pool.c - who runs what blocks, in which order, and how does the loop learn of it?
 *
 * The only file with threads. Jobs arrive in arrays and wait in lanes: rounds (a queue per file, files taking turns),
 * plain copies and reading in (at most two at a time of one file), opening and mapping, and the pool's own errands. Each
 * lane leaves the others a thread, so syncs that hang starve no copy, and a file whose round hangs holds one thread and its
 * own waiters (law 8). Threads are started when there is work for them.
 *
 * Nothing is allocated between acceptance and completion: the records are slots of their channel (apm_channel.c). */
#include "apm_internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS_MIN = 6,
    THREADS_DEFAULT = 16,
    THREADS_MAX = 1024,
    WORKING_PER_FILE = 2,
    SHORT = 64 * 1024, /* bytes of a job that any round takes */
    WALK_MAX = 4 * APM_ROUND_JOBS_MAX, /* jobs looked at for one round */
};

_Static_assert(sizeof(struct apm_job) == 48, "packed as bytes by the caller");
_Static_assert(offsetof(struct apm_job, map) == 16 && offsetof(struct apm_job, data) == 40, "likewise");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* pool_lock: guards everything below */
static pthread_cond_t work_there, all_quiet;
static pthread_once_t started = PTHREAD_ONCE_INIT;
static uint32_t threads_max = THREADS_DEFAULT, threads, idle, rounds_running, work_running, controls_running, errands_running;
static bool configured, stopping;
static struct apm_record *work_first, *work_last;
static struct apm_work *errands_first, *errands_last;
static struct apm_file_full *ready_first, *ready_last;
static uint64_t sequence;
static struct apm_statistics numbers;
static uint64_t round_began[THREADS_MAX]; /* by thread; 0: in no round */
static int forked, alive;                 /* atomic: read before any lock */

uint64_t apm_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Law 7. The locks may be held by threads that do not exist in the child: nothing there takes one again. */
static void in_child(void) {
    if (__atomic_load_n(&alive, __ATOMIC_RELAXED))
        __atomic_store_n(&forked, 1, __ATOMIC_SEQ_CST);
}

static void start_once(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&work_there, NULL);
    pthread_cond_init(&all_quiet, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_atfork(NULL, NULL, in_child);
}

void apm_pool_begin(void) { pthread_once(&started, start_once); }

int apm_is_forked(void) { return __atomic_load_n(&forked, __ATOMIC_SEQ_CST); }

int apm_pool_configure(uint32_t max) {
    if (apm_is_forked())
        return APM_E_FORKED;
    if (max < THREADS_MIN || max > THREADS_MAX)
        return -EINVAL;
    pthread_mutex_lock(&lock);
    int result = configured || threads ? -EALREADY : 0;
    if (result == 0) {
        threads_max = max;
        configured = true;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static void unlock_and_call(void);

static uint32_t running(void) { return rounds_running + work_running + errands_running; } /* pool_lock held */

/* ---- what ends ---------------------------------------------------------------------------------------------- */

static void push_errand(struct apm_work *work) { /* pool_lock held */
    work->next = NULL;
    if (errands_last)
        errands_last->next = work;
    else
        errands_first = work;
    errands_last = work;
}

static void run_unmap(struct apm_work *work) {
    struct apm_map_full *map = (struct apm_map_full *)((char *)work - offsetof(struct apm_map_full, unmap_work));
    apm_map_unmap(map);
    apm_map_errand_done(map);
    apm_map_drop(map);
}

/* The last user of the memory may have gone: unmapping is the last act, and in the pool (law 5). pool_lock held. */
static void unmap_if_unused(struct apm_map_full *map) {
    if (map->pins || !map->disowned || map->unmapping)
        return;
    map->unmapping = true;
    map->unmap_sequence = ++sequence;
    map->failed = map->pub.file ? apm_file_failure(map->pub.file) : 0;
    map->unmap_work.run = run_unmap;
    push_errand(&map->unmap_work);
}

/* One job of the map has ended: drains that were accepted after it may be complete. They go to *done. pool_lock held. */
static void release_drains(struct apm_map_full *map, uint64_t ended, bool is_sync, int code, struct apm_record ***done) {
    for (struct apm_record **at = &map->drains; *at;) {
        struct apm_record *drain = *at;
        bool counts = drain->sequence > ended && (is_sync || (drain->job.flags & APM_DRAIN_ALL));
        if (counts) {
            if (is_sync && drain->code == 0)
                drain->code = code;
            drain->waits_for--;
        }
        if (counts && drain->waits_for == 0) {
            *at = drain->next;
            drain->next = NULL;
            **done = drain;
            *done = &drain->next;
        } else {
            at = &drain->next;
        }
    }
}

/* What a drain without an error of its own has to say: nothing of a failed file is durable. pool_lock held. */
static int drained(const struct apm_map_full *map, int code) {
    if (code == 0 && !map->unmapping && map->pub.file && apm_file_failure(map->pub.file))
        return APM_E_FILE_FAILED;
    return code;
}

/* Adds one record that has ended to the numbers of the pool and of its map. pool_lock held. */
static void count(const struct apm_record *record, struct apm_map_full *map, uint64_t took) {
    bool withdrawn = record->code == APM_E_WITHDRAWN, failed = record->code < 0 && !withdrawn;
    numbers.in_flight--;
    numbers.completed++;
    numbers.withdrawn += withdrawn;
    numbers.failed += failed;
    apm_latency_add(&numbers.latency, took);
    if (!map)
        return;
    map->numbers.completed++;
    map->numbers.withdrawn += withdrawn;
    map->numbers.failed += failed;
    apm_latency_add(&map->numbers.latency, took);
    if (record->code == 0 && record->job.kind == APM_JOB_PERSIST)
        map->numbers.bytes_persisted += record->job.size;
    else if (record->code == 0 && (record->job.kind == APM_JOB_COPY || record->job.kind == APM_JOB_FILL))
        map->numbers.bytes_copied += record->job.size;
}

/* Books a drain out. pool_lock held. */
static void settle_drain(struct apm_record *record, uint64_t now) {
    struct apm_map_full *map = (struct apm_map_full *)record->job.map;
    record->state = DONE;
    count(record, map, now - record->accepted_ns);
    map->pins--;
    if (!(record->job.flags & APM_DRAIN_ALL) && record->code != APM_E_WITHDRAWN)
        record->code = drained(map, record->code);
    map->told = map->told || (record->code < 0 && record->code != APM_E_WITHDRAWN);
    unmap_if_unused(map);
}

static void settle_drains(struct apm_record *drains, uint64_t now) { /* pool_lock held */
    for (struct apm_record *drain = drains; drain; drain = drain->next)
        settle_drain(drain, now);
}

/* Books a job out. Its map stays pinned until it is published. pool_lock held. */
static void settle(struct apm_record *record, uint64_t now, struct apm_record ***done) {
    struct apm_map_full *map = (struct apm_map_full *)record->job.map;
    record->state = DONE;
    count(record, map, now - record->accepted_ns);
    if (!map)
        return;
    map->running_all--;
    map->running_sync -= record->is_sync;
    map->publishing++;
    int code = record->code == APM_E_WITHDRAWN ? 0 : record->code;
    /* It stays: those bytes are not durable, so no later drain may say that all accepted before it are. */
    if (code < 0 && record->job.kind == APM_JOB_PERSIST && (record->job.flags & APM_PERSIST_UNAWAITED) && !map->flush_failed)
        map->flush_failed = code;
    release_drains(map, record->sequence, record->is_sync, code, done);
}

/* A job of the map that ended at a moment was published: drains accepted after that moment waited for nothing else of it.
 * pool_lock held. */
static void let_go(struct apm_map_full *map, uint64_t ended, struct apm_record ***done) {
    map->pins--;
    map->publishing--;
    for (struct apm_record **at = &map->drains; *at;) {
        struct apm_record *drain = *at;
        if (drain->sequence > ended && --drain->waits_for == 0) {
            *at = drain->next;
            drain->next = NULL;
            **done = drain;
            *done = &drain->next;
        } else {
            at = &drain->next;
        }
    }
    unmap_if_unused(map);
}

/* Books ended records out and tells their channels. Whoever is told afterwards that all has ended finds the completions of
 * it before: else what they hold would still be held. */
static void complete_some(struct apm_record *records) {
    struct apm_map_full *maps[APM_ROUND_JOBS_MAX];
    struct apm_record *drains = NULL, **drains_end = &drains, *later = NULL, **later_end = &later, **end = &records;
    uint32_t named = 0;
    uint64_t now = apm_now_ns();
    pthread_mutex_lock(&lock);
    for (struct apm_record *record = records; record; record = record->next) {
        if (record->job.kind == APM_JOB_DRAIN)
            settle_drain(record, now);
        else
            settle(record, now, &drains_end);
        if (record->job.map && record->job.kind != APM_JOB_DRAIN)
            maps[named++] = (struct apm_map_full *)record->job.map;
        end = &record->next;
    }
    settle_drains(drains, now);
    *end = drains;
    uint64_t ended = ++sequence;
    pthread_mutex_unlock(&lock);
    apm_channel_publish(records);
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < named; i++)
        let_go(maps[i], ended, &later_end);
    settle_drains(later, now);
    if (stopping && !running())
        pthread_cond_broadcast(&all_quiet);
    unlock_and_call();
    apm_channel_publish(later);
}

static void complete(struct apm_record *records) {
    while (records) {
        struct apm_record *last = records, *rest;
        for (uint32_t i = 1; i < APM_ROUND_JOBS_MAX && last->next; i++)
            last = last->next;
        rest = last->next;
        last->next = NULL;
        complete_some(records);
        records = rest;
    }
}

void apm_map_errand_done(struct apm_map_full *map) {
    struct apm_record *drains = NULL, **end = &drains;
    uint64_t now = apm_now_ns();
    pthread_mutex_lock(&lock);
    release_drains(map, map->unmap_sequence, false, 0, &end);
    map->unmap_sequence = 0;
    settle_drains(drains, now);
    pthread_mutex_unlock(&lock);
    apm_channel_publish(drains);
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

static void unlink_queued(struct apm_record *record);

static int run_copy(const struct apm_record *record) {
    const struct apm_job *job = &record->job;
    const void *source;
    void *copy;
    if (job->map->granularity == APM_PAGE)
        return apm_sync_write_plain(record);
    int result = apm_map_source(job, &source, &copy);
    if (result < 0)
        return result;
    result = apm_map_copy(job->map, job->offset, source, job->size, job->flags);
    free(copy);
    return result;
}

static int run_job(struct apm_record *record) {
    const struct apm_job *job = &record->job;
    switch (job->kind) {
    case APM_JOB_NOOP:
        return 0;
    case APM_JOB_PERSIST:
        return apm_map_persist(job->map, job->offset, job->size);
    case APM_JOB_COPY:
        return run_copy(record);
    case APM_JOB_FILL:
        if (job->map->granularity == APM_PAGE)
            return apm_sync_write_plain(record);
        return apm_map_fill(job->map, job->offset, (int)job->data, job->size, job->flags);
    case APM_JOB_POPULATE:
        return apm_populate_run(job->map, job->offset, job->size, job->flags);
    case APM_JOB_OPEN:
        return apm_file_open((struct apm_open_request *)(uintptr_t)job->data);
    case APM_JOB_MAP:
        return apm_map_run((struct apm_map_request *)(uintptr_t)job->data);
    case APM_JOB_ADOPT:
        return apm_adopt_run((struct apm_adopt_request *)(uintptr_t)job->data);
    case APM_JOB_CHECK:
        return apm_check_run(job->map, (struct apm_check_request *)(uintptr_t)job->data);
    case APM_JOB_OVERLAP:
        return apm_overlap_run(job->map, (struct apm_overlap_request *)(uintptr_t)job->data);
    case APM_JOB_SPLIT:
        return apm_split_run(job->map, job->offset, job->size, (struct apm_split_request *)(uintptr_t)job->data);
    case APM_JOB_MEASURE:
        return apm_measure_run(job->map, job->offset, job->size, (struct apm_measure_request *)(uintptr_t)job->data);
    default:
        return -EINVAL;
    }
}

/* Up to a round's worth of the file's waiting jobs; those that come from now on wait for the next one (law 2). A long job
 * beyond the round's bytes stays for a later round, while short ones behind it come along: they wait for one piece of other
 * people's work at most. Copies keep their order, which is that of the bytes of whoever wrote twice. */
static struct apm_record *take_round(struct apm_file_full *file) { /* pool_lock held */
    struct apm_record *jobs = NULL, **end = &jobs;
    uint32_t count = 0, seen = 0;
    uint64_t bytes = 0;
    bool copies_wait = false;
    numbers.rounds++;
    for (struct apm_record *record = file->first, *next; record && count < APM_ROUND_JOBS_MAX && seen < WALK_MAX; record = next) {
        struct apm_map_full *map = (struct apm_map_full *)record->job.map;
        bool copies = record->job.kind != APM_JOB_PERSIST;
        next = record->next;
        seen++;
        if ((copies && copies_wait) || (count && record->job.size > SHORT && bytes + record->job.size > APM_PIECE)) {
            copies_wait = copies_wait || copies;
            continue;
        }
        unlink_queued(record);
        *end = record;
        end = &record->next;
        record->state = RUNNING;
        record->began = true;
        map->numbers.round_jobs++;
        map->numbers.rounds += map->last_round != numbers.rounds;
        map->last_round = numbers.rounds;
        bytes += record->job.size;
        count++;
    }
    numbers.round_jobs += count;
    return jobs;
}

/* The pool is being stopped: what waits for the next round will not have one. */
static struct apm_record *take_all(struct apm_file_full *file) { /* pool_lock held */
    struct apm_record *jobs = file->first;
    for (struct apm_record *record = jobs; record; record = record->next) {
        record->state = RUNNING;
        record->code = APM_E_STOPPED;
    }
    file->first = file->last = NULL;
    return jobs;
}

static void push_ready(struct apm_file_full *file) { /* pool_lock held */
    file->ready = true;
    file->next_ready = NULL;
    if (ready_last)
        ready_last->next_ready = file;
    else
        ready_first = file;
    ready_last = file;
}

static void run_round(uint32_t self) { /* pool_lock held on entry and exit */
    struct apm_file_full *file = ready_first;
    ready_first = file->next_ready;
    if (!ready_first)
        ready_last = NULL;
    file->ready = false;
    file->running = true;
    struct apm_record *jobs = take_round(file);
    struct apm_round_counts counts = {0};
    round_began[self] = apm_now_ns();
    rounds_running++;
    unlock_and_call();
    apm_round_run(file, jobs, &counts);
    pthread_mutex_lock(&lock);
    rounds_running--;
    round_began[self] = 0;
    numbers.sync_calls += counts.sync_calls;
    numbers.bytes_persisted += counts.bytes_persisted;
    numbers.bytes_copied += counts.bytes_copied;
    file->running = false; /* the jobs still pin their maps, and those the file */
    struct apm_record *refused = stopping ? take_all(file) : NULL;
    if (file->first && !file->ready)
        push_ready(file);
    pthread_mutex_unlock(&lock);
    complete(jobs);
    complete(refused);
    pthread_mutex_lock(&lock);
}

/* Opening, mapping and the like, which name no file yet, against plain copies and reading in, which do. */
static bool is_file_work(const struct apm_record *record) {
    return record->job.map && record->job.map->file && record->job.kind != APM_JOB_CHECK &&
           record->job.kind != APM_JOB_OVERLAP;
}

/* May a lane that runs so many jobs run one more? One thread is always left to each other lane that runs nothing now, and one
 * to errands; so a lane's first job is never kept waiting by the others. */
static bool lane_open(uint32_t mine, uint32_t other, uint32_t third) {
    return mine + other + third + (other == 0) + (third == 0) + 1 < threads_max;
}

/* The first job of the work lane that may run: of one file no more than a few at a time, so that one that hangs does not
 * fill the lane. The walk is long only while files hang. pool_lock held. */
static struct apm_record *next_work(void) {
    uint32_t copies = work_running - controls_running;
    bool may_copy = lane_open(copies, controls_running, rounds_running);
    bool may_control = lane_open(controls_running, copies, rounds_running);
    if (!may_copy && !may_control)
        return NULL;
    for (struct apm_record *record = work_first; record; record = record->next) {
        const struct apm_file_full *file = is_file_work(record) ? (struct apm_file_full *)record->job.map->file : NULL;
        if (file ? may_copy && file->working < WORKING_PER_FILE : may_control)
            return record;
    }
    return NULL;
}

static bool may_work(void) { return next_work() != NULL; }
static bool may_round(void) {
    return ready_first && lane_open(rounds_running, controls_running, work_running - controls_running);
}
static bool may_run_errand(void) { return errands_first && !errands_running; }

static void run_work(struct apm_record *record) { /* pool_lock held on entry and exit */
    struct apm_file_full *file = is_file_work(record) ? (struct apm_file_full *)record->job.map->file : NULL;
    unlink_queued(record);
    record->state = RUNNING;
    record->began = true;
    work_running++;
    if (file)
        file->working++;
    else
        controls_running++;
    unlock_and_call();
    record->code = run_job(record);
    pthread_mutex_lock(&lock);
    work_running--;
    if (file)
        file->working--; /* the job still pins its map, and that the file */
    else
        controls_running--;
    if ((record->job.kind == APM_JOB_COPY || record->job.kind == APM_JOB_FILL) && record->code == 0)
        numbers.bytes_copied += record->job.size;
    pthread_mutex_unlock(&lock);
    complete(record);
    pthread_mutex_lock(&lock);
}

static void run_errand(void) { /* pool_lock held on entry and exit */
    struct apm_work *work = errands_first;
    errands_first = work->next;
    if (!errands_first)
        errands_last = NULL;
    errands_running++;
    unlock_and_call();
    work->run(work);
    pthread_mutex_lock(&lock);
    errands_running--;
    if (stopping && !running())
        pthread_cond_broadcast(&all_quiet);
}

static void *worker(void *argument) {
    uint32_t self = (uint32_t)(uintptr_t)argument;
    char name[16];
    snprintf(name, sizeof name, "apmem2-%u", self);
    pthread_setname_np(pthread_self(), name);
    pthread_mutex_lock(&lock);
    bool turn = false; /* the lanes take turns */
    while (!stopping) {
        struct apm_record *work;
        turn = !turn;
        if (may_round() && (turn || !may_work()))
            run_round(self);
        else if (may_run_errand())
            run_errand();
        else if ((work = next_work()) != NULL)
            run_work(work);
        else if (may_round())
            run_round(self);
        else {
            idle++;
            pthread_cond_wait(&work_there, &lock);
            idle--;
        }
    }
    threads--;
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Starts one thread; signals are for the program's own threads (law 16). pool_lock held. */
static int start_thread(void) {
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_t thread;
    int error;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    pthread_attr_setstacksize(&attributes, APM_THREAD_STACK);
#endif
    __atomic_store_n(&alive, 1, __ATOMIC_SEQ_CST); /* before there is a thread that a fork could leave behind */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int result;
    APM_OUTSIDE(result, APM_CALL_PTHREAD_CREATE, 0, 0, 0,
                (error = pthread_create(&thread, &attributes, worker, (void *)(uintptr_t)threads)) ? (errno = error, -1)
                                                                                                  : 0);
    error = result < 0 ? errno : 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error)
        return -error;
    threads++;
    return 0;
}

/* Unlocks, and calls one more thread for what can run now: an idle one, else a new one. Whoever takes work passes the call
 * on, so there are as many as find something to do, and work that hangs keeps none of the others from being called. The
 * call comes after the unlocking: a thread that wakes while the lock is held goes to sleep again (measured: it doubled the
 * time of a lone submission). pool_lock held on entry, not on exit. */
static void unlock_and_call(void) {
    bool call = false;
    if (!stopping && (may_round() || may_run_errand() || may_work())) {
        call = idle > 0;
        if (!call && threads < threads_max)
            (void)start_thread(); /* with others alive, being short of one is no failure */
    }
    pthread_mutex_unlock(&lock);
    if (call)
        pthread_cond_signal(&work_there);
}

void apm_pool_schedule(struct apm_work *work) {
    pthread_mutex_lock(&lock);
    push_errand(work);
    unlock_and_call();
}

void apm_map_disown(struct apm_map *pub) {
    if (!pub || apm_is_forked())
        return;
    struct apm_map_full *map = (struct apm_map_full *)pub;
    pthread_mutex_lock(&lock);
    map->disowned = true;
    unmap_if_unused(map);
    unlock_and_call();
}

/* The error of an earlier flush that a new drain has to tell: the error itself once, then that the file failed, or, where
 * it did not (the memory was unmapped), the same again, for no later drain may say that all is durable. A close tells only
 * what nobody was told. pool_lock held. */
static int undrained(const struct apm_map_full *map, bool closing) {
    if (!map->told)
        return map->flush_failed;
    return closing || drained(map, 0) < 0 ? 0 : map->flush_failed;
}

int apm_map_idle(struct apm_map *pub) {
    const struct apm_map_full *map = (const struct apm_map_full *)pub;
    if (apm_is_forked())
        return APM_E_FORKED;
    pthread_mutex_lock(&lock);
    bool quiet = map->running_sync == 0 && map->flush_failed == 0 && drained(map, 0) == 0;
    pthread_mutex_unlock(&lock);
    return quiet;
}

int apm_map_failed(struct apm_map *pub) {
    const struct apm_map_full *map = (const struct apm_map_full *)pub;
    if (apm_is_forked())
        return APM_E_FORKED;
    pthread_mutex_lock(&lock); /* while it is held the map does not let go of its file */
    int code = map->unmapping || !map->pub.file ? map->failed : apm_file_failure(map->pub.file);
    pthread_mutex_unlock(&lock);
    return code;
}

/* ---- what is accepted ---------------------------------------------------------------------------------------------- */

static bool joins_round(const struct apm_job *job) {
    if (!job->map || job->map->granularity != APM_PAGE || !job->map->file)
        return false;
    return job->kind == APM_JOB_PERSIST ||
           ((job->kind == APM_JOB_COPY || job->kind == APM_JOB_FILL) && !(job->flags & APM_F_NOFLUSH));
}

static int check(const struct apm_job *job) {
    bool ranged = job->kind == APM_JOB_PERSIST || job->kind == APM_JOB_COPY || job->kind == APM_JOB_FILL ||
                  job->kind == APM_JOB_POPULATE || job->kind == APM_JOB_SPLIT || job->kind == APM_JOB_MEASURE;
    bool of_map = ranged || job->kind == APM_JOB_DRAIN || job->kind == APM_JOB_CHECK || job->kind == APM_JOB_OVERLAP;
    if (job->kind > APM_JOB_OVERLAP || (of_map && !job->map))
        return -EINVAL;
    if (ranged && (job->offset > job->map->length || job->size > job->map->length - job->offset))
        return APM_E_LENGTH_OUT_OF_RANGE;
    return 0;
}

/* 1: accepted and complete already (linked to *done); 0: accepted; negative: refused. pool_lock held. */
static int accept_job(struct apm_channel *channel, const struct apm_job *job, uint64_t now, struct apm_record ***done) {
    struct apm_map_full *map = (struct apm_map_full *)job->map;
    int result = check(job);
    if (result < 0)
        return result;
    if (map && map->unmapping && job->kind != APM_JOB_DRAIN)
        return APM_E_CLOSED; /* it has let go of its memory and its file */
    struct apm_record *record = apm_channel_slot(channel, job->tag);
    if (!record)
        return job->tag < channel->capacity ? -ENOMEM : -EINVAL;
    if (record->state != FREE)
        return -EINVAL;
    *record = (struct apm_record){.job = *job, .channel = channel, .sequence = ++sequence, .accepted_ns = now};
    __atomic_add_fetch(&channel->in_flight, 1, __ATOMIC_RELAXED);
    numbers.submitted++;
    numbers.in_flight++;
    if (map) {
        map->pins++;
        map->numbers.submitted++;
    }
    if (job->kind == APM_JOB_DRAIN) {
        bool all = job->flags & APM_DRAIN_ALL;
        record->code = undrained(map, all);
        record->waits_for = (all ? map->running_all + (map->unmap_sequence != 0) : map->running_sync) + map->publishing;
        record->state = PARKED;
        if (record->waits_for == 0) {
            settle_drain(record, now);
            record->next = NULL;
            **done = record;
            *done = &record->next;
            return 1;
        }
        struct apm_record **at = &map->drains;
        while (*at)
            at = &(*at)->next;
        *at = record;
        return 0;
    }
    if (joins_round(job)) {
        struct apm_file_full *file = (struct apm_file_full *)job->map->file;
        record->is_sync = true;
        record->file = file;
        record->state = QUEUED_ROUND;
        record->previous = file->last;
        if (file->last)
            file->last->next = record;
        else
            file->first = record;
        file->last = record;
        if (!file->running && !file->ready)
            push_ready(file);
    } else {
        record->is_sync = job->kind == APM_JOB_PERSIST ||
                          ((job->kind == APM_JOB_COPY || job->kind == APM_JOB_FILL) && !(job->flags & APM_F_NOFLUSH));
        record->state = QUEUED_WORK;
        record->previous = work_last;
        if (work_last)
            work_last->next = record;
        else
            work_first = record;
        work_last = record;
    }
    if (map) {
        map->running_all++;
        map->running_sync += record->is_sync;
    }
    return 0;
}

int apm_pool_submit(struct apm_channel *channel, struct apm_job *jobs, uint32_t count) {
    if (apm_is_forked())
        return APM_E_FORKED;
    apm_fence(); /* law 1: non-temporal stores of the caller become visible before the lock releases the rest */
    struct apm_record *done = NULL, **done_end = &done;
    uint64_t now = apm_now_ns();
    uint32_t accepted = 0;
    int result = 0;
    pthread_mutex_lock(&lock);
    if (stopping)
        result = APM_E_STOPPED;
    else if (threads == 0 && start_thread() < 0)
        result = -EAGAIN;
    while (result >= 0 && accepted < count) {
        result = accept_job(channel, &jobs[accepted], now, &done_end);
        accepted += result >= 0;
    }
    unlock_and_call();
    apm_channel_publish(done);
    return accepted ? (int)accepted : result;
}

/* A file without waiting jobs leaves the queue of files. pool_lock held. */
static void unready(struct apm_file_full *file) {
    struct apm_file_full *before = NULL, *at = ready_first;
    while (at != file) {
        before = at;
        at = at->next_ready;
    }
    if (before)
        before->next_ready = file->next_ready;
    else
        ready_first = file->next_ready;
    if (ready_last == file)
        ready_last = before;
    file->ready = false;
}

/* Unlinks a queued record. pool_lock held. */
static void unlink_queued(struct apm_record *record) {
    struct apm_record **first = record->state == QUEUED_WORK ? &work_first : &record->file->first;
    struct apm_record **last = record->state == QUEUED_WORK ? &work_last : &record->file->last;
    if (record->previous)
        record->previous->next = record->next;
    else
        *first = record->next;
    if (record->next)
        record->next->previous = record->previous;
    else
        *last = record->previous;
    record->next = record->previous = NULL;
    if (record->state == QUEUED_ROUND && !record->file->first && record->file->ready)
        unready(record->file); /* nothing pins it any more */
}

/* A parked drain leaves its map's list. pool_lock held. */
static void unpark(struct apm_record *record) {
    struct apm_record **at = &((struct apm_map_full *)record->job.map)->drains;
    while (*at != record)
        at = &(*at)->next;
    *at = record->next;
    record->next = NULL;
}

int apm_pool_withdraw(struct apm_channel *channel, uint32_t tag) {
    if (apm_is_forked())
        return APM_E_FORKED;
    struct apm_record *record = NULL;
    pthread_mutex_lock(&lock);
    if (tag < channel->capacity)
        record = apm_channel_slot(channel, tag);
    bool waiting = record && (record->state == QUEUED_WORK || record->state == QUEUED_ROUND || record->state == PARKED);
    if (waiting) {
        if (record->state == PARKED)
            unpark(record);
        else
            unlink_queued(record);
        record->code = APM_E_WITHDRAWN;
        record->state = RUNNING;
    }
    pthread_mutex_unlock(&lock);
    if (waiting)
        complete(record);
    return waiting;
}

/* ---- end, and numbers --------------------------------------------------------------------------------------------------- */

int apm_pool_stop(uint32_t timeout_ms) {
    if (apm_is_forked())
        return APM_E_FORKED;
    pthread_once(&started, start_once);
    struct apm_record *withdrawn = NULL, **end = &withdrawn;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&lock);
    stopping = true;
    while (work_first || ready_first) {
        struct apm_record *record = work_first ? work_first : ready_first->first;
        unlink_queued(record);
        record->code = APM_E_STOPPED;
        record->state = RUNNING;
        *end = record;
        end = &record->next;
    }
    pthread_cond_broadcast(&work_there);
    pthread_mutex_unlock(&lock);
    complete(withdrawn);
    pthread_mutex_lock(&lock);
    int error = 0;
    while (error == 0 && running())
        error = pthread_cond_timedwait(&all_quiet, &lock, &until);
    int left = (int)running();
    pthread_mutex_unlock(&lock);
    return left;
}

void apm_pool_statistics(struct apm_statistics *out) {
    memset(out, 0, sizeof *out);
    if (apm_is_forked())
        return;
    uint64_t now = apm_now_ns(), oldest = 0;
    pthread_mutex_lock(&lock);
    *out = numbers;
    out->threads = threads;
    for (uint32_t i = 0; i < threads; i++)
        if (round_began[i] && (!oldest || round_began[i] < oldest))
            oldest = round_began[i];
    pthread_mutex_unlock(&lock);
    out->oldest_round_ns = oldest ? (now > oldest ? now - oldest : 1) : 0;
}

void apm_map_statistics(struct apm_map *pub, struct apm_map_statistics *out) {
    memset(out, 0, sizeof *out);
    if (apm_is_forked())
        return;
    pthread_mutex_lock(&lock);
    *out = ((struct apm_map_full *)pub)->numbers;
    pthread_mutex_unlock(&lock);
    out->in_flight = out->submitted - out->completed;
}
