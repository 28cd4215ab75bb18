/* apm.h - the manual of the native core.
 *
 * The core maps files, makes ranges of them durable, copies into them, and runs whatever
 * blocks on a pool of its own threads. It knows nothing of Python. Everything between the two
 * "cdef" marks is also what the Python door is generated from, so it keeps to plain C.
 *
 * Conventions
 *   - A function that can fail returns 0 or a count, or a negative code: -errno for what the
 *     system said, one of enum apm_error for what we say. Results go out through pointers.
 *   - Offsets and sizes are bytes. Ranges are half-open.
 *   - "Any thread" means: any thread, at any time, beside any other call.
 *   - After fork() the core is dead in the child if it was started in the parent: every call
 *     that could need the pool returns APM_E_FORKED there.
 */
#ifndef APM_H
#define APM_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */

/* ---- errors (apm_error.c) ------------------------------------------------------------
 * The first block has libpmem2's numbers and meaning, so that a table of either serves for both. */
enum apm_error {
    APM_E_UNKNOWN = -100000,
    APM_E_NOSUPP = -100001,
    APM_E_FILE_HANDLE_NOT_SET = -100003,
    APM_E_INVALID_FILE_HANDLE = -100004,
    APM_E_INVALID_FILE_TYPE = -100005,
    APM_E_MAP_RANGE = -100006,
    APM_E_MAPPING_EXISTS = -100007,
    APM_E_GRANULARITY_NOT_SET = -100008,
    APM_E_GRANULARITY_NOT_SUPPORTED = -100009,
    APM_E_OFFSET_OUT_OF_RANGE = -100010,
    APM_E_OFFSET_UNALIGNED = -100011,
    APM_E_LENGTH_UNALIGNED = -100015,
    APM_E_MAPPING_NOT_FOUND = -100016,
    APM_E_SOURCE_EMPTY = -100018,
    APM_E_INVALID_SHARING_VALUE = -100019,
    APM_E_ADDRESS_NULL = -100023,
    APM_E_LENGTH_OUT_OF_RANGE = -100030,
    APM_E_INVALID_PROT_FLAG = -100031,
    APM_E_NO_ACCESS = -100032,

    /* Ours: libpmem2 has no word for these. */
    APM_E_FORKED = -101001,         /* the core was started before the fork */
    APM_E_STOPPED = -101002,        /* the pool was stopped (the interpreter is exiting) */
    APM_E_WITHDRAWN = -101003,      /* taken back before it began */
    APM_E_FILE_FAILED = -101004,    /* an earlier sync of this file failed */
    APM_E_FILE_SHRANK = -101005,    /* the file ends before the range does */
    APM_E_SIZE_MISMATCH = -101006,  /* the file has another size than was asked for */
    APM_E_FOREIGN_OWNER = -101007,  /* the file belongs to another user */
    APM_E_NOT_MAPPED = -101008,     /* part of the range is not mapped */
    APM_E_PRIVATE_MEMORY = -101009, /* heap, stack or MAP_PRIVATE: nothing there reaches a file */
    APM_E_OTHER_FILE = -101010,     /* the range belongs to another file than the source */
    APM_E_CACHE_NOT_DROPPED = -101011, /* after a failed write-back: old page cache is still there */
    APM_E_NOT_CONTIGUOUS = -101012,  /* the range spans mappings that do not continue each other */
    APM_E_CLOSED = -101013           /* used after its close (given by the layer above) */
};

/* Name of a code ("MAPPING_EXISTS", or errno's "EIO"), never NULL. Any thread. */
const char *apm_error_name(int code);

/* ---- processor (apm_cpu.c) -------------------------------------------------------------- */
struct apm_cpu {
    uint32_t line_size;      /* bytes of a cache line, from the CPU where it tells */
    uint32_t can_flush;      /* 0: page granularity only on this machine */
    const char *flush_name;  /* "clwb", "clflushopt", "clflush", "dc cvap", "dc cvac", "none" */
    const char *copy_name;   /* "avx512f", "avx2", "sse2", "plain": widest non-temporal stores in use */
    uint32_t has_movdir64b;
    uint32_t copy_width;     /* bytes of one non-temporal store */
    uint64_t movnt_threshold;/* bytes; from here on a copy without a hint is non-temporal */
};

