"""Who learns of a failed sync, and what happens after it? Laws 2, 4, 8 and 13, with planted failures and gates.

A failed sync fails the *file*: every waiter of its round and every map of it in the process, until all are closed and
it is opened anew past the page cache. What was refused before a byte reached the page cache is its caller's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apmem2
from apmem2.native import lib

if TYPE_CHECKING:
    from conftest import Faults, Recorder

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE
ALWAYS = 1 << 30
SYNCS = ("msync", "pwrite_dsync", "fdatasync", "fsync", "sync_file_range", "pwrite")
BY_PATH = apmem2.Granularity.PAGE


async def forget() -> None:
    """Let go of past exceptions: the loop holds the last one until its next turn, a cycle until it is collected."""
    await asyncio.sleep(0)
    gc.collect()


async def close(m: apmem2.Map) -> None:
    """Close a map whose flush failed: whoever closes it may be told again."""
    with contextlib.suppress(apmem2.PersistError):
        await m.aclose()
    assert m.closed


async def in_flight(count: int) -> None:
    """Wait until the pool has accepted so many jobs that have not ended."""
    while apmem2.statistics().in_flight < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


def inode_of(path: Path) -> int:
    return path.stat().st_ino


def make_pages(path: Path, pages: int = 16) -> None:
    path.write_bytes(b"o" * (pages * PAGE))


def map_file(path: Path) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def second_map(path: Path) -> Any:
    return apmem2.map_new(apmem2.Source.from_path(path), required_granularity=BY_PATH)


async def fail(faults: Faults, m: apmem2.Map, number: int = errno.EIO) -> apmem2.PersistError:
    """Let the next sync of m fail."""
    faults.fail("msync", number)
    with pytest.raises(apmem2.PersistError) as caught:
        await m.persist(0, 1)
    assert caught.value.errno == number
    faults.clear()
    return caught.value


def assert_failed(error: BaseException, number: int = errno.EIO) -> None:
    assert isinstance(error, apmem2.MapFailedError)
    assert isinstance(error.__cause__, apmem2.PmemError)
    assert error.__cause__.errno == number  # type: ignore[attr-defined]


# ---- who learns of it ----


@pytest.mark.asyncio
async def test_a_failed_sync_reaches_every_waiter_of_its_round(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m, second_map(directory / "a") as other:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, PAGE))
        await faults.held()
        waiting = [asyncio.ensure_future((m, other)[i % 2].persist(i * PAGE, PAGE)) for i in range(1, 16)]
        await in_flight(16)
        faults.fail("msync", errno.EIO, nth=2)  # the gate holds a call before it is counted: the first round's is 1
        faults.release()
        await first
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        for error in errors:
            assert type(error) is apmem2.PersistError
            assert error.errno == errno.EIO
            assert error.filename == str(directory / "a")


@pytest.mark.asyncio
async def test_the_copies_of_a_round_whose_sync_failed_are_not_acknowledged(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, PAGE))
        await faults.held()
        waiting: list[Awaitable[None]] = [
            asyncio.ensure_future(m.memcpy(PAGE, b"x" * 100)),
            asyncio.ensure_future(m.memset(3 * PAGE, 1, 100)),
            asyncio.ensure_future(m.persist(5 * PAGE, 1)),
        ]
        await in_flight(4)
        faults.fail("msync", errno.EIO, nth=2)
        faults.release()
        await first
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert type(error) is apmem2.PersistError


@pytest.mark.asyncio
async def test_every_map_and_call_of_a_failed_file_raises_its_first_failure(directory: Path, faults: Faults) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m, second_map(path) as other:
        memory = map_file(path)
        adopted = await apmem2.map_from_existing(memory)
        assert m.failed is None
        first = await fail(faults, m)
        for found in (m, other, adopted):
            calls: list[Callable[[], Awaitable[None]]] = [
                lambda found=found: found.persist(0, 1),
                lambda found=found: found.flush(0, 1),
                lambda found=found: found.memcpy(0, b"x"),
                lambda found=found: found.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH),
                lambda found=found: found.memset(0, 1, 1),
            ]
            for call in calls:
                with pytest.raises(apmem2.MapFailedError) as caught:
                    await call()
                assert str(caught.value.__cause__) == str(first)
                assert caught.value.filename == str(path)
            assert str(found.failed) == str(first)
        await adopted.aclose()
        memory.close()


@pytest.mark.asyncio
async def test_a_failed_file_cannot_be_mapped_again_while_a_map_of_it_lives(directory: Path, faults: Faults) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        await fail(faults, m)
        memory = map_file(path)
        with open_file(path) as file:
            for opening in (
                apmem2.open(path),
                second_map(path),
                apmem2.map_new(apmem2.Source.from_fd(file.fileno()), required_granularity=BY_PATH),
                apmem2.map_from_existing(memory),
                apmem2.map_from_existing(memory, source=apmem2.Source.from_path(path)),
            ):
                with pytest.raises(apmem2.MapFailedError) as caught:
                    await opening
                assert_failed(caught.value)
                del opening, caught
        await forget()  # the buffer is held by the opener's arguments, and those by the traceback
        memory.close()


def open_file(path: Path) -> Any:
    return open(path, "r+b")


@pytest.mark.asyncio
async def test_another_task_and_another_loop_in_another_thread_learn_of_it(directory: Path, faults: Faults) -> None:
    path = directory / "a"
    seen: list[BaseException] = []

    async def elsewhere(m: apmem2.Map) -> None:
        try:
            await m.persist(PAGE, 1)
        except apmem2.PmemError as error:
            seen.append(error)
        try:
            await second_map(path)
        except apmem2.PmemError as error:
            seen.append(error)

    async with apmem2.open(path, size=SIZE) as m:
        await fail(faults, m)
        await asyncio.create_task(elsewhere(m))
        thread = threading.Thread(target=lambda: asyncio.run(elsewhere(m)))
        thread.start()
        await asyncio.get_running_loop().run_in_executor(None, thread.join)
        assert len(seen) == 4
        for error in seen:
            assert_failed(error)


@pytest.mark.asyncio
async def test_a_failure_is_the_files_alone(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m, apmem2.open(directory / "b", size=SIZE) as other:
        await fail(faults, m)
        await other.persist(0, PAGE)
        await other.memcpy(0, b"x")
        assert other.failed is None
        assert m.failed is not None


@pytest.mark.asyncio
async def test_a_failed_flush_is_raised_by_the_drain(directory: Path, faults: Faults) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.fail("msync", errno.ENOSPC)
    await m.flush(0, PAGE)
    with pytest.raises(apmem2.PersistError) as caught:
        await m.drain()
    assert caught.value.errno == errno.ENOSPC
    assert m.failed is not None
    with pytest.raises((apmem2.MapFailedError, apmem2.PersistError)):
        await m.drain()  # never ok again
    await close(m)


@pytest.mark.asyncio
async def test_a_failed_flush_that_nobody_drained_is_raised_by_aclose(directory: Path, faults: Faults) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.fail("msync", errno.EIO)
    await m.flush(0, PAGE)
    with pytest.raises(apmem2.PersistError) as caught:
        await m.aclose()
    assert caught.value.errno == errno.EIO
    assert m.closed
    assert m.failed is not None
    await m.aclose()


@pytest.mark.asyncio
async def test_an_aclose_that_raises_returns_after_the_unmapping_as_well(directory: Path, faults: Faults) -> None:
    """Or the file could not be opened anew at once: one of its maps would still be there."""
    path = directory / "a"
    async with apmem2.open(directory / "b", size=SIZE) as other:
        m = await apmem2.open(path, size=SIZE)
        faults.fail("msync", errno.EIO)
        await m.flush(0, PAGE)
        faults.hold("munmap", inode_of(path))
        closing = asyncio.ensure_future(m.aclose())
        await faults.held()
        await other.memcpy(0, b"x")  # there and back again: whatever could have ended has ended
        await other.persist(0, 1)
        early = closing.done()
        faults.release()
        with pytest.raises(apmem2.PersistError):
            await closing
        assert not early
        faults.clear()
        async with apmem2.open(path):
            pass


@pytest.mark.asyncio
async def test_a_failed_nodrain_copy_is_raised_by_the_drain(directory: Path, faults: Faults) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.fail("msync", errno.EIO)
    await m.memcpy(0, b"x", apmem2.MemFlags.NODRAIN)
    with pytest.raises(apmem2.PersistError):
        await m.drain()
    await close(m)


@pytest.mark.asyncio
async def test_nothing_is_synced_or_written_for_a_failed_file(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m, second_map(path) as other:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()
        queued = [asyncio.ensure_future(other.persist(PAGE, 1)), asyncio.ensure_future(other.memcpy(0, b"x"))]
        await in_flight(3)  # accepted before the failure, for the round after it
        faults.fail("msync", errno.EIO)
        faults.release()
        results = await asyncio.gather(first, *queued, return_exceptions=True)
        failed_at = recorder.mark()
        assert type(results[0]) is apmem2.PersistError
        for error in results[1:]:
            assert_failed(error)  # type: ignore[arg-type]
        faults.clear()
        for found in (m, other):
            with pytest.raises(apmem2.MapFailedError):
                await found.persist()
            with pytest.raises(apmem2.MapFailedError):
                await found.memcpy(0, b"x")
            with pytest.raises(apmem2.MapFailedError):
                await found.drain()
    msyncs = [event for event in recorder.events() if event.name == "msync"]
    assert [event.result for event in msyncs] == [-errno.EIO]
    later = [event for event in recorder.events() if event.name in SYNCS and event.begun > failed_at]
    assert later == []
    assert not any(event.name == "pwrite_dsync" for event in recorder.events())


@pytest.mark.asyncio
async def test_a_kept_exception_does_not_keep_the_memory_mapped(directory: Path, faults: Faults) -> None:
    """Its traceback has the frames of the calls; none of them may hold the map's memory (aclose would warn)."""
    kept: list[BaseException] = []
    async with apmem2.open(directory / "a", size=SIZE) as m:
        kept.append(await fail(faults, m))
        for call in (m.persist, m.drain):
            with pytest.raises(apmem2.MapFailedError) as caught:
                await call()
            kept.append(caught.value)
    with pytest.raises(apmem2.ClosedError) as closed:
        await m.persist()
    assert closed.value is not None
    assert len(kept) == 3


