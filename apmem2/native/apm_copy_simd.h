/* apm_copy_simd.h - the copies of one instruction set; included once for each by apm_copy_x86.c.
 *
 * The includer defines W (bytes of a vector), TARGET, NAME(x), VEC, LOAD, STORE, STREAM, SPREAD.
 *
 * Small sizes (up to SMALL) load everything before they store anything, so that they are right for every overlap,
 * and cover their size by two runs of vectors that meet in the middle, so that size is asked about only a few times.
 * Larger ones walk over whole lines of the destination, in the direction in which no byte of the source is
 * overwritten before it is read; each piece is loaded whole before it is stored.
 */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define COUNT (BLOCK / W)
#define UNROLL _Pragma("GCC unroll 16")

INLINE void NAME(stream_vector)(char *to, VEC v) {
    apm_line_trace('S', to, W);
    STREAM(to, v);
}

/* size in (count * W, 2 * count * W]. */
INLINE void NAME(ends)(char *to, const char *from, size_t size, int count) {
    VEC head[COUNT], tail[COUNT];
    const char *from_tail = from + size - (size_t)count * W;
    char *to_tail = to + size - (size_t)count * W;
    UNROLL for (int i = 0; i < count; i++) {
        head[i] = LOAD(from + i * W);
        tail[i] = LOAD(from_tail + i * W);
    }
    UNROLL for (int i = 0; i < count; i++) {
        STORE(to + i * W, head[i]);
        STORE(to_tail + i * W, tail[i]);
    }
}

/* size <= SMALL */
INLINE void NAME(small)(char *to, const char *from, size_t size) {
    if (size <= 16) {
        move_16(to, from, size);
    } else if (W > 16 && size <= 32) {
        move_32(to, from, size);
#if W == 64
    } else if (size <= 64) {
        move_64(to, from, size);
#endif
    } else if (size <= 2 * W) {
        NAME(ends)(to, from, size, 1);
    } else if (size <= 4 * W || SMALL <= 4 * W) {
        NAME(ends)(to, from, size, 2);
    } else if (size <= 8 * W || SMALL <= 8 * W) {
        NAME(ends)(to, from, size, 4);
    } else {
        NAME(ends)(to, from, size, 8);
    }
}

/* BLOCK bytes, or one line of them; to is aligned to a line. */
INLINE void NAME(block)(char *to, const char *from, int vectors, enum way way) {
    VEC v[COUNT];
    UNROLL for (int i = 0; i < vectors; i++) v[i] = LOAD(from + i * W);
    UNROLL for (int i = 0; i < vectors; i++) {
        if (way == STREAM_ONLY || way == STREAM_FLUSH) NAME(stream_vector)(to + i * W, v[i]);
        else STORE(to + i * W, v[i]);
    }
    if (way == STORE_FLUSH)
        UNROLL for (int i = 0; i < vectors * W; i += LINE) flush_line(to + i);
}

/* size is a multiple of LINE, to is aligned. */
INLINE void NAME(lines)(char *to, const char *from, size_t size, enum way way, int forward) {
    if (way == DIRECT) {
        move_direct(to, from, size, forward);
    } else if (forward) {
        size_t at = 0;
        for (; at + BLOCK <= size; at += BLOCK) NAME(block)(to + at, from + at, COUNT, way);
        for (; at < size; at += LINE) NAME(block)(to + at, from + at, LINE / W, way);
    } else {
        size_t at = size;
        for (; at >= BLOCK; at -= BLOCK) NAME(block)(to + at - BLOCK, from + at - BLOCK, COUNT, way);
        for (; at > 0; at -= LINE) NAME(block)(to + at - LINE, from + at - LINE, LINE / W, way);
    }
    if (way == STREAM_FLUSH || way == STORE_THEN_FLUSH)
        for (size_t at = 0; at < size; at += LINE) flush_line(to + at);
}

/* Less than a line, inside one line. Streams what can be streamed whole; the rest is stored, and flushed by
 * those who must (flush). */