/* Detected once, on first use; honours PMEM_NO_CLWB, PMEM_NO_CLFLUSHOPT, PMEM_NO_MOVNT, PMEM_AVX,
 * PMEM_AVX512F, PMEM_MOVNT_THRESHOLD as libpmem2 does. Any thread. */
const struct apm_cpu *apm_cpu(void);

/* ---- flush (apm_flush.c) ------------------------------------------------------------------
 * apm_flush writes back the cache lines of a range; apm_fence orders it. A fence orders the
 * flushes of the calling thread only (law 1). Durable on persistent memory after both. */
void apm_flush(const void *address, size_t size);
void apm_fence(void);

/* ---- copy (apm_copy.c) --------------------------------------------------------------------
 * libpmem2's flags and numbers. */
#define APM_F_NODRAIN 1
#define APM_F_NONTEMPORAL 2
#define APM_F_TEMPORAL 4
#define APM_F_WC 8
#define APM_F_WB 16
#define APM_F_NOFLUSH 32
#define APM_F_SOURCE_OWNED 65536 /* ours: the source is private memory that nobody changes until completion */

/* memmove / memset into mapped persistent memory (ranges may overlap either way). flush = 1:
 * cache lines need flushing (CACHE_LINE); 0: they do not (BYTE). Flags as in libpmem2: NOFLUSH wins
 * over everything and leaves only the stores; NODRAIN leaves out the last fence; else durable on
 * return on persistent memory. Any thread; the caller orders concurrent stores. */
void apm_copy(void *to, const void *from, size_t size, uint32_t flags, int flush);
void apm_fill(void *to, int value, size_t size, uint32_t flags, int flush);

/* ---- media and files (apm_medium.c, apm_file.c) --------------------------------------------- */
enum apm_granularity { APM_BYTE = 0, APM_CACHE_LINE = 1, APM_PAGE = 2 };
enum apm_durability { APM_DURABILITY_NONE = 0, APM_DURABILITY_UNKNOWN = 1, APM_DURABILITY_POWER_LOSS = 2 };
enum apm_sharing { APM_SHARED = 0, APM_PRIVATE = 1 };
#define APM_PROT_EXEC 0x20000000
#define APM_PROT_READ 0x40000000
#define APM_PROT_WRITE 0x80000000

/* A file of this process, by (device, inode): one open file description, one failure, one queue of
 * rounds, however many maps (laws 2, 4, 13). Read-only for the caller. fd and writable change once at
 * most, from a read-only description to one for both; failed from 0 to the first failure. */
struct apm_file {
    uint64_t device;       /* st_dev */
    uint64_t inode;        /* st_ino */
    int32_t fd;            /* our own description; -1: could not be re-opened */
    uint32_t writable;     /* fd is open for writing */
    uint32_t coherent;     /* write() and mapping are known to see each other at once */
    uint32_t range_sync;   /* sync_file_range reaches the file's own pages (not so on an overlay) */
    uint32_t durability;   /* enum apm_durability of the medium, sharing and forcing aside */
    uint64_t file_system;  /* statfs f_type */
    int32_t failed;        /* 0, or the negative code of the first failed sync (atomic): ask apm_map_failed */
    uint32_t one_flush;    /* pages written back before are made durable by a sync of any other page of the file: its
                            * sync commits whatever the file's blocks depend on and flushes the whole device. So on ext4
                            * (data not in the journal) and xfs */
    uint32_t is_dup;       /* 1: fd is a dup of the caller's, because re-opening was refused */
    uint64_t serial;       /* never 0; one more for each file handed out anew */
    uint64_t vma_device;   /* what the kernel's table shows for a mapping of it (not st_dev on btrfs) */
    uint64_t vma_inode;
};

/* While a file is failed and a map of it is alive, it cannot be opened again (APM_E_FILE_FAILED); references alone do not
 * hold it back. */