# ---- which errors latch ----


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EFAULT])
async def test_a_plain_write_that_fails_is_its_callers_alone(directory: Path, faults: Faults, number: int) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m, second_map(directory / "a") as other:
        faults.fail("pwrite", number)
        with pytest.raises(apmem2.PersistError) as caught:
            await m.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH)
        assert caught.value.errno == number
        assert m.failed is None
        await m.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH)
        await m.persist(0, 1)
        await other.persist(0, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EFAULT, errno.EFBIG])
async def test_a_synchronous_write_of_unreadable_memory_is_its_callers_alone(
    directory: Path, faults: Faults, number: int
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.fail("pwrite_dsync", number)
        with pytest.raises(apmem2.PersistError) as caught:
            await m.memcpy(0, b"x")
        assert caught.value.errno == number
        assert m.failed is None
        await m.memcpy(0, b"x")


@pytest.mark.asyncio
@pytest.mark.parametrize("flags", [0, apmem2.MemFlags.NOFLUSH, apmem2.MemFlags.NODRAIN])
async def test_a_source_that_lost_its_pages_is_an_efault_for_its_caller_and_nothing_else(
    directory: Path, flags: int
) -> None:
    size = 1 << 20  # above copy_bytes_max: read in the pool
    make_pages(directory / "source", size // PAGE)
    source = map_file(directory / "source")
    os.truncate(directory / "source", PAGE)
    async with apmem2.open(directory / "a", size=size) as m:
        with pytest.raises(apmem2.PersistError) as caught:
            await m.memcpy(0, source, flags)
        assert caught.value.errno == errno.EFAULT
        del caught
        assert m.failed is None
        await m.persist(0, PAGE)
    await forget()  # the exception's traceback holds the call's arguments
    source.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_any_error_of_a_synchronous_write_fails_the_file(directory: Path, faults: Faults, number: int) -> None:
    """It cannot say which half failed: the write, or the sync."""
    async with apmem2.open(directory / "a", size=SIZE) as m, second_map(directory / "a") as other:
        faults.fail("pwrite_dsync", number)
        with pytest.raises(apmem2.PersistError) as caught:
            await m.memcpy(0, b"x")
        assert caught.value.errno == number
        with pytest.raises(apmem2.MapFailedError) as failed:
            await other.persist(0, 1)
        assert str(failed.value.__cause__) == str(caught.value)


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EBUSY])
async def test_any_error_of_a_sync_of_mapped_pages_fails_the_file(directory: Path, faults: Faults, number: int) -> None:
    """ENOMEM too: the kernel's write-back can end with it, and asked again it would say ok."""
    async with apmem2.open(directory / "a", size=SIZE) as m, second_map(directory / "a") as other:
        faults.fail("msync", number)
        with pytest.raises(apmem2.PersistError) as caught:
            await m.persist(0, 1)
        assert caught.value.errno == number
        with pytest.raises(apmem2.MapFailedError):
            await other.persist(0, 1)


