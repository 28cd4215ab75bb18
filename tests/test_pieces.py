"""Long work goes piece by piece: it can be watched and cancelled, and small work of the same file comes in between."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import apmem2
from apmem2.core.pieces import PIECE, in_pieces
from tests.conftest import Faults, Recorder

PAGE = mmap.PAGESIZE
SIZE = 4 * PIECE + 12_345
Ask = Callable[..., Awaitable[None]]
ASKS: dict[str, Callable[[apmem2.Map], Ask]] = {
    "persist": lambda m: lambda **more: m.persist(**more),
    "memcpy": lambda m: lambda **more: m.memcpy(0, bytes(SIZE), **more),
    "memset": lambda m: lambda **more: m.memset(0, 7, SIZE, **more),
    "populate": lambda m: lambda **more: m.populate(**more),
}


async def opened(directory: Path) -> apmem2.Map:
    return await apmem2.open(directory / "a", size=SIZE, sparse=True)


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", ASKS)
async def test_progress_goes_up_to_all_of_it(directory: Path, ask: str) -> None:
    told: list[tuple[int, int]] = []
    async with await opened(directory) as m:
        await ASKS[ask](m)(on_progress=lambda done, size: told.append((done, size)))
    assert {size for _, size in told} == {SIZE}
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert done[0] == PIECE
    assert done[-1] == SIZE


@pytest.mark.asyncio
async def test_progress_of_short_work_is_told_once(directory: Path) -> None:
    told: list[tuple[int, int]] = []
    async with await opened(directory) as m:
        for work in (
            m.persist(5, 100, on_progress=lambda *now: told.append(now)),
            m.memcpy(5, b"x" * 100, on_progress=lambda *now: told.append(now)),
            m.memset(5, 1, 100, on_progress=lambda *now: told.append(now)),
        ):
            await work
    assert told == [(100, 100)] * 3


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", ASKS)
async def test_an_exception_of_the_callback_ends_the_work_there(directory: Path, ask: str) -> None:
    calls = 0

    def enough(done: int, size: int) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("enough")

    async with await opened(directory) as m:
        with pytest.raises(RuntimeError, match="enough"):
            await ASKS[ask](m)(on_progress=enough)
    assert calls == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("ask", "call"), [("persist", "msync"), ("memcpy", "pwrite_dsync"), ("memset", "pwrite_dsync")]
)
async def test_cancelled_between_pieces_no_further_one_is_begun(
    directory: Path, faults: Faults, recorder: Recorder, ask: str, call: str
) -> None:
    m = await opened(directory)
    inode = (directory / "a").stat().st_ino
    faults.hold(call)
    doomed = asyncio.ensure_future(ASKS[ask](m)())
    await faults.held()
    doomed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doomed
    assert m.statistics().in_flight == 1, "the piece under way goes on"
    faults.release()
    await m.aclose()
    place = m.address if call == "msync" else 0
    touched = [event.offset - place for event in recorder.events() if event.name == call and event.object == inode]
    assert touched
    assert max(touched) < PIECE


@pytest.mark.asyncio
async def test_a_small_persist_waits_for_one_piece_of_a_long_one(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    async with await opened(directory) as m:
        faults.hold("msync")
        long = asyncio.ensure_future(m.persist())
        await faults.held()
        small = asyncio.ensure_future(m.persist(0, 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        faults.release()
        await asyncio.gather(long, small)
        syncs = [event for event in recorder.events() if event.name == "msync"]
        mine = next(event.begun for event in syncs if event.size == PAGE)
        assert mine < min(event.begun for event in syncs if event.offset >= m.address + PIECE)


@pytest.mark.asyncio
async def test_a_small_persist_waits_for_one_piece_of_long_flushes(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    """They are all accepted before it; the round that it joins takes one of them only."""
    async with await opened(directory) as m:
        faults.hold("msync")
        await m.flush()
        await faults.held()
        small = asyncio.ensure_future(m.persist(0, 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert m.statistics().in_flight == 6
        faults.release()
        await small
        await m.drain()
        calls = [event for event in recorder.events() if event.name in ("msync", "range_written")]
        mine = max(event.ended for event in calls if event.size == PAGE)
        places = [event.offset - (m.address if event.name == "msync" else 0) for event in calls]
        later = [event for event, at in zip(calls, places, strict=True) if 2 * PIECE <= at < 4 * PIECE]
        assert later
        assert mine < min(event.begun for event in later)


@pytest.mark.asyncio
async def test_a_long_copy_arrives_whole(directory: Path) -> None:
    data = os.urandom(1 << 20) * 33
    async with await apmem2.open(directory / "a", size=len(data) + 1000, sparse=True) as m:
        await m.memcpy(999, data)
        assert m[999 : 999 + len(data)] == data
        assert m[:999] == bytes(999)
        await m.memcpy(1, memoryview(data)[1:])
        assert m[1 : len(data)] == data[1:]


@pytest.mark.asyncio
@pytest.mark.parametrize("shift", [PIECE // 2, -PIECE // 2, 3 * PIECE // 2, 100])
@pytest.mark.parametrize("through", ["its view", "another map", "a mapping of somebody else's"])
async def test_a_long_copy_of_overlapping_bytes_arrives_whole(directory: Path, shift: int, through: str) -> None:
    """Cut into pieces it would read what it wrote: so it is not."""
    path, length, start = directory / "a", 3 * PIECE, 2 * PIECE
    data = os.urandom(1 << 20) * (length >> 20)
    async with apmem2.open(path, size=8 * PIECE, sparse=True) as m:
        await m.memcpy(start, data)
        memory: Any = None
        other: apmem2.Map | None = None
        if through == "its view":
            source = m[start : start + length]
        elif through == "another map":
            other = await apmem2.map_new(apmem2.Source.from_path(path), required_granularity=apmem2.Granularity.PAGE)
            source = other[start : start + length]
        else:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            source = memoryview(memory)[start : start + length]
        await m.memcpy(start + shift, source)
        assert m[start + shift : start + shift + length] == data
        source.release()
        if other is not None:
            await other.aclose()
        if memory is not None:
            memory.close()


@pytest.mark.asyncio
async def test_pieces_cover_everything_once_and_in_order() -> None:
    done: list[tuple[int, int]] = []

    def work(offset: int, size: int) -> None:
        done.append((offset, size))

    await in_pieces(17, 5 * PIECE + 3, work, None)
    assert done[0] == (17, PIECE)
    place = 17
    for offset, size in done:
        assert offset == place
        place += size
    assert place == 17 + 5 * PIECE + 3
    assert len(done) < 5, "what is done at once is done in larger pieces"
    done.clear()
    await in_pieces(0, 3 * PIECE, work, None, grow=False)
    assert [size for _, size in done] == [PIECE] * 3
    await in_pieces(0, 0, work, None)
    assert len(done) == 3
