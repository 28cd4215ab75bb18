"""How is an event stored so that it may be acknowledged? The ring on an `apmem2.Map`, with an index in memory.

Decisions (which slot, known id, full, failed) are made in plain functions; what is awaited comes after them and
changes nothing that others have seen. Writes run as tasks of the inbox and are shielded: a client that goes away
cancels its answer, not the write, and a second delivery of the same id waits for that very write.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, Self

import apmem2

from . import ring

# Slots that are read in and looked at in one go: bounds how long recovery and listing hold the loop.
SLOTS_PER_STEP = 64


class InboxFullError(Exception):
    """Every slot holds an event that nobody has consumed: nothing is overwritten, the provider must come again."""


class InboxFailedError(Exception):
    """A write failed. Until the process is started again, nothing is acknowledged."""


class IdReusedError(Exception):
    """The id is known, but with another body: one of the two is not what the provider says it is."""


class NotDurableYetError(Exception):
    """The consumer wants to pass events that are still being written."""


@dataclass(slots=True)
class _Entry:
    seq: int
    event_id: str
    body_bytes: int
    body_crc: int
    record_bytes: int


class Inbox:
    """Events in a ring; `store` returns when the event is durable."""

    def __init__(self, memory: apmem2.Map, geometry: ring.Geometry) -> None:
        self.memory = memory
        self.geometry = geometry
        self.torn = 0
        self._failed: BaseException | None = None
        self._mark = ring.Mark(serial=0, consumed=0)
        self._mark_lock = asyncio.Lock()
        self._next = 1
        # Entries stay until their slot is used again, also when consumed: providers repeat deliveries that were
        # consumed long ago, and the id is what tells them apart from new ones.
        self._by_seq: dict[int, _Entry] = {}
        self._by_id: dict[str, _Entry] = {}
        # In order of sequence numbers, so the first key is the oldest write in flight.
        self._writing: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, memory: apmem2.Map, geometry: ring.Geometry) -> Self:
        """Recover what the map holds; a new file gets its header. Can be cut at any point and run again."""
        inbox = cls(memory, geometry)
        found = ring.unpack_header(memory.view)
        if found is not None and found != geometry:
            raise ring.RingDamagedError(f"the file was made with {found}, not with {geometry}")
        await inbox._recover()
        if found is None:
            if inbox._by_seq or inbox.torn:
                raise ring.RingDamagedError("the header is gone, but there are records")
            await memory.memcpy(0, ring.pack_header(geometry))
        return inbox

    async def _recover(self) -> None:
        # Found is not durable: after a killed process the page cache shows records that no sync has covered. They
        # must not be read, nor repeated deliveries of them be answered 2xx, before this persist has returned.
        await self.memory.persist(0, self.geometry.file_bytes)
        self._mark = ring.unpack_mark(self.memory.view)
        count = self.geometry.slot_count
        for first in range(0, count, SLOTS_PER_STEP):
            last = min(first + SLOTS_PER_STEP, count)
            await self._read_in(first, last)
            for record in ring.scan(self.memory.view, self.geometry, first, last):
                if isinstance(record, ring.TornRecordError):
                    self.torn += 1
                    continue
                if record.seq > self._mark.consumed + count:
                    raise ring.RingDamagedError(f"record {record.seq} overwrote one that was not consumed")
                self._remember(_entry(record))
        self._next = max((self._mark.consumed, *self._by_seq)) + 1

    async def _read_in(self, first: int, last: int) -> None:
        # The pool reads the pages in, so that looking at the view afterwards does not make the loop wait for the disk.
        await self.memory.populate(self.geometry.slot_offset(first), (last - first) * self.geometry.slot_bytes)

    def _remember(self, entry: _Entry) -> None:
        self._by_seq[entry.seq] = entry
        if entry.event_id:
            self._by_id.setdefault(entry.event_id, entry)

    def _forget(self, seq: int) -> None:
        entry = self._by_seq.pop(seq, None)
        if entry is not None and self._by_id.get(entry.event_id) is entry:
            del self._by_id[entry.event_id]

    @property
    def failed(self) -> BaseException | None:
        """The first failure, ours or the file's; it stays until the process is started again."""
        return self._failed or self.memory.failed

    @property
    def consumed(self) -> int:
        """Events up to this number were consumed."""
        return self._mark.consumed

    @property
    def durable_seq(self) -> int:
        """Every event up to here is durable (or was never written and never answered)."""
        return next(iter(self._writing), self._next) - 1

    @property
    def pending(self) -> int:
        """How many durable events wait for the consumer."""
        return sum(1 for _ in self._pending())

    def _pending(self) -> list[int]:
        return [seq for seq in sorted(self._by_seq) if self.consumed < seq <= self.durable_seq]

    async def store(self, event_id: str, body: bytes) -> tuple[int, bool]:
        """Store one event; return its sequence number and whether it is new.

        **Durability**: when this returns, the event survives a power cut, also when it is a repeated delivery: that
        one waits for the write of the first. An empty id is never taken for a repetition.
        """
        seq, new = self._admit(event_id, body)
        write = self._writing.get(seq)
        if write is not None:
            await asyncio.shield(write)
        return seq, new

    def _admit(self, event_id: str, body: bytes) -> tuple[int, bool]:
        if (cause := self.failed) is not None:
            raise InboxFailedError("an earlier write failed") from cause
        known = self._by_id.get(event_id)
        if known is not None:
            if (known.body_bytes, known.body_crc) != (len(body), zlib.crc32(body)):
                raise IdReusedError("this id was used for another body")
            return known.seq, False
        seq = self._next
        if seq > self.consumed + self.geometry.slot_count:
            raise InboxFullError(f"{self.geometry.slot_count} events wait to be consumed")
        event = ring.Record(seq, time.time_ns(), event_id, body)
        packed = ring.pack_record(event, self.geometry)
        self._next += 1
        self._forget(seq - self.geometry.slot_count)
        self._remember(_entry(event))
        self._writing[seq] = self._start(self._write(seq, packed))
        return seq, True

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: it is kept in `failed`, which everybody asks, also when no client waits any more

    async def _write(self, seq: int, packed: bytes) -> None:
        await self._copy(self.geometry.slot_offset(seq), packed)
        del self._writing[seq]

    async def _copy(self, offset: int, data: bytes) -> None:
        # memcpy, not `view[a:b] = data` and persist: a store of our own may fault and wait for the file system, and
        # then the whole loop waits. memcpy copies in the pool and is durable when it returns.
        try:
            await self.memory.memcpy(offset, data)
        except BaseException as cause:
            # Whatever the cause, the slot is in an unknown state, and only recovery can look at it: no number and no
            # id is given again in this process. A failed sync has failed the map for good anyway.
            if self._failed is None:
                self._failed = cause
            if isinstance(cause, Exception):
                raise InboxFailedError("the write failed") from cause
            raise

    async def read(self, seq: int) -> ring.Record | None:
        """One durable event that was not consumed, or None."""
        if seq not in self._by_seq or not self.consumed < seq <= self.durable_seq:
            return None
        index = seq % self.geometry.slot_count
        await self._read_in(index, index + 1)
        return self._look(seq)

    async def events(self) -> AsyncIterator[ring.Record]:
        """The durable events that wait for the consumer, oldest first, read from the mapped memory."""
        read_in = range(0)
        for seq in self._pending():
            index = seq % self.geometry.slot_count
            if index not in read_in:
                read_in = range(index, min(index + SLOTS_PER_STEP, self.geometry.slot_count))
                await self._read_in(read_in.start, read_in.stop)
            record = self._look(seq)
            if record is not None:
                yield record

    def _look(self, seq: int) -> ring.Record | None:
        entry = self._by_seq.get(seq)
        if entry is None:  # consumed, and its slot used again, while its pages were read in
            return None
        offset = self.geometry.slot_offset(seq)
        record = ring.unpack_record(self.memory.view[offset : offset + entry.record_bytes])
        if record is None or record.seq != seq:
            raise ring.RingDamagedError(f"record {seq} is not in its slot any more")
        return record

    async def consume(self, through: int) -> None:
        """Give the slots of all events up to `through` free.

        **Durability**: when this returns, they are not delivered again. No slot is used again before that.
        """
        if through > self.durable_seq:
            # Numbers are given before the write: to pass one in flight would lose an event that is answered later.
            raise NotDurableYetError(f"durable up to {self.durable_seq}")
        await asyncio.shield(self._start(self._consume(through)))

    async def _consume(self, through: int) -> None:
        async with self._mark_lock:
            if (cause := self.failed) is not None:
                raise InboxFailedError("an earlier write failed") from cause
            if through > self.consumed:
                mark = ring.Mark(self._mark.serial + 1, through)
                await self._copy(mark.offset, ring.pack_mark(mark))
                self._mark = mark

    async def aclose(self) -> None:
        """Wait for the writes that were begun. The map is closed by who opened it."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _entry(record: ring.Record) -> _Entry:
    size = ring.RECORD_OVERHEAD_BYTES + len(record.event_id.encode()) + len(record.body)
    return _Entry(record.seq, record.event_id, len(record.body), zlib.crc32(record.body), size)