@pytest.mark.asyncio
async def test_an_error_that_only_the_files_own_description_is_told_fails_the_file(
    directory: Path, faults: Faults
) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        memory = map_file(path)
        adopted = await apmem2.map_from_existing(memory)
        faults.fail("sync_file_range", errno.EIO)
        with pytest.raises(apmem2.PersistError):
            await adopted.persist(0, 1)
        with pytest.raises(apmem2.MapFailedError):
            await m.persist(0, 1)
        await adopted.aclose()
        memory.close()


@pytest.mark.asyncio
async def test_an_error_of_the_sync_at_growth_fails_the_file(directory: Path, faults: Faults) -> None:
    """The description is the one that the other maps ask: it has told its error, and would tell them ok."""
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        faults.fail("fsync", errno.EIO)
        with pytest.raises(apmem2.OpenError) as caught:
            await apmem2.open(path, size=2 * SIZE, grow=True)
        assert caught.value.errno == errno.EIO
        with pytest.raises(apmem2.MapFailedError):
            await m.persist(0, 1)


@pytest.mark.asyncio
async def test_an_error_of_the_sync_at_opening_is_not_forgotten_by_the_next_opening(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    """The kernel tells it to nobody who opens the file later: the page cache must not be believed."""
    path = directory / "a"
    make_pages(path)
    faults.fail("fsync", errno.EIO)
    with pytest.raises(apmem2.OpenError) as caught:
        await apmem2.open(path)
    assert caught.value.errno == errno.EIO
    faults.clear()
    before = recorder.mark()
    async with apmem2.open(path):
        looked = [event for event in recorder.events() if event.begun > before and event.name == "mincore"]
        assert looked, "the page cache was believed after a failed sync"


@pytest.mark.asyncio
async def test_a_description_for_reading_and_a_later_one_for_writing_share_the_failure(
    directory: Path, faults: Faults
) -> None:
    path = directory / "a"
    make_pages(path)
    faults.fail("open", errno.EACCES)  # the first try, for reading and writing
    with open_file(path) as file:
        reader = await apmem2.map_new(
            apmem2.Source.from_fd(file.fileno()), required_granularity=BY_PATH, protection=apmem2.Protection.READ
        )
    assert not reader.pointer.file.writable
    faults.clear()
    async with reader, apmem2.open(path) as writer:
        assert writer.pointer.file == reader.pointer.file
        assert writer.pointer.file.writable
        first = await fail(faults, writer)
        assert str(reader.failed) == str(first)
        with pytest.raises(apmem2.MapFailedError):
            await reader.persist(0, 1)


# ---- afterwards ----


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["msync", "pwrite_dsync"])
async def test_a_failed_file_works_again_when_all_are_closed_and_its_cache_was_dropped(
    directory: Path, faults: Faults, recorder: Recorder, call: str
) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    other = await second_map(path)
    faults.fail(call, errno.EIO)
    with pytest.raises(apmem2.PersistError):
        await (m.persist(0, 1) if call == "msync" else m.memcpy(0, b"x"))
    faults.clear()
    await m.aclose()
    with pytest.raises(apmem2.MapFailedError):
        await apmem2.open(path)  # one map is left
    await other.aclose()
    before = recorder.mark()
    async with apmem2.open(path) as again:
        names = [event.name for event in recorder.events() if event.begun > before]
        assert names.index("fadvise") < names.index("mincore")
        assert again.failed is None
        await again.memcpy(0, b"again")
        await again.persist()
        async with second_map(path) as one_more:
            assert one_more[:5] == b"again"
    assert m.failed is not None, "what failed stays failed"