/* Drops one reference. The last one closes the description, in the pool (unless this process holds a
 * POSIX lock on the file, which any close would drop: then it stays open until the process ends).
 * Any thread. NULL is allowed. */
void apm_file_release(struct apm_file *file);

#define APM_OPEN_CREATE 1         /* make the file when it is missing (size > 0) */
#define APM_OPEN_GROW 2           /* a smaller file grows to size */
#define APM_OPEN_SPARSE 4         /* do not allocate and write at creation and growth */
#define APM_OPEN_FOREIGN_OWNER 8  /* a file of another user is accepted */
#define APM_OPEN_READ_ENOUGH 16   /* a file that may only be read is accepted */

/* Argument of APM_JOB_OPEN. */
struct apm_open_request {
    const char *path;    /* opened O_CLOEXEC | O_NOFOLLOW; NULL: re-open fd */
    int32_t fd;          /* the caller's, never closed, not needed after the job */
    uint32_t flags;      /* APM_OPEN_* */
    uint32_t mode;       /* permission bits of a new file */
    uint32_t abandoned;  /* set to 1 by the caller: give up at the next piece of work */
    uint64_t size;       /* 0: not asked for, the file must exist */
    struct apm_file *file;   /* out: one reference */
    uint64_t file_size;      /* out: st_size; with APM_E_SIZE_MISMATCH the size found */
    uint32_t created;        /* out */
    uint32_t access;         /* out: APM_PROT_READ | APM_PROT_WRITE that the source allows */
    int32_t cause;           /* out: with APM_E_FILE_FAILED the first failure's code */
    uint32_t reserved;
};

/* ---- maps (apm_map.c) ------------------------------------------------------------------------ */
/* Read-only for the caller, constant while the map lives. */
struct apm_map {
    uint64_t address;
    uint64_t length;       /* bytes that were asked for, not rounded */
    uint64_t offset;       /* of address in the file */
    struct apm_file *file; /* NULL: anonymous memory */
    uint32_t granularity;  /* enum apm_granularity, effective */
    uint32_t durability;   /* enum apm_durability, effective */
    uint32_t sharing;
    uint32_t protection;   /* APM_PROT_* */
    uint32_t adopted;      /* made by somebody else: never unmapped here */
    uint32_t by_pwrite;    /* copies go through the file description */
    uint32_t forced;       /* granularity comes from PMEM2_FORCE_GRANULARITY */
    uint32_t map_sync;     /* the mapping has MAP_SYNC */
};

#define APM_MAP_KEEP_CACHE 1 /* do not drop clean cached pages before mapping */

/* Argument of APM_JOB_MAP. A file map takes its own reference of file. */
struct apm_map_request {
    struct apm_file *file;  /* NULL: anonymous */
    uint64_t offset;        /* page aligned */
    uint64_t length;
    uint32_t sharing, protection;
    uint32_t required_granularity; /* the coarsest that is accepted */
    uint32_t flags;                /* APM_MAP_* */
    struct apm_map *map;           /* out */
    uint32_t granularity;          /* out: the effective one, also when refused */
    uint32_t reserved;
};

/* Argument of APM_JOB_ADOPT: is [address, address + length) one shared mapping, of file when file is given?
 * Finds the file when it is NULL. */
struct apm_adopt_request {
    uint64_t address, length;
    struct apm_file *file;  /* NULL: find out */
    int32_t claimed;        /* claimed granularity, or -1: find out */
    uint32_t granularity;   /* out: what the kernel grants */
    struct apm_map *map;    /* out */
    int32_t cause;          /* out: with APM_E_FILE_FAILED the first failure's code */
    uint32_t reserved;
    uint64_t bad_address;   /* out: where a refused range begins */
    char path[512];         /* out: name that the kernel gives the mapping, "" when none */
};

/* Argument of APM_JOB_CHECK: does the kernel still show what the job's map was made of? */
struct apm_check_request {
    uint32_t still_there;  /* out */
    uint32_t reserved;
};

/* Argument of APM_JOB_OVERLAP: would a copy of size bytes at data to offset of the job's map read bytes that it writes,
 * through whatever mapping of the same file? Then it cannot be cut into pieces. */