INLINE void NAME(part)(char *to, const char *from, size_t size, enum way way, int flush, int forward) {
    if (size == 0) return;
    if (way == STREAM_ONLY && (((uintptr_t)to | size) & 7) == 0) {
        stream_words(to, from, size, forward);
        return;
    }
    NAME(small)(to, from, size);
    if (flush) flush_line(to);
}

/* Any size; way is constant where this is used. */
INLINE void NAME(walk)(char *to, const char *from, size_t size, enum way way, int flush) {
    size_t head = -(uintptr_t)to & (LINE - 1);
    if (head > size) head = size;
    size_t body = (size - head) & ~(size_t)(LINE - 1);
    size_t tail = size - head - body;
    size_t piece = way == STREAM_FLUSH || way == STORE_THEN_FLUSH ? PIECE : body;
    if ((uintptr_t)to - (uintptr_t)from >= size) { /* forward: to lies before from, or far enough behind */
        NAME(part)(to, from, head, way, flush, 1);
        for (size_t at = 0; at < body; at += piece)
            NAME(lines)(to + head + at, from + head + at, body - at < piece ? body - at : piece, way, 1);
        NAME(part)(to + head + body, from + head + body, tail, way, flush, 1);
    } else {
        NAME(part)(to + head + body, from + head + body, tail, way, flush, 0);
        for (size_t at = body, now; at > 0; at -= now) {
            now = at < piece ? at : piece;
            NAME(lines)(to + head + at - now, from + head + at - now, now, way, 0);
        }
        NAME(part)(to, from, head, way, flush, 0);
    }
}

static TARGET __attribute__((noinline)) void NAME(stream)(char *to, const char *from, size_t size, int flush) {
    if (has_direct) NAME(walk)(to, from, size, DIRECT, flush);
    else if (flush && !streams_evict) NAME(walk)(to, from, size, STREAM_FLUSH, flush);
    else NAME(walk)(to, from, size, STREAM_ONLY, flush);
}

static TARGET __attribute__((noinline)) void NAME(store_flush)(char *to, const char *from, size_t size) {
    if (size <= STORE_FLUSH_FROM) NAME(walk)(to, from, size, STORE_THEN_FLUSH, 1);
    else NAME(walk)(to, from, size, STORE_FLUSH, 1);
}

static TARGET __attribute__((noinline)) void NAME(store)(char *to, const char *from, size_t size) {
    NAME(walk)(to, from, size, STORE_ONLY, 0);
}

static TARGET void NAME(copy)(char *to, const char *from, size_t size, uint32_t flags, int flush) {
    if (wants_stream(size, flags, flush)) {
        NAME(stream)(to, from, size, flush);
    } else if (!flush || (flags & APM_F_NOFLUSH)) {
        if (size <= SMALL) NAME(small)(to, from, size);
        else if (size <= MEMMOVE_FROM) NAME(store)(to, from, size);
        else memmove(to, from, size);
    } else if (size <= SMALL) {
        NAME(small)(to, from, size);
        flush_few(to, size);
    } else {
        NAME(store_flush)(to, from, size);
    }
}

/* ---- the same with one value instead of a source: no overlaps, one direction -------------------------------- */

INLINE void NAME(fill_ends)(char *to, VEC v, size_t size, int count) {
    char *tail = to + size - (size_t)count * W;
    UNROLL for (int i = 0; i < count; i++) {
        STORE(to + i * W, v);
        STORE(tail + i * W, v);
    }
}

INLINE void NAME(fill_small)(char *to, int value, size_t size) {
    VEC v = SPREAD((char)value);
    if (size <= 16) {
        fill_16(to, value, size);
    } else if (W > 16 && size <= 32) {
        fill_32(to, value, size);
#if W == 64
    } else if (size <= 64) {
        fill_64(to, value, size);
#endif
    } else if (size <= 2 * W) {
        NAME(fill_ends)(to, v, size, 1);
    } else if (size <= 4 * W || SMALL <= 4 * W) {
        NAME(fill_ends)(to, v, size, 2);
    } else if (size <= 8 * W || SMALL <= 8 * W) {
        NAME(fill_ends)(to, v, size, 4);
    } else {
        NAME(fill_ends)(to, v, size, 8);
    }
}

