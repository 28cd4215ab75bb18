"""What the core asks of processor and kernel, and in which order: laws 1 and 11, merging, care for the page cache."""

from __future__ import annotations

import asyncio
import mmap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import apmem2
from tests.conftest import Event, Faults, Recorder

PAGE = mmap.PAGESIZE


def between(recorder: Recorder, first: int, last: int) -> list[Event]:
    """Calls that began and ended between two marks, in the order in which they began."""
    found = [event for event in recorder.events() if first < event.begun and event.ended < last]
    return sorted(found, key=lambda event: event.begun)


async def open_lines(path: Path, forced: Callable[[str], None], size: int = 1 << 20) -> apmem2.Map:
    """A map at cache-line granularity, on a medium that has none."""
    forced("CACHE_LINE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", apmem2.DurabilityWarning)
        return await apmem2.open(path, size=size)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [64, 300_000], ids=["inline", "in the pool"])
async def test_the_thread_that_flushed_fences_before_the_persist_returns(
    directory: Path, forced: Callable[[str], None], recorder: Recorder, size: int
) -> None:
    async with await open_lines(directory / "a", forced) as m:
        before = recorder.mark()
        await m.persist(100, size)
        events = between(recorder, before, recorder.mark())
        flushes = [event for event in events if event.name == "flush"]
        covered = {line for event in flushes for line in range(event.offset, event.offset + event.size)}
        assert covered >= set(range(m.address + 100, m.address + 100 + size))
        last = flushes[-1]
        assert any(e.name == "fence" and e.thread == last.thread and e.begun > last.begun for e in events)
        here = threading.get_native_id()
        assert (last.thread == here) == (size == 64)


@pytest.mark.asyncio
async def test_a_flush_is_fenced_without_waiting_for_the_drain(
    directory: Path, forced: Callable[[str], None], recorder: Recorder
) -> None:
    """A fence on another thread, later, would order nothing."""
    async with await open_lines(directory / "a", forced) as m:
        before = recorder.mark()
        await m.flush(0, 64)
        assert [event.name for event in between(recorder, before, recorder.mark())] == ["flush", "fence"]


@pytest.mark.asyncio
async def test_a_copy_without_drain_is_fenced_all_the_same(
    directory: Path, forced: Callable[[str], None], recorder: Recorder
) -> None:
    async with await open_lines(directory / "a", forced) as m:
        before = recorder.mark()
        await m.memcpy(0, b"x" * 200, apmem2.MemFlags.NODRAIN)
        assert between(recorder, before, recorder.mark())[-1].name == "fence"


@pytest.mark.asyncio
async def test_submitting_fences_what_the_caller_stored(directory: Path, recorder: Recorder) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        before = recorder.mark()
        await m.persist(0, 1)
        events = between(recorder, before, recorder.mark())
        here = threading.get_native_id()
        fence = next(event for event in events if event.name == "fence" and event.thread == here)
        assert fence.begun < next(event for event in events if event.name == "msync").begun