struct apm_overlap_request {
    uint64_t data, offset, size;
    uint32_t overlaps;     /* out; also 1 when the kernel's table cannot be read */
    uint32_t reserved;
};

/* Argument of APM_JOB_SPLIT: folios of the page cache that hold more than one page of the range are split into single
 * pages, in memory: nothing is read, written or dropped for it. What is dirty, or mapped by another process, mostly stays
 * as it is. Only shared file mappings at PAGE granularity; on others it does nothing. */
#define APM_SPLIT_RANDOM 1 /* and the mapping is advised that access is random: no read-ahead by faults from now on */
struct apm_split_request {
    uint32_t flags;     /* APM_SPLIT_* */
    uint32_t reserved;
    uint64_t bytes;     /* out: in folios that were seen to be split (0 where /proc cannot be read) */
};

/* Argument of APM_JOB_MEASURE: how much does a store into one page make dirty? Makes up to samples pages of the range
 * dirty, unchanged: the caller persists them. Pages that are dirty already tell nothing. */
struct apm_measure_request {
    uint32_t samples;   /* at most this many pages, spread over the range */
    uint32_t measured;  /* out: pages that told; 0: not known here */
    uint64_t bytes;     /* out: made dirty by them */
};

/* Two lifetimes. The memory: apm_map_disown says that nobody can reach the bytes any more; an owned
 * mapping is unmapped when that was said and no job uses it, in the pool (law 5). The struct:
 * apm_map_release, once, after which the pointer is not used. Any thread, any order. */
void apm_map_disown(struct apm_map *map);
void apm_map_release(struct apm_map *map);

/* Inline work at CACHE_LINE and BYTE granularity, on the calling thread: no system call. Durable on return
 * (apm_map_copy and apm_map_fill: as flags say). The range must lie inside the map: -APM_E_* otherwise,
 * and APM_E_NOSUPP at PAGE granularity. */
int apm_map_persist(struct apm_map *map, uint64_t offset, uint64_t size);
int apm_map_copy(struct apm_map *map, uint64_t offset, const void *from, uint64_t size, uint32_t flags);
int apm_map_fill(struct apm_map *map, uint64_t offset, int value, uint64_t size, uint32_t flags);

/* 1 when no flush, persist or durable copy of this map is accepted and unfinished, none that nobody awaited has failed,
 * and the file has not failed: a drain would have nothing to do and nothing to tell. */
int apm_map_idle(struct apm_map *map);

/* The first failure of the map's file, or 0; also after the map let go of the file. Any thread. */
int apm_map_failed(struct apm_map *map);

/* The granularity that PMEM2_FORCE_GRANULARITY asks for, or -1. Read anew at each call. */
int apm_forced_granularity(void);
uint64_t apm_page_size(void);

/* ---- pool (apm_pool.c) ------------------------------------------------------------------------- */
enum apm_job_kind {
    APM_JOB_NOOP = 0,      /* a round trip and nothing else */
    APM_JOB_PERSIST = 1,   /* offset, size */
    APM_JOB_COPY = 2,      /* offset, size, data = source address, flags = APM_F_* */
    APM_JOB_FILL = 3,      /* offset, size, data = byte value, flags = APM_F_* */
    APM_JOB_DRAIN = 4,     /* completes after what was accepted before it on this map; flags = APM_DRAIN_* */
    APM_JOB_POPULATE = 5,  /* offset, size: read in as single pages, dirty nothing; flags = APM_POPULATE_* */
    APM_JOB_OPEN = 6,      /* data = request; likewise below */
    APM_JOB_MAP = 7,
    APM_JOB_ADOPT = 8,
    APM_JOB_CHECK = 9,
    APM_JOB_SPLIT = 10,    /* offset, size, data = request; likewise below */
    APM_JOB_MEASURE = 11,
    APM_JOB_OVERLAP = 12
};