HOLDER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
memory[:]
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.mark.asyncio
async def test_a_failed_file_is_refused_while_another_process_keeps_its_pages(directory: Path, faults: Faults) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        await fail(faults, m)
    holder = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"mapped\n"
        for _ in range(2):
            with pytest.raises(apmem2.MapFailedError) as caught:
                await apmem2.open(path)
            assert caught.value.code == apmem2.ErrorCode.CACHE_NOT_DROPPED
            assert_failed(caught.value)
    finally:
        holder.communicate()
    async with apmem2.open(path) as again:
        await again.persist(0, 1)


# ---- rounds: laws 2 and 8 ----


@pytest.mark.asyncio
async def test_a_job_never_joins_a_round_that_has_begun(directory: Path, faults: Faults, recorder: Recorder) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()
        m[1] = 7  # on the very page of the round that runs
        stored = recorder.mark()
        second = asyncio.ensure_future(m.persist(1, 1))
        await in_flight(2)
        faults.release()
        await asyncio.gather(first, second)
    msyncs = sorted((event for event in recorder.events() if event.name == "msync"), key=lambda event: event.begun)
    assert len(msyncs) == 2
    assert msyncs[0].ended < msyncs[1].begun
    assert msyncs[1].begun > stored
    assert {event.object for event in msyncs} == {inode_of(path)}


