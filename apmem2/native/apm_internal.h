/* apm_internal.h - what the files of the core share among themselves.
 *
 * Locks, and the order in which they may be held together (left before right):
 *   files_lock (apm_file.c)  the table of files
 *   pool_lock  (apm_pool.c)  queues, rounds, pins, drains, the numbers of the pool
 *   channel lock             one list of completions; never together with pool_lock (law 3)
 *   observer lock            the recorder; innermost
 */
#ifndef APM_INTERNAL_H
#define APM_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "apm.h"

#define APM_LIKELY(x) __builtin_expect(!!(x), 1)
#define APM_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Bounds (law 8). */
enum {
    APM_ROUND_JOBS_MAX = 1024,     /* jobs taken into one round */
    APM_EINTR_MAX = 100,           /* times that one interrupted call is begun again */
    APM_THREAD_STACK = 256 * 1024, /* bytes */
};
#define APM_PIECE ((uint64_t)8 << 20) /* bytes of one write; a long copy is several, within one round */

/* ---- observer: see apm_observe.c -------------------------------------------------------------- */
extern int apm_observing; /* recording is on */
extern int apm_watching;  /* anything at all is on: recording, faults, a gate */
void apm_observe_note(uint32_t call, uint64_t object, uint64_t offset, uint64_t size);

struct apm_outside {
    uint32_t call;
    uint64_t object, offset, size, begun;
};
/* 0, or the errno that the call must fail with. */
int apm_outside_begin(struct apm_outside *outside);
void apm_outside_end(const struct apm_outside *outside, int64_t result);
/* size, or what a planted short write leaves of it. */
uint64_t apm_fault_cut(uint32_t call, uint64_t size);

/* The one way to call out: result = expression, numbered, recorded and made to fail when a test asks for it.
 * Like the calls themselves: -1 and errno. */
#define APM_OUTSIDE(result, call_, object_, offset_, size_, expression)                                  \
    do {                                                                                                 \
        if (APM_LIKELY(!__atomic_load_n(&apm_watching, __ATOMIC_RELAXED))) {                             \
            (result) = (expression);                                                                     \
        } else {                                                                                         \
            struct apm_outside outside_ = {(call_), (uint64_t)(object_), (uint64_t)(offset_),            \
                                           (uint64_t)(size_), 0};                                        \
            int planted_ = apm_outside_begin(&outside_);                                                 \
            if (planted_) {                                                                              \
                errno = planted_;                                                                        \
                (result) = -1;                                                                           \
            } else {                                                                                     \
                (result) = (expression);                                                                 \
            }                                                                                            \
            int saved_ = errno;                                                                          \
            apm_outside_end(&outside_, (int64_t)(result) == -1 ? -(int64_t)saved_ : (int64_t)(result));  \
            errno = saved_;                                                                              \
        }                                                                                                \
    } while (0)

/* mmap() through APM_OUTSIDE, as APM_CALL_MMAP or APM_CALL_MMAP_SYNC: MAP_FAILED and errno. */
void *apm_sys_mmap(uint32_t call, void *at, size_t length, int protection, int flags, int fd, uint64_t offset);
void *apm_allocate(size_t size); /* zeroed, or NULL; counted and faulted as APM_CALL_MALLOC */

/* ---- the kernel's table of mappings: apm_vma.c -------------------------------------------------- */
struct apm_vma {
    uint64_t start, end, offset, device, inode;
    bool readable, writable, shared;
    char name[512];
};
/* The mapping that contains address: 0, -APM_E_NOT_MAPPED's code, or -errno. */
int apm_vma_at(uint64_t address, struct apm_vma *out);
/* Do the size bytes at data lie in a mapping of file, over some of the bytes [to, to + size) of it? A copy between two
 * mappings of the same bytes sees no overlap in the addresses, and a pwrite from one copies wrongly. 1 with *from, the
 * offset in file of the first byte, and *scattered when the source is more than one mapping; 0; or negative. */
