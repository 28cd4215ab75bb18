"""Was every acknowledgement true? Proved from a record of the calls, for a seeded workload of everything at once.

A killed process shows nothing about power cuts: with every sync call taken out it would still find its bytes. So the
record is asked instead: for each acknowledgement there must be a sync that succeeded, began after the bytes were in
place, ended before the acknowledgement, and covered them all. The checker, `unproven`, is a pure function over events;
its own tests hand it doctored records that it must refuse.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import mmap
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

import apmem2

if TYPE_CHECKING:
    from conftest import Faults, Recorder

PAGE = mmap.PAGESIZE
EVERYTHING = (0, 1 << 63)


class Call(Protocol):
    """What the checker looks at in an event of the recorder."""

    begun: int
    ended: int
    name: str
    result: int
    object: int
    offset: int
    size: int


@dataclass(frozen=True)
class Area:
    """A mapping: which bytes of which file lie at which addresses."""

    address: int
    length: int
    offset: int
    inode: int


@dataclass(frozen=True)
class Acknowledgement:
    """[offset, offset + size) of a file was called durable.

    placed: a mark before which the bytes were stored; with `written` they were put in place by the core at some moment
    after it. acknowledged: a mark after the call had returned. asked: through an adopted mapping, so that the file's
    own description must have been asked as well (law 13).
    """

    placed: int
    acknowledged: int
    inode: int
    offset: int
    size: int
    written: bool = False
    asked: bool = False


Range = tuple[int, int]


@dataclass(frozen=True)
class Together:
    """Pages whose writing was waited for, and a sync of the same file after that: one call, as it were.

    So it is on file systems whose sync of any page commits and flushes for all that was written back before.
    """

    begun: int
    ended: int


class Span(Protocol):
    """From when to when."""

    @property
    def begun(self) -> int: ...
    @property
    def ended(self) -> int: ...


def _without(ranges: list[Range], cut: Range) -> list[Range]:
    left: list[Range] = []
    for begin, end in ranges:
        if cut[1] <= begin or end <= cut[0]:
            left.append((begin, end))
            continue
        if begin < cut[0]:
            left.append((begin, cut[0]))
        if cut[1] < end:
            left.append((cut[1], end))
    return left


def _in_file(call: Call, areas: Iterable[Area], rounding: int) -> list[Range]:
    """The bytes of the file that a call on addresses covered."""
    found: list[Range] = []
    for area in areas:
        first = area.address // rounding * rounding
        last = -(-(area.address + area.length) // rounding) * rounding
        begin, end = max(call.offset, first), min(call.offset + call.size, last)
        if area.inode == call.object and begin < end:
            shift = area.offset - area.address
            found.append((begin + shift, end + shift))
    return found


def unproven(
    events: Iterable[Call],
    acknowledgements: Sequence[Acknowledgement],
    areas: Sequence[Area],
    descriptors: Mapping[int, int] | None = None,
) -> list[Acknowledgement]:
    """The acknowledgements without a proof in the record. descriptors: inode by descriptor, of whole-file syncs."""
    events = sorted(events, key=lambda call: call.begun)
    syncs: dict[int, list[tuple[Span, Range]]] = {}
    written: dict[int, list[Call]] = {}
    durable_writes: dict[int, list[tuple[Call, Range]]] = {}
    plain_writes: dict[int, list[tuple[Call, Range]]] = {}
    questions: dict[int, list[Call]] = {}
    for call in events:
        if call.result < 0:
            continue
        if call.name == "msync":
            for earlier in written.pop(call.object, []):
                if earlier.ended < call.begun:
                    together = Together(earlier.begun, call.ended)
                    syncs.setdefault(call.object, []).append(
                        (together, (earlier.offset, earlier.offset + earlier.size))
                    )
                else:
                    written.setdefault(call.object, []).append(earlier)
            syncs.setdefault(call.object, []).extend((call, found) for found in _in_file(call, areas, PAGE))
        elif call.name in ("fdatasync", "fsync"):
            inode = (descriptors or {}).get(call.object, -1)
            syncs.setdefault(inode, []).append((call, EVERYTHING))
            questions.setdefault(inode, []).append(call)
        elif call.name == "sync_file_range":
            questions.setdefault(call.object, []).append(call)
        elif call.name == "range_written":
            written.setdefault(call.object, []).append(call)
        elif call.name == "pwrite_dsync":
            durable_writes.setdefault(call.object, []).append((call, (call.offset, call.offset + call.result)))
        elif call.name == "pwrite":
            plain_writes.setdefault(call.object, []).append((call, (call.offset, call.offset + call.result)))
        elif call.name == "store":
            plain_writes.setdefault(call.object, []).extend((call, found) for found in _in_file(call, areas, 1))

    def proven(told: Acknowledgement) -> bool:
        left = [(told.offset, told.offset + told.size)]
        within = [
            (call, found)
            for call, found in syncs.get(told.inode, [])
            if told.placed < call.begun and call.ended < told.acknowledged
        ]
        if told.asked and not any(
            told.placed < call.begun and call.ended < told.acknowledged for call in questions.get(told.inode, [])
        ):
            return False
        if not told.written:
            for _, found in within:
                left = _without(left, found)
            return not left
        for write, found in durable_writes.get(told.inode, []):
            if told.placed < write.begun and write.ended < told.acknowledged:
                left = _without(left, found)
        for write, found in plain_writes.get(told.inode, []):
            for sync, synced in within:
                if told.placed < write.begun and write.ended < sync.begun:
                    left = _without(left, (max(found[0], synced[0]), min(found[1], synced[1])))
        return not left

    return [told for told in acknowledgements if not proven(told)]


# ---- the workload ----

FILE_SIZE = 48 * PAGE
CHUNK = 512  # of a file: one act each, never used twice, so that no act can stand in for another
TASKS = 24
ACTS = ("persist", "flush", "memcpy", "nodrain", "noflush", "memset", "large")


class Workload:
    """Many tasks on several maps of several files, some of them cancelled; remembers what was acknowledged."""

    def __init__(self, recorder: Recorder, seed: int) -> None:
        self.recorder = recorder
        self.random = random.Random(seed)
        self.acknowledged: list[Acknowledgement] = []
        self.content: list[tuple[int, int, bytes]] = []
        self.cancelled = 0
        self.maps: list[tuple[apmem2.Map, int, int]] = []  # map, its offset in the file, inode
        self.areas: list[Area] = []
        self.free: dict[int, list[int]] = {}  # chunks that nobody used, by inode

    def add(self, m: apmem2.Map, offset: int, inode: int) -> None:
        """A map of the file from offset on."""
        self.maps.append((m, offset, inode))
        self.areas.append(Area(m.address, m.size, offset, inode))
        self.free[inode] = list(range(0, FILE_SIZE, CHUNK))

    def _take(self) -> tuple[apmem2.Map, int, int, int]:
        """A map, a chunk of its file that nobody had: (map, offset in the map, offset in the file, inode)."""
        while True:
            m, shift, inode = self.random.choice(self.maps)
            chunks = [at for at in self.free[inode] if shift <= at and at + CHUNK <= shift + m.size]
            if chunks:
                at = self.random.choice(chunks)
                self.free[inode].remove(at)
                return m, at - shift, at, inode

    async def act(self, kind: str) -> None:
        """One thing that ends with an acknowledgement."""
        m, at, in_file, inode = self._take()
        value = self.random.randrange(1, 256)
        data = bytes([value]) * CHUNK
        adopted = bool(m.pointer.adopted)
        mark = self.recorder.mark
        written = kind in ("memcpy", "memset", "nodrain")
        if kind == "persist":
            m[at : at + CHUNK] = data
            placed = mark()
            await m.persist(at, CHUNK)
        elif kind == "flush":
            m[at : at + CHUNK] = data
            placed = mark()
            await m.flush(at, CHUNK)
            await m.drain()
        elif kind == "noflush":
            await m.memcpy(at, data, apmem2.MemFlags.NOFLUSH)
            placed = mark()
            await m.persist(at, CHUNK)
        elif kind == "large":  # everything stored so far by this map, at once
            m[at : at + CHUNK] = data
            placed = mark()
            await m.persist()
        else:
            placed = mark()
            if kind == "memcpy":
                await m.memcpy(at, bytearray(data))
            elif kind == "memset":
                await m.memset(at, value, CHUNK)
            else:
                await m.memcpy(at, data, apmem2.MemFlags.NODRAIN)
                await m.drain()
        durable_write = kind in ("memcpy", "memset") and bool(m.pointer.by_pwrite)
        self.acknowledged.append(
            Acknowledgement(placed, mark(), inode, in_file, CHUNK, written, adopted and not durable_write)
        )
        self.content.append((inode, in_file, data))

    async def task(self, acts: int) -> None:
        """Some acts, one after the other; every sixth is cancelled after a few turns of the loop."""
        for _ in range(acts):
            kind = self.random.choice(ACTS)
            if self.random.randrange(6):
                await self.act(kind)
                continue
            doomed = asyncio.ensure_future(self.act(kind))
            for _ in range(self.random.randrange(6)):
                await asyncio.sleep(0)
            doomed.cancel()
            with suppress(asyncio.CancelledError):
                await doomed
            self.cancelled += doomed.cancelled()


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), FILE_SIZE)


def _contents(directory: Path) -> dict[int, bytes]:
    return {path.stat().st_ino: path.read_bytes() for path in directory.iterdir()}


async def run_workload(directory: Path, recorder: Recorder, seed: int, acts: int = 10) -> Workload:
    """Three files, each with two owned maps and an adopted one, and TASKS tasks on them."""
    work = Workload(recorder, seed)
    memories: list[mmap.mmap] = []
    for number in range(3):
        path = directory / f"file{number}"
        whole = await apmem2.open(path, size=FILE_SIZE)
        part = await apmem2.map_new(
            apmem2.Source.from_path(path), required_granularity=apmem2.Granularity.PAGE, offset=8 * PAGE
        )
        memory = _mapped(path)
        memories.append(memory)
        adopted = await apmem2.map_from_existing(memoryview(memory)[16 * PAGE :])
        inode = path.stat().st_ino
        work.add(whole, 0, inode)
        work.add(part, 8 * PAGE, inode)
        work.add(adopted, 16 * PAGE, inode)
    await asyncio.gather(*(work.task(acts) for _ in range(TASKS)))
    maps, work.maps = work.maps, []
    for m, _, _ in maps:
        await m.aclose()
    for memory in memories:
        memory.close()
    return work


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_every_acknowledgement_of_a_mixed_workload_has_its_sync(
    directory: Path, recorder: Recorder, seed: int
) -> None:
    work = await run_workload(directory, recorder, seed)
    events, areas = recorder.events(), work.areas
    assert len(work.acknowledged) > 100
    assert work.cancelled, "nothing was cancelled: the workload is not what it says"
    assert unproven(events, work.acknowledged, areas) == []
    files = _contents(directory)
    for inode, at, data in work.content:
        assert files[inode][at : at + len(data)] == data
    # Negative controls: the same record without one kind of proof must not convince.
    without_msync = [event for event in events if event.name != "msync"]
    assert unproven(without_msync, work.acknowledged, areas)
    without_dsync = [event for event in events if event.name != "pwrite_dsync"]
    assert unproven(without_dsync, work.acknowledged, areas)
    without_ranges = [event for event in events if event.name != "range_written"]
    assert unproven(without_ranges, work.acknowledged, areas)
    without_question = [event for event in events if event.name != "sync_file_range"]
    assert unproven(without_question, work.acknowledged, areas)


@pytest.mark.asyncio
async def test_the_proof_holds_where_there_is_no_synchronous_write(
    directory: Path, recorder: Recorder, faults: Faults
) -> None:
    faults.fail("pwrite_dsync", errno.EOPNOTSUPP, count=1 << 30)
    work = await run_workload(directory, recorder, 99, acts=5)
    events, areas = recorder.events(), work.areas
    assert unproven(events, work.acknowledged, areas) == []
    assert unproven([e for e in events if e.name != "msync"], work.acknowledged, areas)


# ---- the checker itself ----


@dataclass(frozen=True)
class Doctored:
    """An event that never was."""

    begun: int
    ended: int
    name: str
    result: int
    object: int
    offset: int
    size: int


INODE = 7
MAP = Area(0x10000 * PAGE, 8 * PAGE, 2 * PAGE, INODE)
STORED = Acknowledgement(10, 20, INODE, 3 * PAGE + 100, PAGE)  # pages 3 and 4 of the file, 1 and 2 of the map
SYNC = Doctored(11, 12, "msync", 0, INODE, MAP.address + PAGE, 2 * PAGE)


def _proves(told: Acknowledgement, *events: Doctored, descriptors: dict[int, int] | None = None) -> bool:
    return unproven(events, [told], [MAP], descriptors) == []


def test_the_checker_accepts_a_sync_of_all_the_pages_in_time() -> None:
    assert _proves(STORED, SYNC)
    halves = [dataclasses.replace(SYNC, size=PAGE), dataclasses.replace(SYNC, offset=SYNC.offset + PAGE, size=PAGE)]
    assert _proves(STORED, *halves)


@pytest.mark.parametrize(
    "change",
    [
        {"begun": 9},  # too early: it may have missed the bytes
        {"begun": 10, "ended": 11},
        {"ended": 20},  # not over when it was acknowledged
        {"ended": 21},
        {"size": PAGE},  # too short
        {"offset": SYNC.offset + PAGE, "size": PAGE},
        {"offset": SYNC.offset - PAGE},
        {"result": -5},  # failed
        {"object": INODE + 1},  # another file
        {"name": "sync_file_range"},  # which syncs nothing that can be relied on
        {"name": "pwrite_dsync", "offset": 3 * PAGE, "size": 2 * PAGE, "result": 2 * PAGE},  # of other bytes
    ],
)
def test_the_checker_refuses_a_sync_that_proves_nothing(change: dict[str, int]) -> None:
    assert not _proves(STORED, dataclasses.replace(SYNC, **change))  # type: ignore[arg-type]


def test_the_checker_refuses_an_acknowledgement_without_any_sync() -> None:
    assert not _proves(STORED)


def test_the_checker_takes_a_whole_file_sync_of_that_file_only() -> None:
    whole = Doctored(11, 12, "fdatasync", 0, 5, 0, 0)
    assert _proves(STORED, whole, descriptors={5: INODE})
    assert not _proves(STORED, whole, descriptors={5: INODE + 1})
    assert not _proves(STORED, whole)


def test_the_checker_takes_a_synchronous_write_for_a_copy_if_it_was_whole() -> None:
    told = dataclasses.replace(STORED, written=True)
    write = Doctored(11, 12, "pwrite_dsync", PAGE, INODE, told.offset, PAGE)
    assert _proves(told, write)
    assert not _proves(told, dataclasses.replace(write, result=PAGE - 1)), "it was cut short"
    assert not _proves(told, dataclasses.replace(write, begun=9)), "it was somebody else's"
    assert not _proves(told, dataclasses.replace(write, name="pwrite")), "it was not durable"


def test_the_checker_wants_the_sync_of_a_plain_write_after_that_write() -> None:
    told = dataclasses.replace(STORED, written=True)
    write = Doctored(11, 12, "pwrite", PAGE, INODE, told.offset, PAGE)
    sync = dataclasses.replace(SYNC, begun=13, ended=14)
    assert _proves(told, write, sync)
    assert not _proves(told, sync), "nothing was written"
    assert not _proves(told, dataclasses.replace(write, ended=13), sync), "the sync began before the write was over"
    assert not _proves(told, dataclasses.replace(write, result=PAGE - 1), sync), "a byte was never written"


def test_the_checker_takes_pages_that_were_written_with_a_later_sync_of_the_file() -> None:
    write = Doctored(11, 12, "range_written", 0, INODE, 3 * PAGE, 2 * PAGE)
    other = dataclasses.replace(SYNC, begun=13, ended=14, offset=MAP.address + 5 * PAGE, size=PAGE)
    assert _proves(STORED, write, other)
    assert not _proves(STORED, write), "it is in the device's cache only"
    assert not _proves(STORED, other), "another page"
    assert not _proves(STORED, write, dataclasses.replace(other, begun=12)), "the flush may have come before the write"
    assert not _proves(STORED, write, dataclasses.replace(other, object=INODE + 1)), "another file"
    assert not _proves(STORED, write, dataclasses.replace(other, result=-5)), "it failed"
    assert not _proves(STORED, write, dataclasses.replace(other, ended=20)), "not over when it was acknowledged"
    assert not _proves(STORED, dataclasses.replace(write, begun=9), other), "it may have missed the bytes"
    assert not _proves(STORED, dataclasses.replace(write, size=PAGE), other), "too short"
    assert not _proves(STORED, dataclasses.replace(write, result=-5), other), "it failed"


def test_the_checker_wants_the_files_own_description_asked_for_an_adopted_map() -> None:
    told = dataclasses.replace(STORED, asked=True)
    question = Doctored(13, 14, "sync_file_range", 0, INODE, 0, 1)
    assert _proves(told, SYNC, question)
    assert not _proves(told, SYNC)
    assert not _proves(told, SYNC, dataclasses.replace(question, result=-5))
    assert not _proves(told, SYNC, dataclasses.replace(question, ended=20))
