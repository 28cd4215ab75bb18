/* apm_observe.c - what did the core ask of the outside, in which order, and what if a call fails?
 *
 * Every call that leaves the core passes APM_OUTSIDE. Off, that is one load. On, calls get order numbers from one
 * counter for all threads when they begin and when they end, can be recorded, can be made to fail, and can be held
 * before they begin. A proof of durability reads the record: a sync call that began after the bytes were in place
 * and ended well before the acknowledgement. */
#include "apm_internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CALLS = 40 };

int apm_observing;
int apm_watching;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards everything below */
static pthread_cond_t gate_opened = PTHREAD_COND_INITIALIZER;
static uint64_t order;
static struct apm_event *events;
static uint32_t capacity, recorded;
static uint64_t lost;
static struct {
    uint64_t calls, first, last; /* calls counted; those in [first, last] fail */
    int code;
    uint32_t short_bytes;
} faults[CALLS];
static bool any_fault;
static bool gate_shut;
static uint32_t gate_call, gate_waiting;
static uint64_t gate_object;

static void set_watching(void) { /* lock held */
    __atomic_store_n(&apm_observing, events != NULL, __ATOMIC_SEQ_CST);
    __atomic_store_n(&apm_watching, events != NULL || any_fault || gate_shut, __ATOMIC_SEQ_CST);
}

static void record(uint64_t begun, uint32_t call, int64_t result, uint64_t object, uint64_t offset, uint64_t size) {
    if (!events)
        return;
    if (recorded == capacity) {
        lost++;
        return;
    }
    int32_t narrow = result > INT32_MAX ? INT32_MAX : (int32_t)result;
    events[recorded++] = (struct apm_event){.begun = begun, .ended = ++order, .call = call, .result = narrow,
                                            .object = object, .offset = offset, .size = size,
                                            .thread = (uint64_t)syscall(SYS_gettid)};
}

void apm_observe_note(uint32_t call, uint64_t object, uint64_t offset, uint64_t size) {
    int saved = errno;
    pthread_mutex_lock(&lock);
    record(++order, call, 0, object, offset, size);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

int apm_outside_begin(struct apm_outside *outside) {
    int planted = 0;
    pthread_mutex_lock(&lock);
    while (gate_shut && gate_call == outside->call && (gate_object == 0 || gate_object == outside->object)) {
        gate_waiting++;
        pthread_cond_wait(&gate_opened, &lock);
        gate_waiting--;
    }
    outside->begun = ++order;
    if (outside->call < CALLS) {
        uint64_t n = ++faults[outside->call].calls;
        if (faults[outside->call].code && n >= faults[outside->call].first && n <= faults[outside->call].last)
            planted = faults[outside->call].code;
    }
    pthread_mutex_unlock(&lock);
    return planted;
}

void apm_outside_end(const struct apm_outside *outside, int64_t result) {
    pthread_mutex_lock(&lock);
    record(outside->begun, outside->call, result, outside->object, outside->offset, outside->size);
    pthread_mutex_unlock(&lock);
}

uint64_t apm_fault_cut(uint32_t call, uint64_t size) {
    if (APM_LIKELY(!__atomic_load_n(&apm_watching, __ATOMIC_RELAXED)))
        return size;
    pthread_mutex_lock(&lock);
    uint64_t next = faults[call].calls + 1;
    if (faults[call].short_bytes && next >= faults[call].first && next <= faults[call].last &&
        size > faults[call].short_bytes)
        size = faults[call].short_bytes;
    pthread_mutex_unlock(&lock);
    return size;
}

void *apm_allocate(size_t size) {
    /* A pointer does not fit the -1 of APM_OUTSIDE, so the planted failure is asked for by itself. */
    if (APM_UNLIKELY(__atomic_load_n(&apm_watching, __ATOMIC_RELAXED))) {
        struct apm_outside outside = {APM_CALL_MALLOC, 0, 0, size, 0};
        int planted = apm_outside_begin(&outside);
        apm_outside_end(&outside, -planted);
        if (planted) {
            errno = planted;
            return NULL;
        }
    }
    return calloc(1, size);
}

int apm_observe_start(uint32_t room) {
    struct apm_event *fresh = room ? calloc(room, sizeof *fresh) : NULL;
    if (room && !fresh)
        return -ENOMEM;
    pthread_mutex_lock(&lock);
    struct apm_event *old = events;
    events = fresh;
    capacity = room;
    recorded = 0;
    lost = 0;
    set_watching();
    pthread_mutex_unlock(&lock);
    free(old);
    return 0;
}

int apm_observe_read(struct apm_event *out, uint32_t first, uint32_t max, uint64_t *lost_out) {
    pthread_mutex_lock(&lock);
    uint32_t count = first < recorded ? recorded - first : 0;
    if (count > max)
        count = max;
    if (count)
        memcpy(out, events + first, count * sizeof *out);
    if (lost_out)
        *lost_out = lost;
    pthread_mutex_unlock(&lock);
    return (int)count;
}

uint64_t apm_observe_mark(uint64_t object) {
    pthread_mutex_lock(&lock);
    uint64_t number = 0;
    if (events) {
        number = ++order;
        record(number, APM_CALL_MARK, 0, object, 0, 0);
    }
    pthread_mutex_unlock(&lock);
    return number;
}

int apm_fault_set(uint32_t call, uint32_t nth, uint32_t count, int code, uint32_t short_bytes) {
    if (call >= CALLS || code < 0 || (count && nth == 0))
        return -EINVAL;
    pthread_mutex_lock(&lock);
    faults[call].first = faults[call].calls + nth;
    faults[call].last = count ? faults[call].calls + nth + (count - 1) : 0;
    faults[call].code = count ? code : 0;
    faults[call].short_bytes = count ? short_bytes : 0;
    any_fault = true; /* until apm_fault_clear: the calls are counted as well */
    set_watching();
    pthread_mutex_unlock(&lock);
    return 0;
}

void apm_fault_clear(void) {
    pthread_mutex_lock(&lock);
    memset(faults, 0, sizeof faults);
    any_fault = false;
    set_watching();
    pthread_mutex_unlock(&lock);
}

uint64_t apm_fault_calls(uint32_t call) {
    pthread_mutex_lock(&lock);
    uint64_t calls = call < CALLS ? faults[call].calls : 0;
    pthread_mutex_unlock(&lock);
    return calls;
}

int apm_observe_hold(uint32_t call, uint64_t object, int hold) {
    pthread_mutex_lock(&lock);
    gate_shut = hold != 0;
    gate_call = call;
    gate_object = object;
    set_watching();
    pthread_cond_broadcast(&gate_opened);
    pthread_mutex_unlock(&lock);
    return 0;
}

uint32_t apm_observe_held(void) {
    pthread_mutex_lock(&lock);
    uint32_t waiting = gate_waiting;
    pthread_mutex_unlock(&lock);
    return waiting;
}