int apm_vma_overlaps(const struct apm_file *file, uint64_t data, uint64_t size, uint64_t to, uint64_t *from,
                     bool *scattered);
/* Has the mapping that contains address MAP_SYNC? 1, 0 or -errno. */
int apm_vma_is_synchronous(uint64_t address);

/* ---- media: apm_medium.c -------------------------------------------------------------------------- */
struct apm_medium {
    uint64_t file_system;
    uint32_t durability;
    bool coherent;
    bool range_sync;
    bool one_flush;
};
void apm_medium_of(int fd, struct apm_medium *out);
bool apm_has_eadr(void);
/* What the kernel grants for a shared file mapping, from what it said to MAP_SYNC. */
uint32_t apm_granted_granularity(bool map_sync);

/* ---- files -------------------------------------------------------------------------------------- */
struct stat;
struct apm_record;
struct apm_work { /* a node of the pool's own errands: embedded, so that none needs memory */
    struct apm_work *next;
    void (*run)(struct apm_work *work);
};

struct apm_file_full {
    struct apm_file pub; /* first: the pointers are the same */
    struct apm_file_full *next; /* in its bucket; files_lock */
    uint32_t references;        /* files_lock; those of maps included */
    uint32_t maps;              /* files_lock */
    bool retained;              /* files_lock: nobody uses it, its fd must stay open */
    int old_fds[4];             /* earlier descriptions that somebody may still be using; files_lock */
    uint32_t old_count;
    bool growing;               /* files_lock: an opener is making it longer */
    bool synced;                /* files_lock: its size and blocks were durable when a path was opened here */
    bool dsync_works;           /* one round at a time: RWF_DSYNC has been granted */
    bool ranges_work, no_ranges; /* likewise: sync_file_range has been granted, or refused */
    uint32_t large_reads;       /* atomic; apm_folio.c: may it be read as large folios that are split then? */
    struct apm_work close_work;
    /* rounds: pool_lock */
    struct apm_record *first, *last; /* jobs waiting for the next round */
    struct apm_file_full *next_ready;
    bool ready, running;
    uint32_t working; /* plain copies and reading in that run now */
};
/* fd may change while others look (read-only at first, read-write later). */
static inline int apm_file_fd(const struct apm_file *file) { return __atomic_load_n(&file->fd, __ATOMIC_ACQUIRE); }
/* The file behind handle, opened with a description of our own, with one reference for the caller. directory and name: the
 * plain way where there is no /proc (name may be NULL). *cause: with APM_E_FILE_FAILED the first failure. */
int apm_file_obtain(int handle, const struct stat *about, bool must_write, int directory, const char *name,
                    struct apm_file **out, int32_t *cause);
/* Memory that no name leads to: a file without descriptor. */
int apm_file_without_descriptor(const struct apm_vma *vma, struct apm_file **out, int32_t *cause);
/* One opener at a time makes a file longer; -EBUSY when another process does. End it in any case. */
int apm_file_begin_growing(struct apm_file *file, int *lock_fd);
void apm_file_end_growing(struct apm_file *file, int lock_fd);
/* Closes a descriptor of a file, or leaves it open until the process ends where closing it would drop fcntl locks. */
void apm_file_discard(int fd, uint64_t inode);
bool apm_file_is_synced(const struct apm_file *file);  /* were its size and blocks made durable here? */
void apm_file_mark_synced(struct apm_file *file);
/* 0, or APM_E_MAP_RANGE when the file ends before offset + length. */
int apm_file_holds(const struct apm_file *file, uint64_t offset, uint64_t length);
int apm_file_open(struct apm_open_request *request); /* apm_open.c */
/* A map's reference, taken and dropped. The latter closes on this thread, one of the pool's. */
void apm_file_hold_for_map(struct apm_file *file);
void apm_file_drop_for_map(struct apm_file *file);
/* Finds the file behind a mapping of this process. 0 with *out possibly without descriptor, or negative. */
int apm_file_of_vma(const struct apm_vma *vma, struct apm_file **out, int32_t *cause);
/* Is this file what the kernel shows for vma? */
bool apm_file_is_mapped(const struct apm_file *file, const struct apm_vma *vma);
void apm_file_fail(struct apm_file *file, int code); /* the first failure stays (law 4) */
static inline int apm_file_failure(const struct apm_file *file) {
    return __atomic_load_n(&file->failed, __ATOMIC_ACQUIRE);
}
/* apm_create.c: a new file, or a longer one, durable with its name (law 15). */
int apm_create_file(int directory, const char *name, const struct apm_open_request *request, uint64_t *inode);
/* Grows it; the caller syncs. Its size follows what is written, so nothing that others see is written over. */
int apm_extend_file(int fd, uint64_t from, const struct apm_open_request *request);
void apm_cut_file(int fd, uint64_t size);