#define APM_PERSIST_UNAWAITED 1 /* nobody waits for this one: the DRAINs of its map report its error */
#define APM_POPULATE_EVEN 1     /* only the blocks of 2 MiB with an even number in the file: two jobs share a long range */
#define APM_POPULATE_ODD 2
#define APM_DRAIN_ALL 1         /* wait for every kind of job, and for the unmapping when it is under way */

/* One entry of a submission. 48 bytes, no padding: the caller may pack it as bytes. */
struct apm_job {
    uint32_t kind;
    uint32_t flags;
    uint64_t tag;          /* slot of the channel, below its capacity and not in use */
    struct apm_map *map;   /* pinned from acceptance to completion; NULL for OPEN, MAP, ADOPT, NOOP, else needed */
    uint64_t offset;
    uint64_t size;
    uint64_t data;         /* memory stays the caller's and must live until the completion */
};

/* One completion, 16 bytes. */
struct apm_result {
    uint32_t tag;
    int32_t code;          /* 0 or negative */
    uint64_t began;        /* 1 if any work was done for it before it ended */
};

struct apm_channel;

/* Sets the pool up, starts no thread: threads come with the first jobs, at most threads_max (6 to 1024) of
 * them. Each lane leaves the others at least one: rounds; plain copies and reading in, at most two of them for
 * a file; opening and mapping; the pool's own errands. A file that hangs holds three threads at most, so
 * (threads_max - 3) / 3 files may hang before a healthy one has to wait. Once per process; later calls return -EALREADY. */
int apm_pool_configure(uint32_t threads_max);

/* A channel is where completions of one event loop arrive: a list and an eventfd (non-blocking, close on
 * exec). capacity bounds the jobs in flight (1 to 1 << 20). */
int apm_channel_new(uint32_t capacity, struct apm_channel **out);
int apm_channel_fd(const struct apm_channel *channel);
/* -EBUSY while jobs of it are in flight; 0: freed, eventfd closed. */
int apm_channel_free(struct apm_channel *channel);

/* Accepts jobs in order and returns how many (fewer than count only with an error on the next one, which the
 * caller sees by submitting it alone), or a negative code when the first is refused: -EAGAIN when no thread
 * could be started, APM_E_*, -EINVAL for a bad tag. What the caller stored before the call is seen by the jobs
 * (law 1). Jobs of one file join rounds in this order. One thread at a time for a channel. */
int apm_pool_submit(struct apm_channel *channel, struct apm_job *jobs, uint32_t count);

/* Takes back a job that has not begun: 1 when it was (its completion arrives with APM_E_WITHDRAWN), 0 when it
 * has begun or ended. One thread at a time for a channel. */
int apm_pool_withdraw(struct apm_channel *channel, uint32_t tag);

/* Moves up to max completions out; the eventfd is written at least once after each became visible, and is
 * reset by the reader before this call. Whoever was given max of them asks again. One thread at a time for a channel. */
int apm_channel_take(struct apm_channel *channel, struct apm_result *out, uint32_t max);

/* At exit: withdraws what has not begun, refuses what comes, waits up to timeout_ms for what runs. Returns the
 * number of jobs still running. */
int apm_pool_stop(uint32_t timeout_ms);

/* A histogram of times: step 0 is everything below a microsecond, then two steps to each doubling (of 1 to 1.5 and of 1.5 to
 * 2 times a power of two), the last one open. */
#define APM_LATENCY_STEPS 56
struct apm_latency {
    uint64_t count, total_ns, max_ns;
    uint64_t steps[APM_LATENCY_STEPS];
};

struct apm_statistics {
    uint64_t submitted, completed, failed, withdrawn; /* jobs */
    uint64_t rounds, round_jobs;       /* rounds of files and the jobs in them */
    uint64_t sync_calls;               /* msync, pwritev2(RWF_DSYNC), fdatasync, fsync */
    uint64_t bytes_persisted, bytes_copied;  /* as asked for, pool only */
    uint64_t in_flight;
    uint64_t oldest_round_ns;          /* age of the oldest running round, 0: none runs */
    uint64_t threads;
    struct apm_latency latency;        /* from acceptance to completion */
};
void apm_pool_statistics(struct apm_statistics *out);