async def synced_together(
    directory: Path, faults: Faults, recorder: Recorder, ranges: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Persist all ranges in one round; the (offset, size) that were written back, and of the msync calls after that."""
    async with apmem2.open(directory / "a", size=64 * PAGE) as m:
        faults.hold("msync")
        first = asyncio.create_task(m.persist(0, 1))
        await faults.held()
        rest = [asyncio.create_task(m.persist(*each)) for each in ranges]
        await asyncio.sleep(0)  # the tasks ask
        await asyncio.sleep(0)  # the tick leaves
        before = recorder.mark()
        faults.release()
        await asyncio.gather(first, *rest)
        events = between(recorder, before, recorder.mark())
        calls = [(event.offset - m.address, event.size) for event in events if event.name == "msync"]
        assert calls[0] == (0, PAGE), "the round that was held"
        assert all(event.result == 0 for event in events)
        written = [event for event in events if event.name == "range_written"]
        assert all(event.ended < events[-1].begun for event in written), "an msync follows them"
        return [(event.offset, event.size) for event in written], calls[1:]


@pytest.mark.asyncio
async def test_pages_between_those_that_were_asked_for_are_not_synced(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    """Law 11: they may be somebody's dirty megabytes."""
    ranges = [(10 * PAGE, 1), (12 * PAGE, 1), (40 * PAGE + 5, 10)]
    written, synced = await synced_together(directory, faults, recorder, ranges)
    assert sorted({*written, *synced}) == [(10 * PAGE, PAGE), (12 * PAGE, PAGE), (40 * PAGE, PAGE)]


@pytest.mark.asyncio
async def test_scattered_pages_share_one_sync_that_follows_their_writing(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    """One flush of the device for all of them."""
    ranges = [(page * PAGE, PAGE) for page in range(3, 60, 5)]
    written, synced = await synced_together(directory, faults, recorder, ranges)
    assert len(synced) == 1
    assert sorted({*written, *synced}) == ranges


@pytest.mark.asyncio
async def test_scattered_copies_are_written_plainly_and_share_one_sync(directory: Path, recorder: Recorder) -> None:
    places = [page * PAGE + 100 for page in range(3, 60, 5)]
    async with apmem2.open(directory / "a", size=64 * PAGE) as m:
        before = recorder.mark()
        await asyncio.gather(*(m.memcpy(place, b"x" * 100) for place in places))
        events = between(recorder, before, recorder.mark())
        assert [event.offset for event in events if event.name == "pwrite"] == places
        last_write = max(event.ended for event in events if event.name == "pwrite")
        written = [event for event in events if event.name == "range_written"]
        (sync,) = [event for event in events if event.name == "msync"]
        assert all(last_write < event.begun and event.ended < sync.begun for event in written)
        asked = {page for event in written for page in range(event.offset // PAGE, (event.offset + event.size) // PAGE)}
        assert asked | {(sync.offset - m.address) // PAGE} == {place // PAGE for place in places}
        assert not [event for event in events if event.name == "pwrite_dsync"]


@pytest.mark.asyncio
async def test_adjacent_and_overlapping_pages_are_one_call(directory: Path, faults: Faults, recorder: Recorder) -> None:
    ranges = [(13 * PAGE, 1), (10 * PAGE, 1), (11 * PAGE + 9, 2 * PAGE), (10 * PAGE + 50, 5), (12 * PAGE - 1, 2)]
    assert await synced_together(directory, faults, recorder, ranges) == ([], [(10 * PAGE, 4 * PAGE)])


@pytest.mark.asyncio
async def test_adjacent_copies_of_a_round_are_one_write(directory: Path, faults: Faults, recorder: Recorder) -> None:
    async with apmem2.open(directory / "a", size=64 * PAGE) as m:
        before = recorder.mark()
        await asyncio.gather(*(m.memcpy(64 * place, bytes([place]) * 64) for place in range(100)))
        writes = [e for e in between(recorder, before, recorder.mark()) if e.name == "pwrite_dsync"]
        assert [(event.offset, event.size) for event in writes] == [(0, 6400)]
        assert bytes(m[0:6400]) == b"".join(bytes([place]) * 64 for place in range(100))


@pytest.mark.asyncio
async def test_copies_that_overlap_are_written_in_the_order_of_their_calls(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        await asyncio.gather(m.memcpy(0, b"a" * 100), m.memcpy(50, b"b" * 100), m.memcpy(25, b"c" * 50))
        assert bytes(m[0:150]) == b"a" * 25 + b"c" * 50 + b"b" * 75


@pytest.mark.asyncio
async def test_a_map_is_made_for_small_folios(directory: Path, recorder: Recorder) -> None:
    """Clean pages are dropped before it is mapped, and read-ahead is off before anything can fault."""
    (directory / "a").write_bytes(bytes(64 * PAGE))
    before = recorder.mark()
    async with apmem2.open(directory / "a"):
        names = [event.name for event in between(recorder, before, recorder.mark())]
    assert names[names.index("fadvise") :] == ["fadvise", "mmap", "madvise"]


@pytest.mark.asyncio
async def test_the_cache_is_kept_where_that_is_asked_for(directory: Path, recorder: Recorder) -> None:
    (directory / "a").write_bytes(bytes(64 * PAGE))
    before = recorder.mark()
    async with apmem2.open(directory / "a", keep_cache=True):
        names = [event.name for event in between(recorder, before, recorder.mark())]
    assert "fadvise" not in names


@pytest.mark.asyncio
async def test_a_long_persist_is_synced_in_pieces_that_leave_nothing_out(directory: Path, recorder: Recorder) -> None:
    """One long call made the loops of its process late; a piece that was forgotten would be an acknowledged loss."""
    size = (9 << 20) + 100
    async with apmem2.open(directory / "a", size=size, sparse=True) as m:
        before = recorder.mark()
        await m.persist()
        calls = [event for event in between(recorder, before, recorder.mark()) if event.name == "msync"]
        assert len(calls) > 1
        assert calls[0].size <= 4 << 20
        place = m.address
        for call in calls:
            assert call.offset == place
            place += call.size
        assert place >= m.address + size