/* ---- maps ------------------------------------------------------------------------------------------- */
struct apm_map_full {
    struct apm_map pub; /* first */
    uint64_t mapped_length; /* page rounded; 0: not ours to unmap */
    uint32_t references;    /* atomic: the holder of the struct, and the memory */
    struct apm_work unmap_work;
    /* pool_lock */
    uint32_t pins;          /* jobs that use the memory */
    bool disowned, unmapping;
    uint32_t running_all, running_sync; /* accepted, not completed */
    uint32_t publishing;                /* completed, and its channel is only being told */
    struct apm_record *drains;          /* waiting for some of them */
    int32_t flush_failed;               /* first error of a flush that nobody awaited; stays */
    bool told;                          /* a drain has said so */
    int32_t failed;                     /* the file's failure when the map let go of it */
    uint64_t unmap_sequence;
    struct apm_map_statistics numbers;
    uint64_t last_round; /* the number of the last round that a job of it took part in */
};
struct apm_map_full *apm_map_new(void);
/* What forcing does to a granularity that the kernel granted; *forced when it is finer than granted. */
uint32_t apm_map_force(uint32_t granted, bool *forced);
uint32_t apm_map_durability(const struct apm_file *file, uint32_t sharing, bool forced);
void apm_map_decide_copies(struct apm_map *map);
int apm_map_run(struct apm_map_request *request);
int apm_adopt_run(struct apm_adopt_request *request);
int apm_check_run(const struct apm_map *map, struct apm_check_request *request);
int apm_overlap_run(const struct apm_map *map, struct apm_overlap_request *request);
/* COPY by stores: the bytes that job->data stands for, which may be a copy of them (*copy, to be freed). */
int apm_map_source(const struct apm_job *job, const void **source, void **copy);
void apm_map_unmap(struct apm_map_full *map); /* memory and file; then drops the memory's reference */
void apm_map_drop(struct apm_map_full *map);

/* ---- the page cache: apm_folio.c --------------------------------------------------------------------- */
int apm_populate_run(const struct apm_map *map, uint64_t offset, uint64_t size, uint32_t flags);
int apm_split_run(const struct apm_map *map, uint64_t offset, uint64_t size, struct apm_split_request *request);
int apm_measure_run(const struct apm_map *map, uint64_t offset, uint64_t size, struct apm_measure_request *request);