/* The same of one map: the jobs that named it. rounds: those that a job of it took part in. */
struct apm_map_statistics {
    uint64_t submitted, completed, failed, withdrawn;
    uint64_t rounds, round_jobs;
    uint64_t bytes_persisted, bytes_copied;
    uint64_t in_flight;
    struct apm_latency latency;
};
void apm_map_statistics(struct apm_map *map, struct apm_map_statistics *out);
/* The time, in nanoseconds, that a share (0 to 1) of them stayed below: the upper end of the step where the share is reached,
 * so up to half too long, and never more than the longest. 0 when there are none. */
double apm_latency_at(const struct apm_latency *latency, double share);
int apm_is_forked(void);

/* ---- observer (apm_observe.c) ------------------------------------------------------------------
 * Every call that leaves the core is numbered, can be recorded, and can be made to fail. For tests: off, it
 * costs one load of a flag. */
enum apm_call {
    APM_CALL_MALLOC = 0, APM_CALL_OPEN = 1, APM_CALL_FSTAT = 2, APM_CALL_FALLOCATE = 3, APM_CALL_FTRUNCATE = 4,
    APM_CALL_MMAP = 5, APM_CALL_MUNMAP = 6, APM_CALL_MSYNC = 7, APM_CALL_FDATASYNC = 8, APM_CALL_FSYNC = 9,
    APM_CALL_SYNC_FILE_RANGE = 10, APM_CALL_PWRITE = 11, APM_CALL_PWRITE_DSYNC = 12, APM_CALL_LINK = 13,
    APM_CALL_UNLINK = 14, APM_CALL_EVENTFD = 15, APM_CALL_PTHREAD_CREATE = 16, APM_CALL_FADVISE = 17,
    APM_CALL_MADVISE = 18, APM_CALL_CLOSE = 19, APM_CALL_TMPFILE = 20, APM_CALL_QUERY = 21,
    APM_CALL_FSYNC_DIRECTORY = 22, APM_CALL_MMAP_SYNC = 23, APM_CALL_MINCORE = 24,
    APM_CALL_RANGE_WRITTEN = 25, /* sync_file_range that returns when the pages have been written, into the device's cache */
    /* not system calls; recorded only */
    APM_CALL_FLUSH = 32, APM_CALL_FENCE = 33, APM_CALL_STORE = 34, APM_CALL_MARK = 35
};

struct apm_event {
    uint64_t begun, ended; /* order numbers, one counter for all threads */
    uint32_t call;         /* enum apm_call */
    int32_t result;        /* >= 0, or -errno */
    uint64_t object;       /* inode of the file, descriptor, or 0 */
    uint64_t offset;       /* file offset or address */
    uint64_t size;
    uint64_t thread;       /* kernel thread id */
};

/* Starts recording into room for capacity events (0 stops and frees). */
int apm_observe_start(uint32_t capacity);
/* Copies out up to max recorded events from the first-th on; returns how many. *lost counts what had no room. */
int apm_observe_read(struct apm_event *out, uint32_t first, uint32_t max, uint64_t *lost);
/* Records a mark of the caller's own and returns its order number (0 when not recording). */
uint64_t apm_observe_mark(uint64_t object);

/* From the nth call (1 = the next) of this kind on, count calls fail with code (a positive errno; 0 with
 * short_bytes > 0: a write is cut to that many bytes). count 0 takes the fault away. Calls of any thread count. */
int apm_fault_set(uint32_t call, uint32_t nth, uint32_t count, int code, uint32_t short_bytes);
void apm_fault_clear(void);
/* How many calls of this kind were made since apm_fault_clear. */
uint64_t apm_fault_calls(uint32_t call);
/* A gate: calls of this kind on this object (inode or descriptor as recorded; 0: any) wait before they begin,
 * until the gate is opened again with hold = 0. One gate at a time. apm_observe_held counts who waits. */
int apm_observe_hold(uint32_t call, uint64_t object, int hold);
uint32_t apm_observe_held(void);

/* Digest of the sources that this library was built from, 64 hexadecimal digits. */
const char *apm_source_digest(void);

/* cdef end */

#endif