INLINE void NAME(fill_block)(char *to, VEC v, int vectors, enum way way) {
    UNROLL for (int i = 0; i < vectors; i++) {
        if (way == STREAM_ONLY || way == STREAM_FLUSH) NAME(stream_vector)(to + i * W, v);
        else STORE(to + i * W, v);
    }
}

INLINE void NAME(fill_lines)(char *to, VEC v, size_t size, enum way way) {
    if (way == DIRECT) {
        char pattern[LINE] __attribute__((aligned(LINE)));
        for (int i = 0; i < LINE; i += W) STORE(pattern + i, v);
        for (size_t at = 0; at < size; at += LINE) direct_line(to + at, pattern);
        return;
    }
    size_t at = 0;
    for (; at + BLOCK <= size; at += BLOCK) NAME(fill_block)(to + at, v, COUNT, way);
    for (; at < size; at += LINE) NAME(fill_block)(to + at, v, LINE / W, way);
    if (way == STREAM_FLUSH || way == STORE_THEN_FLUSH)
        for (at = 0; at < size; at += LINE) flush_line(to + at);
}

INLINE void NAME(fill_part)(char *to, int value, size_t size, enum way way, int flush) {
    if (size == 0) return;
    if (way == STREAM_ONLY && (((uintptr_t)to | size) & 7) == 0) {
        fill_stream_words(to, value, size);
        return;
    }
    NAME(fill_small)(to, value, size);
    if (flush) flush_line(to);
}

INLINE void NAME(fill_walk)(char *to, int value, size_t size, enum way way, int flush) {
    size_t head = -(uintptr_t)to & (LINE - 1);
    if (head > size) head = size;
    size_t body = (size - head) & ~(size_t)(LINE - 1);
    size_t piece = way == STREAM_FLUSH || way == STORE_THEN_FLUSH ? PIECE : body;
    NAME(fill_part)(to, value, head, way, flush);
    VEC v = SPREAD((char)value);
    for (size_t at = 0; at < body; at += piece)
        NAME(fill_lines)(to + head + at, v, body - at < piece ? body - at : piece, way);
    NAME(fill_part)(to + head + body, value, size - head - body, way, flush);
}

static TARGET __attribute__((noinline)) void NAME(fill_stream)(char *to, int value, size_t size, int flush) {
    if (has_direct) NAME(fill_walk)(to, value, size, DIRECT, flush);
    else if (flush && !streams_evict) NAME(fill_walk)(to, value, size, STREAM_FLUSH, flush);
    else NAME(fill_walk)(to, value, size, STREAM_ONLY, flush);
}

static TARGET __attribute__((noinline)) void NAME(fill_store_flush)(char *to, int value, size_t size) {
    NAME(fill_walk)(to, value, size, STORE_THEN_FLUSH, 1);
}

static TARGET __attribute__((noinline)) void NAME(fill_store)(char *to, int value, size_t size) {
    NAME(fill_walk)(to, value, size, STORE_ONLY, 0);
}

static TARGET void NAME(fill)(char *to, int value, size_t size, uint32_t flags, int flush) {
    if (wants_stream(size, flags, flush)) {
        NAME(fill_stream)(to, value, size, flush);
    } else if (!flush || (flags & APM_F_NOFLUSH)) {
        if (size <= SMALL) NAME(fill_small)(to, value, size);
        else if (size <= MEMSET_FROM) NAME(fill_store)(to, value, size);
        else memset(to, value, size);
    } else if (size <= SMALL) {
        NAME(fill_small)(to, value, size);
        flush_few(to, size);
    } else {
        NAME(fill_store_flush)(to, value, size);
    }
}

static const struct apm_copy_ways NAME(ways) = {NAME(copy), NAME(fill)};

#undef INLINE
#undef COUNT
#undef UNROLL
#undef W
#undef TARGET
#undef NAME
#undef VEC
#undef LOAD
#undef STORE
#undef STREAM
#undef SPREAD