/* ---- pool -------------------------------------------------------------------------------------------- */
enum apm_record_state { FREE = 0, QUEUED_WORK, QUEUED_ROUND, PARKED, RUNNING, DONE };
struct apm_record {
    struct apm_job job;
    struct apm_channel *channel;
    struct apm_record *next, *previous; /* its queue; when done, the completion list */
    uint64_t sequence;  /* order of acceptance */
    uint64_t accepted_ns;
    int32_t code;
    uint32_t waits_for; /* DRAIN: jobs that it still waits for */
    uint8_t state;      /* enum apm_record_state; pool_lock, FREE is set by the channel's taker */
    bool began, is_sync;
    bool needs_sync; /* a copy whose pages the persists of its round have to sync */
    struct apm_file_full *file; /* whose round it waits for, or NULL */
};
void apm_latency_add(struct apm_latency *latency, uint64_t took_ns); /* apm_latency.c */
/* ---- channels: apm_channel.c */
struct apm_channel {
    int fd;
    uint32_t capacity;
    struct apm_record **chunks; /* slots, SLOTS_PER_CHUNK at a time; pool_lock */
    uint32_t in_flight;         /* accepted, not taken; atomic */
    pthread_mutex_t lock;       /* guards the three below */
    struct apm_record *first, *last;
    bool signalled; /* the eventfd was written since the last take */
};
/* The record of a slot, or NULL (no such slot, no memory). pool_lock held. */
struct apm_record *apm_channel_slot(struct apm_channel *channel, uint64_t tag);
/* Result first, then wake (law 3). records: linked by next, of any channels. pool_lock not held. */
void apm_channel_publish(struct apm_record *records);

void apm_pool_begin(void); /* what has to be there before the first channel */
void apm_pool_schedule(struct apm_work *work); /* an errand of the core's own, at any time */
void apm_map_errand_done(struct apm_map_full *map); /* the unmapping is over: drains may go */
uint64_t apm_now_ns(void);

/* ---- rounds: apm_round.c ------------------------------------------------------------------------------- */
struct apm_round_counts {
    uint64_t sync_calls, bytes_persisted, bytes_copied;
};
/* Runs one round: the codes of the records are set when it returns, every call has ended, and durable means
 * durable for those with 0. */
void apm_round_run(struct apm_file_full *file, struct apm_record *jobs, struct apm_round_counts *counts);
/* Where the bytes of a job end in its file. */
static inline uint64_t apm_record_end(const struct apm_record *record) {
    return record->job.map->offset + record->job.offset + record->job.size;
}

/* ---- sync: the only file with sync and write calls: apm_sync.c ------------------------------------------- */
struct iovec;
enum { APM_RUN_PIECES = 1024 }; /* pieces of one write */
/* Was a trick refused because this kernel, file system or sandbox does not have it? (law 16) */
bool apm_sync_unsupported(int error);
/* Pieces, one after the other, from offset on; continues short writes. durable: with RWF_DSYNC. */
int apm_sync_write_run(int fd, uint64_t object, struct iovec *pieces, int count, uint64_t offset, bool durable);
/* One COPY or FILL. *wrote: the file was touched, so an error may be that of a write-back. */
int apm_sync_write_one(const struct apm_record *record, bool durable, bool *wrote);
/* Errors of a plain write that say: the bytes never reached the page cache. They are the caller's alone (law 4). */
bool apm_sync_refused(int code);
/* COPY and FILL with NOFLUSH: only visible. Errors are the caller's alone (law 4). */
int apm_sync_write_plain(const struct apm_record *record);
/* COPY and FILL by stores through the mapping. */
int apm_sync_store(const struct apm_record *record);
int apm_sync_size_of(const struct apm_file *file, uint64_t *size);
/* Starts the writing of a range of the file and does not wait. */
int apm_sync_begin(const struct apm_file *file, uint64_t offset, uint64_t size);
/* Writes a range of the file and waits until the device has it, in its cache: a sync must follow. */
int apm_sync_written(const struct apm_file *file, uint64_t offset, uint64_t size);
int apm_sync_mapping(const struct apm_file *file, uint64_t begin, uint64_t end); /* msync of addresses */
bool apm_sync_is_mapped(uint64_t begin, uint64_t end);
/* Our own description's word on an adopted mapping's write-back, from a byte of it on (law 13). */
int apm_sync_ask(const struct apm_file *file, uint64_t offset);
int apm_sync_zero(int fd, uint64_t from, uint64_t to, const uint32_t *abandoned);
int apm_sync_file(int fd);      /* fsync */
int apm_sync_directory(int fd); /* fsync, of a directory */
int apm_sync_data(int fd);      /* fdatasync */

#endif
