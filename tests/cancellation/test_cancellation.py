"""A cancelled waiter is not a cancelled job (law 6), at every await of every public coroutine.

Gates hold the core at a call, so that a test can stand at each moment: in the list of the tick, queued behind a running
round, running, completed but not yet told, failed. After each, nothing is left over and the next operation works.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import random
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import apmem2
from apmem2.core import mapping, runtime
from apmem2.core.registry import FairLock

pytestmark = pytest.mark.asyncio

PAGE = mmap.PAGESIZE
SIZE = 1 << 20
LARGE = 300_000  # above copy_bytes_max: read in the pool, not at the call
HANG_S = 10  # only tells a hang from work


async def until(true: Callable[[], bool]) -> None:
    """Let the loop turn until something is true."""
    async with asyncio.timeout(HANG_S):
        while not true():  # noqa: ASYNC110 - nobody could set an event
            await asyncio.sleep(0)


async def quiet() -> None:
    """Nothing is in the pool, and no slot of this loop's bridge is taken."""
    bridge = runtime.bridge()
    await until(lambda: apmem2.statistics().in_flight == 0 and not bridge.in_flight())
    assert len(bridge._free) == len(bridge._slots)
    assert not bridge._tick


async def begun(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that has run to its first await: what it asks for is in the list of this tick and has not left."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    return task


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel it, and see it end cancelled although the gate is still shut."""
    task.cancel()
    async with asyncio.timeout(HANG_S):
        with pytest.raises(asyncio.CancelledError):
            await task


async def left(submitted: int) -> None:
    """Wait until more than that many jobs were ever submitted."""
    await until(lambda: apmem2.statistics().submitted > submitted)


def descriptors(path: Path) -> int:
    """How many descriptors of this process are of that file (or of one that never got its name)."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        count += target.startswith(str(path.parent) + "/")
    return count


def mapped(path: Path) -> bool:
    """Does the kernel show a mapping of this file? By number: a file that was made without a name keeps that look."""
    number = str(path.stat().st_ino)
    return any(line.split()[4] == number for line in Path("/proc/self/maps").read_text().splitlines())


Ask = Callable[[apmem2.Map], Coroutine[Any, Any, None]]


async def flush_and_drain(m: apmem2.Map) -> None:
    await m.flush(0, PAGE)
    await m.drain()


# What is asked, and the call of the core at which it can be held.
WORK: dict[str, tuple[str, Ask]] = {
    "persist()": ("msync", lambda m: m.persist()),
    "persist(offset, size)": ("msync", lambda m: m.persist(PAGE, PAGE)),
    "persist(buffer)": ("msync", lambda m: m.persist(m[PAGE : 2 * PAGE])),
    "persist(strided)": ("msync", lambda m: m.persist(m.view[:: 2 * PAGE])),
    "flush and drain": ("msync", flush_and_drain),
    "memcpy small": ("pwrite_dsync", lambda m: m.memcpy(PAGE, b"x" * 64)),
    "memcpy large": ("pwrite_dsync", lambda m: m.memcpy(PAGE, bytearray(b"x" * LARGE))),
    "memcpy NOFLUSH": ("pwrite", lambda m: m.memcpy(PAGE, b"x" * 64, apmem2.MemFlags.NOFLUSH)),
    "memcpy NODRAIN": ("pwrite", lambda m: m.memcpy(PAGE, b"x" * 64, apmem2.MemFlags.NODRAIN)),
    "memmove": ("pwrite_dsync", lambda m: m.memmove(0, m[PAGE : 3 * PAGE])),
    "memset": ("pwrite_dsync", lambda m: m.memset(PAGE, 7, PAGE)),
    "populate": ("madvise", lambda m: m.populate(0, PAGE)),
}
SYNCS = ("msync", "pwrite_dsync", "pwrite", "madvise", "fdatasync", "fsync", "sync_file_range")
of_all_work = pytest.mark.parametrize("what", WORK)


# ---- not yet left the tick -------------------------------------------------------------------------------------------


@of_all_work
async def test_what_is_cancelled_before_it_left_the_tick_is_never_submitted(
    directory: Path, recorder: Any, what: str
) -> None:
    if what == "flush and drain":
        pytest.skip("a flush is accepted at the call")
    async with apmem2.open(directory / "a", size=SIZE) as m:
        await quiet()
        before, seen = apmem2.statistics().submitted, len(recorder.events())
        await cancelled(await begun(WORK[what][1](m)))
        await quiet()
        assert apmem2.statistics().submitted == before
        assert [event for event in recorder.events()[seen:] if event.name in SYNCS] == []
        await m.persist(0, PAGE)


async def test_one_cancelled_in_the_tick_does_not_hold_back_its_neighbours(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        first = asyncio.ensure_future(m.persist(0, 1))
        second = asyncio.ensure_future(m.persist(PAGE, 1))
        third = asyncio.ensure_future(m.persist(2 * PAGE, 1))
        await asyncio.sleep(0)
        before = apmem2.statistics().submitted
        await cancelled(second)
        await asyncio.gather(first, third)
        assert apmem2.statistics().submitted == before + 2
        await quiet()


# ---- queued behind a running round -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["persist(offset, size)", "persist(buffer)", "memcpy small", "memcpy large", "memset"])
async def test_what_is_cancelled_while_a_round_runs_before_it_is_withdrawn(
    directory: Path, recorder: Any, faults: Any, what: str
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.hold("msync")
        running = await begun(m.persist(0, 1))
        await faults.held()
        before = apmem2.statistics()
        queued = await begun(WORK[what][1](m))
        await left(before.submitted)
        await cancelled(queued)
        await until(lambda: apmem2.statistics().in_flight == 1)
        assert apmem2.statistics().withdrawn == before.withdrawn + 1
        assert not running.done()
        mark = recorder.mark()
        faults.release()
        await running
        await quiet()
        calls = [event for event in recorder.events() if event.ended > mark and event.name in SYNCS]
        assert [(event.name, event.offset, event.size) for event in calls] == [("msync", m.address, PAGE)]
        assert bytes(m[PAGE : 2 * PAGE]) == bytes(PAGE)
        await WORK[what][1](m)


async def test_a_drain_that_is_cancelled_leaves_the_flush_to_the_next_drain(directory: Path, faults: Any) -> None:
    """The error of a flush is told by a drain; by one that was cancelled it is not used up."""
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.hold("msync")
    faults.fail("msync", errno.EIO)
    await m.flush(0, PAGE)
    await faults.held()
    drain = await begun(m.drain())
    await asyncio.sleep(0)
    await cancelled(drain)
    faults.release()
    with pytest.raises(apmem2.PersistError):
        await m.drain()
    await m.aclose()
    await quiet()


# ---- running ---------------------------------------------------------------------------------------------------------


@of_all_work
async def test_work_that_runs_goes_on_without_its_waiter(directory: Path, faults: Any, what: str) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    gate, ask = WORK[what]
    faults.hold(gate)
    task = await begun(ask(m))
    await faults.held()
    await cancelled(task)
    del task
    gc.collect()
    assert apmem2.statistics().in_flight >= 1
    closing = await begun(m.aclose())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not closing.done()  # close waits for what was accepted
    assert mapped(path)
    faults.release()
    await closing
    assert not mapped(path)
    await quiet()


async def test_a_cancelled_persist_that_runs_is_still_made_durable(directory: Path, recorder: Any, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.hold("msync")
        task = await begun(m.persist(3 * PAGE, 1))
        await faults.held()
        await cancelled(task)
        faults.release()
        await quiet()
        calls = [event for event in recorder.events() if event.name == "msync"]
        assert [(event.offset, event.size, event.result) for event in calls] == [(m.address + 3 * PAGE, PAGE, 0)]


async def test_a_cancelled_task_does_not_cancel_another_of_its_round(
    directory: Path, recorder: Any, faults: Any
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        rounds = apmem2.statistics().rounds
        faults.hold("msync")
        one = asyncio.ensure_future(m.persist(0, 1))
        other = asyncio.ensure_future(m.persist(PAGE, 1))
        await faults.held()
        await cancelled(one)
        assert not other.done()
        faults.release()
        await other
        assert apmem2.statistics().rounds == rounds + 1
        calls = [event for event in recorder.events() if event.name == "msync"]
        assert [(event.offset, event.size) for event in calls] == [(m.address, 2 * PAGE)]
        await quiet()


async def test_the_failure_of_a_shared_round_reaches_those_who_were_not_cancelled(directory: Path, faults: Any) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.hold("msync")
    faults.fail("msync", errno.EIO)
    one = asyncio.ensure_future(m.persist(0, 1))
    other = asyncio.ensure_future(m.persist(PAGE, 1))
    await faults.held()
    await cancelled(one)
    faults.release()
    with pytest.raises(apmem2.PersistError):
        await other
    assert isinstance(m.failed, apmem2.PersistError)
    with pytest.raises(apmem2.MapFailedError):
        await m.persist(0, 1)
    await m.aclose()
    await quiet()


async def test_a_failure_whose_only_waiter_was_cancelled_still_fails_the_file(directory: Path, faults: Any) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.hold("msync")
    faults.fail("msync", errno.EIO)
    task = await begun(m.persist(0, 1))
    await faults.held()
    await cancelled(task)
    faults.release()
    await quiet()
    assert isinstance(m.failed, apmem2.PersistError)
    with pytest.raises(apmem2.MapFailedError):
        await m.memcpy(0, b"x")
    await m.aclose()


@of_all_work
async def test_a_cancellation_after_the_failure_leaks_nothing(directory: Path, faults: Any, what: str) -> None:
    """The failure is known to the bridge, the waiter has not run yet, and is cancelled."""
    m = await apmem2.open(directory / "a", size=SIZE)
    gate, ask = WORK[what]
    faults.hold(gate)
    faults.fail(gate, errno.EIO)
    task = await begun(ask(m))
    await faults.held()
    faults.release()
    while apmem2.statistics().in_flight:
        pass  # the loop must not turn
    runtime.bridge()._arrive()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() or isinstance(task.exception(), apmem2.PmemError)
    del task  # its traceback holds frames, and those hold views
    gc.collect()
    await quiet()
    try:
        await m.aclose()
    except apmem2.PersistError:
        assert what in ("memcpy NODRAIN", "flush and drain")  # nobody was told of that flush
    await quiet()
    async with apmem2.open(directory / "b", size=SIZE) as other:
        await ask(other)


class Buffer(bytearray):
    """A bytearray of which one can see that it died."""


async def test_the_source_of_a_large_memcpy_lives_until_the_job_has_ended(directory: Path, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        data = Buffer(os.urandom(LARGE))
        expected = bytes(data)
        alive = weakref.ref(data)
        faults.hold("pwrite_dsync")
        task = await begun(m.memcpy(5, data))
        await faults.held()
        with pytest.raises(BufferError):
            data.append(1)
        await cancelled(task)
        del task, data
        for _ in range(3):
            await asyncio.sleep(0)  # the loop lets go of the task, and the task of its frames
        gc.collect()
        assert alive() is not None
        faults.release()
        await quiet()
        gc.collect()
        assert alive() is None
        assert bytes(m[5 : 5 + LARGE]) == expected


async def test_a_small_memcpy_does_not_read_the_callers_buffer_after_the_call(directory: Path, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        data = bytearray(b"before")
        faults.hold("pwrite_dsync")
        task = await begun(m.memcpy(0, data))
        await faults.held()
        data[:] = b"after!!"
        await cancelled(task)
        faults.release()
        await quiet()
        assert bytes(m[0:6]) == b"before"


@pytest.mark.parametrize("word", ["CACHE_LINE", "BYTE"])
async def test_a_cancelled_breath_of_inline_work_harms_nothing(
    directory: Path, forced: Callable[[str], None], word: str
) -> None:
    """Inline work is done when it is asked for; the turn that it then gives to others is where a cancellation comes."""
    forced(word)
    with pytest.warns(apmem2.DurabilityWarning):
        m = await apmem2.open(directory / "a", size=SIZE)

    async def without_end() -> None:
        while True:
            await m.memcpy(0, b"x" * 4096)
            await m.persist(0, 4096)
            await m.memset(8192, 1, 4096)
            await m.flush(0, 64)
            await m.drain()

    await cancelled(await begun(without_end()))
    assert bytes(m[0:4096]) == b"x" * 4096
    await quiet()
    await m.persist(0, 64)
    await m.aclose()


# ---- at the same tick as the completion ------------------------------------------------------------------------------


async def completed_but_not_told(work: Coroutine[Any, Any, Any], gate: str, faults: Any) -> asyncio.Task[Any]:
    """A task whose job is done and whose future is settled, and which has not run since."""
    faults.hold(gate)
    task = await begun(work)
    await faults.held()
    faults.release()
    while apmem2.statistics().in_flight:
        pass  # the loop must not turn
    runtime.bridge()._arrive()
    assert not task.done()
    return task


@of_all_work
async def test_a_cancellation_at_the_tick_of_the_completion_is_a_cancellation(
    directory: Path, faults: Any, what: str
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        gate, ask = WORK[what]
        await cancelled(await completed_but_not_told(ask(m), gate, faults))
        await quiet()
        await ask(m)


async def test_an_open_that_is_cancelled_as_its_file_was_opened_gives_the_descriptor_back(
    directory: Path, faults: Any
) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    task = await completed_but_not_told(apmem2.open(path)._once(), "open", faults)
    assert descriptors(path) == 1
    await cancelled(task)
    await until(lambda: descriptors(path) == 0)
    await quiet()
    async with apmem2.open(path) as m:
        await m.persist(0, 1)


@pytest.mark.parametrize("opener", ["open", "map_new", "anonymous"])
async def test_an_opener_that_is_cancelled_as_its_memory_was_mapped_unmaps_it(
    directory: Path, faults: Any, recorder: Any, opener: str
) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    page = apmem2.Granularity.PAGE
    work: dict[str, Callable[[], Coroutine[Any, Any, apmem2.Map]]] = {
        "open": apmem2.open(path)._once,
        "map_new": apmem2.map_new(apmem2.Source.from_path(path), required_granularity=page)._once,
        "anonymous": apmem2.map_new(apmem2.Source.anonymous(SIZE), required_granularity=page)._once,
    }
    chosen = work.pop(opener)()
    for unused in work.values():
        unused().close()
    # Opening a file maps a page of it as well, to look at; the advice is given to what is mapped in earnest.
    task = await completed_but_not_told(chosen, "mmap" if opener == "anonymous" else "madvise", faults)
    assert mapped(path) or opener == "anonymous"
    await cancelled(task)
    await until(lambda: "munmap" in recorder.calls())
    await until(lambda: descriptors(path) == 0)
    assert not mapped(path)
    await quiet()


# ---- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["open", "fstat", "query", "fadvise", "mmap_sync", "mmap", "madvise"])
@pytest.mark.parametrize("opener", ["open", "map_new", "from_fd"])
async def test_an_opener_cancelled_at_any_call_leaves_nothing(
    directory: Path, faults: Any, recorder: Any, gate: str, opener: str
) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    page = apmem2.Granularity.PAGE

    def opening() -> Coroutine[Any, Any, apmem2.Map]:
        if opener == "open":
            return apmem2.open(path)._once()
        source = apmem2.Source.from_path(path) if opener == "map_new" else apmem2.Source.from_fd(fd)
        return apmem2.map_new(source, required_granularity=page)._once()

    try:
        await (await opening()).aclose()
        await until(lambda: descriptors(path) == 1)
        if gate not in recorder.calls():
            pytest.skip(f"{opener} makes no {gate} call here")
        faults.hold(gate)
        task = await begun(opening())
        await faults.held()
        await cancelled(task)
        faults.release()
        del task
        await quiet()
        await until(lambda: descriptors(path) == 1)
        await until(lambda: not mapped(path))
        assert apmem2.mappings() == []
        m = await opening()
        await m.persist(0, PAGE)
        await m.aclose()
    finally:
        os.close(fd)


@pytest.mark.parametrize("gate", ["tmpfile", "fallocate", "pwrite", "sync_file_range", "fsync"])
async def test_a_creation_cancelled_in_the_middle_leaves_no_file(directory: Path, faults: Any, gate: str) -> None:
    path = directory / "new"
    faults.hold(gate)
    task = await begun(apmem2.open(path, size=SIZE)._once())
    await faults.held()
    await cancelled(task)
    faults.release()
    del task
    await quiet()
    await until(lambda: descriptors(path) == 0)
    assert list(directory.iterdir()) == []  # noqa: ASYNC240
    async with apmem2.open(path, size=SIZE) as m:
        await m.persist()


async def test_a_creation_under_a_temporary_name_cancelled_in_the_middle_leaves_no_file(
    directory: Path, faults: Any
) -> None:
    path = directory / "new"
    faults.fail("tmpfile", errno.EOPNOTSUPP, count=1)
    faults.hold("fallocate")
    task = await begun(apmem2.open(path, size=SIZE)._once())
    await faults.held()
    await cancelled(task)
    faults.release()
    await quiet()
    await until(lambda: descriptors(path) == 0)
    assert list(directory.iterdir()) == []  # noqa: ASYNC240


async def test_a_growth_cancelled_in_the_middle_gives_the_old_size_back(directory: Path, faults: Any) -> None:
    path = directory / "a"
    path.write_bytes(b"x" * PAGE)
    faults.hold("fallocate")
    task = await begun(apmem2.open(path, size=SIZE, grow=True)._once())
    await faults.held()
    await cancelled(task)
    faults.release()
    await quiet()
    assert path.read_bytes() == b"x" * PAGE


async def test_an_open_cancelled_while_it_populates_is_closed(directory: Path, faults: Any) -> None:
    """The advice at mapping (MADV_RANDOM) and the reading in are the same kind of call: the second one is wanted."""
    path = directory / "a"
    async with apmem2.open(path, size=SIZE):
        pass
    task = asyncio.ensure_future(apmem2.open(path, populate=True, keep_cache=True)._once())
    faults.hold("madvise")
    await faults.held()
    task.cancel()
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await until(lambda: not mapped(path))
    assert apmem2.mappings() == []
    await quiet()


async def test_a_cancelled_adoption_has_ended_when_it_says_so(directory: Path, faults: Any) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    faults.hold("query")
    task = await begun(apmem2.map_from_existing(memory)._once())
    await faults.held()
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()  # it looks at the caller's memory: microseconds, so it is waited for
    with pytest.raises(BufferError):
        memory.close()
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    memory.close()  # nobody holds it any more
    assert apmem2.mappings() == []
    await quiet()
    await until(lambda: descriptors(path) == 0)


async def test_an_adoption_cancelled_in_the_list_of_its_tick_leaves_the_buffer_free(directory: Path) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    await cancelled(await begun(apmem2.map_from_existing(memory)._once()))
    memory.close()
    await quiet()


# ---- the registry's lock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", ["map_new", "map_from_existing"])
async def test_an_opener_cancelled_at_the_registry_lock_leaves_nothing(directory: Path, opener: str) -> None:
    path = directory / "a"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    lock = mapping.registry.lock

    def opening() -> Coroutine[Any, Any, apmem2.Map]:
        if opener == "map_from_existing":
            return apmem2.map_from_existing(memory)._once()
        page = apmem2.Granularity.PAGE
        return apmem2.map_new(apmem2.Source.from_path(path), required_granularity=page)._once()

    async with lock:
        task = await begun(opening())
        await until(lambda: len(lock._queue) == 1)
        await cancelled(task)
        assert len(lock._queue) == 0
    del task
    gc.collect()
    assert apmem2.mappings() == []
    memory.close()
    await quiet()
    await until(lambda: descriptors(path) == 0)
    async with apmem2.open(path) as m:
        await m.persist()


async def test_a_cancelled_waiter_of_the_lock_passes_its_turn_on() -> None:
    lock = FairLock()
    order: list[str] = []

    async def turn(name: str) -> None:
        async with lock:
            order.append(name)

    async with lock:
        first, second, third = await begun(turn("1")), await begun(turn("2")), await begun(turn("3"))
        await cancelled(first)
    # The second has been granted the lock, and is cancelled before it could run.
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await third
    assert order == ["3"]
    await turn("4")


async def test_a_waiter_cancelled_as_it_was_woken_passes_its_turn_on() -> None:
    lock = FairLock()
    ran: list[str] = []

    async def turn(name: str) -> None:
        async with lock:
            ran.append(name)

    await lock.__aenter__()
    first, second = await begun(turn("1")), await begun(turn("2"))
    waiter = lock._queue[0]
    await lock.__aexit__(None, None, None)
    waiter._set()  # its future is done, its task has not run
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert ran == ["2"]


# ---- closing ---------------------------------------------------------------------------------------------------------


async def test_a_cancelled_aclose_finishes_later_and_a_second_one_works(directory: Path, faults: Any) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    faults.hold("msync")
    await m.flush(0, PAGE)
    await faults.held()
    closing = await begun(m.aclose())
    await asyncio.sleep(0)
    await cancelled(closing)
    assert m.closed
    assert mapped(path)
    assert apmem2.mappings() == [m]
    with pytest.raises(apmem2.ClosedError):
        await m.persist()
    faults.release()
    await until(lambda: apmem2.mappings() == [] and not mapped(path))
    await m.aclose()
    await quiet()


async def test_an_aclose_cancelled_in_its_tick_finishes_later(directory: Path) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    await cancelled(await begun(m.aclose()))
    await until(lambda: apmem2.mappings() == [] and not mapped(path))
    await m.aclose()
    await quiet()


async def test_an_aclose_cancelled_while_it_unmaps_finishes_later(directory: Path, faults: Any) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    faults.hold("munmap")
    closing = await begun(m.aclose())
    await faults.held()
    await cancelled(closing)
    assert apmem2.mappings() == []
    faults.release()
    await until(lambda: not mapped(path))
    await m.aclose()
    await quiet()


async def test_of_two_aclose_one_may_be_cancelled(directory: Path, faults: Any) -> None:
    path = directory / "a"
    m = await apmem2.open(path, size=SIZE)
    faults.hold("msync")
    await m.flush()
    await faults.held()
    one, other = await begun(m.aclose()), await begun(m.aclose())
    await cancelled(one)
    faults.release()
    await other
    assert not mapped(path)
    await quiet()


# ---- by way of asyncio's own tools -----------------------------------------------------------------------------------


async def test_a_timeout_ends_the_waiting_and_not_the_work(directory: Path, recorder: Any, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.hold("msync")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await m.persist(0, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(m.persist(PAGE, 1), 0.01)
        faults.release()
        await m.persist(2 * PAGE, 1)
        await quiet()


async def test_a_failing_task_of_a_group_cancels_the_persists_of_the_others(directory: Path, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.hold("msync")

        async def fail() -> None:
            await faults.held()
            raise KeyError("the reason")

        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
            async with asyncio.TaskGroup() as group:
                for page in range(5):
                    group.create_task(m.persist(page * PAGE, 1))
                group.create_task(fail())
        assert caught.group_contains(KeyError)
        faults.release()
        await quiet()
        await m.persist()


# ---- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_of_a_thousand_tasks_every_second_may_be_cancelled_anywhere(directory: Path, seed: int) -> None:
    """The others end well, their bytes are there, and the bytes of the cancelled ones are old or new, whole."""
    count, size = 1000, 64
    dice = random.Random(seed)
    async with apmem2.open(directory / "a", size=count * size) as m:

        async def work(number: int, steps: list[int]) -> None:
            at = number * size
            for step in steps:
                if step == 0:
                    await m.memcpy(at, number.to_bytes(2, "little") * (size // 2))
                elif step == 1:
                    await m.persist(at, size)
                elif step == 2:
                    await m.flush(at, size)
                elif step == 3:
                    await m.drain()
                else:
                    await m.populate(at, size)

        tasks = [
            asyncio.ensure_future(work(number, [0, *(dice.randrange(5) for _ in range(3))])) for number in range(count)
        ]
        victims = dice.sample(range(0, count, 2), count // 2)
        for number in victims:
            tasks[number].cancel()
            if dice.random() < 0.3:
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            assert result is None or (number % 2 == 0 and isinstance(result, asyncio.CancelledError)), (number, result)
            found = bytes(m[number * size : (number + 1) * size])
            new = number.to_bytes(2, "little") * (size // 2)
            assert found == new or (number % 2 == 0 and found == bytes(size)), (seed, number)
        await quiet()
        await m.drain()
        assert apmem2.statistics().in_flight == 0
