/* apm_channel.c - how do completions reach an event loop?
 *
 * A completion is linked into its channel first, the eventfd is written after (law 3), once for a batch. The channel's lock
 * and pool_lock are never held together. The slots are the memory of the jobs in flight, made when they are used first. */
#include "apm_internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { SLOTS_PER_CHUNK = 256, CAPACITY_MAX = 1 << 20 };

_Static_assert(sizeof(struct apm_result) == 16, "unpacked as bytes by the caller");

int apm_channel_new(uint32_t capacity, struct apm_channel **out) {
    if (apm_is_forked())
        return APM_E_FORKED;
    if (capacity == 0 || capacity > CAPACITY_MAX)
        return -EINVAL;
    apm_pool_begin();
    struct apm_channel *channel = apm_allocate(sizeof *channel);
    if (!channel)
        return -ENOMEM;
    channel->capacity = capacity;
    channel->chunks = apm_allocate(((size_t)capacity + SLOTS_PER_CHUNK - 1) / SLOTS_PER_CHUNK * sizeof *channel->chunks);
    if (!channel->chunks) {
        free(channel);
        return -ENOMEM;
    }
    APM_OUTSIDE(channel->fd, APM_CALL_EVENTFD, 0, 0, 0, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (channel->fd < 0) {
        int error = errno;
        free(channel->chunks);
        free(channel);
        return -error;
    }
    pthread_mutex_init(&channel->lock, NULL);
    *out = channel;
    return 0;
}

int apm_channel_fd(const struct apm_channel *channel) { return channel->fd; }

int apm_channel_free(struct apm_channel *channel) {
    if (apm_is_forked())
        return APM_E_FORKED;
    if (__atomic_load_n(&channel->in_flight, __ATOMIC_ACQUIRE))
        return -EBUSY;
    pthread_mutex_lock(&channel->lock); /* the last publisher has left */
    pthread_mutex_unlock(&channel->lock);
    pthread_mutex_destroy(&channel->lock);
    close(channel->fd);
    for (uint32_t i = 0; i < (channel->capacity + SLOTS_PER_CHUNK - 1) / SLOTS_PER_CHUNK; i++)
        free(channel->chunks[i]);
    free(channel->chunks);
    free(channel);
    return 0;
}

/* The record of a slot, its memory made at first use. pool_lock held. */
struct apm_record *apm_channel_slot(struct apm_channel *channel, uint64_t tag) {
    if (tag >= channel->capacity)
        return NULL;
    struct apm_record **chunk = &channel->chunks[tag / SLOTS_PER_CHUNK];
    if (!*chunk)
        *chunk = apm_allocate(SLOTS_PER_CHUNK * sizeof **chunk);
    return *chunk ? *chunk + tag % SLOTS_PER_CHUNK : NULL;
}

static void wake(int fd) {
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Result first, then wake (law 3). records: linked by next, of any channels. */
void apm_channel_publish(struct apm_record *records) {
    while (records) {
        struct apm_channel *channel = records->channel;
        struct apm_record *others = NULL, **others_end = &others, *mine = NULL, **mine_end = &mine, *last = NULL;
        for (struct apm_record *record = records, *next; record; record = next) {
            next = record->next;
            record->next = NULL;
            if (record->channel == channel) {
                *mine_end = last = record;
                mine_end = &record->next;
            } else {
                *others_end = record;
                others_end = &record->next;
            }
        }
        pthread_mutex_lock(&channel->lock);
        if (channel->last)
            channel->last->next = mine;
        else
            channel->first = mine;
        channel->last = last;
        bool first = !channel->signalled;
        channel->signalled = true;
        int fd = channel->fd;
        if (first)
            wake(fd); /* inside: after the unlock, the taker may free the channel */
        pthread_mutex_unlock(&channel->lock);
        records = others;
    }
}

int apm_channel_take(struct apm_channel *channel, struct apm_result *out, uint32_t max) {
    if (apm_is_forked())
        return APM_E_FORKED;
    uint32_t count = 0;
    pthread_mutex_lock(&channel->lock);
    channel->signalled = false;
    struct apm_record *record = channel->first;
    for (; record && count < max; count++) {
        struct apm_record *next = record->next;
        out[count] = (struct apm_result){(uint32_t)record->job.tag, record->code, record->began};
        record->next = NULL;
        /* Free from here on: the slot is the caller's to use again, and only this thread submits for the channel. */
        record->state = FREE;
        record = next;
    }
    channel->first = record;
    if (!record)
        channel->last = NULL;
    __atomic_sub_fetch(&channel->in_flight, count, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&channel->lock);
    return (int)count;
}