@pytest.mark.asyncio
async def test_a_file_has_one_round_at_a_time_and_two_files_have_two(directory: Path, faults: Faults) -> None:
    async with (
        apmem2.open(directory / "a", size=SIZE) as a,
        second_map(directory / "a") as same,
        apmem2.open(directory / "b", size=SIZE) as b,
    ):
        faults.hold("msync")
        jobs = [asyncio.ensure_future(a.persist(0, 1))]
        await faults.held(1)
        jobs += [asyncio.ensure_future(same.persist(0, 1)), asyncio.ensure_future(b.persist(0, 1))]
        await faults.held(2)
        await in_flight(3)
        jobs += [asyncio.ensure_future(same.persist(PAGE, 1)), asyncio.ensure_future(b.persist(PAGE, 1))]
        await in_flight(5)
        await a.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH)  # the pool is awake: whatever could begin has begun
        await a.populate(0, PAGE)
        assert apmem2.statistics().oldest_round_s > 0
        held = int(lib.apm_observe_held())
        faults.release()
        await asyncio.gather(*jobs)
        assert held == 2


@pytest.mark.asyncio
async def test_the_syncs_of_one_file_never_overlap(directory: Path, recorder: Recorder) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m, second_map(path) as other:

        async def task(number: int) -> None:
            for turn in range(8):
                found = (m, other)[turn % 2]
                await found.persist(number * PAGE, PAGE)
                await found.memcpy(number * PAGE, b"x")

        await asyncio.gather(*(task(number) for number in range(16)))
    syncs = sorted(
        (event for event in recorder.events() if event.name in ("msync", "pwrite_dsync")),
        key=lambda event: event.begun,
    )
    for before, after in itertools.pairwise(syncs):
        assert before.ended < after.begun


@pytest.mark.asyncio
async def test_a_file_whose_sync_hangs_stops_only_its_own_waiters(directory: Path, faults: Faults) -> None:
    hung = directory / "hung"
    async with apmem2.open(hung, size=SIZE) as m, apmem2.open(directory / "b", size=SIZE) as other:
        faults.hold("msync", inode_of(hung))
        stuck = [asyncio.ensure_future(m.persist(page * PAGE, 1)) for page in range(16)]
        await faults.held()
        for turn in range(20):
            stuck.append(asyncio.ensure_future(m.persist(0, 1)))
            await other.persist(0, PAGE)
            await other.memcpy(PAGE, bytes([turn]))
            async with apmem2.open(directory / f"new{turn}", size=PAGE) as new:
                await new.memset(0, turn, 10)
            async with second_map(hung) as same:  # the file can still be opened, read and stored into
                await same.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH)
        assert lib.apm_observe_held() == 1, "the file holds more than one thread"
        assert not any(job.done() for job in stuck)
        faults.release()
        await asyncio.gather(*stuck)


TWENTY_HUNG = """
import asyncio, sys
from pathlib import Path
import apmem2
from apmem2.native import lib

threads, hung = int(sys.argv[1]), 20
apmem2.configure(threads=threads)

async def main():
    maps = [await apmem2.open(f"hung{i}", size=4096) for i in range(hung)]
    other = await apmem2.open("other", size=8192)
    lib.apm_observe_hold(lib.APM_CALL_MSYNC, 0, 1)
    stuck = [asyncio.ensure_future(m.persist()) for m in maps]
    while lib.apm_observe_held() < min(hung, threads - 3):
        await asyncio.sleep(0)
    for turn in range(10):
        await other.memcpy(0, bytes([turn]), apmem2.MemFlags.NOFLUSH)
        await other.populate()
        async with apmem2.open(f"new{turn}", size=4096) as new:
            if threads - 4 >= hung:
                await new.memcpy(0, b"x")
        if threads - 4 >= hung:
            await other.memcpy(0, bytes([turn]))
    assert not any(job.done() for job in stuck)
    assert lib.apm_observe_held() == min(hung, threads - 3)
    assert apmem2.statistics().threads <= threads
    lib.apm_observe_hold(0, 0, 0)
    await asyncio.gather(*stuck)
    for m in (*maps, other):
        await m.aclose()

asyncio.run(main())
print("done")
"""


@pytest.mark.parametrize("threads", [6, 8, 24])
def test_with_twenty_files_hung_opens_and_copies_go_on(run_program: Any, threads: int) -> None:
    """With n threads the syncs of n - 4 files may hang before another's has to wait; the other lanes never do."""
    assert run_program(TWENTY_HUNG, str(threads)).stdout == "done\n"
