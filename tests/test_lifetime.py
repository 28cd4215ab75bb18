"""No sequence of public calls makes Python touch unmapped memory (law 5), and whatever is let go is given back.

Where a mistake would be a crash, the test is a program of its own, and its exit code is looked at.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import mmap
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import uvloop

import apmem2
from apmem2.core import mapping, runtime
from apmem2.native import lib

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE
HANG_S = 20  # only tells a hang from work


async def until(true: Callable[[], bool]) -> None:
    """Let the loop turn until something is true."""
    async with asyncio.timeout(HANG_S):
        while not true():  # noqa: ASYNC110 - nobody could set an event
            await asyncio.sleep(0)


def wait_until(true: Callable[[], bool]) -> None:
    """The same where no loop runs; the pool's threads do what is waited for."""
    turn = threading.Event()
    for _ in range(HANG_S * 1000):
        if true():
            return
        turn.wait(0.001)
    raise AssertionError("it did not become true")


def mapped(address: int) -> bool:
    """Is something mapped at this address?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def descriptors() -> list[str]:
    """The names of all descriptors of this process."""
    return sorted(os.listdir("/proc/self/fd"))


# What every program below begins with.
PRELUDE = """
import asyncio, gc, itertools, os, sys, threading, warnings
import numpy
import apmem2
from apmem2.native import lib
PAGE = os.sysconf("SC_PAGESIZE")
warnings.simplefilter("ignore", apmem2.DurabilityWarning)

def mapped(address):
    for line in open("/proc/self/maps"):
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False

async def until(true):
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0)

def wait_until(true):
    turn = threading.Event()
    for _ in range(30000):
        if true():
            return
        turn.wait(0.001)
    raise SystemExit("it did not become true")
"""


# ---- views -----------------------------------------------------------------------------------------------------------

HOLDERS: dict[str, Callable[[apmem2.Map], Any]] = {
    "view": lambda m: m.view,
    "slice": lambda m: m[PAGE : 3 * PAGE],
    "slice of a slice": lambda m: m[PAGE : 5 * PAGE][10:20][1:5],
    "cast": lambda m: m[0 : 2 * PAGE].cast("Q"),
    "read-only": lambda m: m.view.toreadonly(),
    "numpy": lambda m: numpy.frombuffer(m.view, dtype="<u4"),
    "numpy slice": lambda m: numpy.frombuffer(m.view, dtype="u1")[100:2000:7],
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", HOLDERS)
async def test_what_looks_into_a_closed_map_can_be_read_until_it_is_gone(directory: Path, kind: str) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    await m.memset(0, 0x5A, SIZE)
    holder = HOLDERS[kind](m)
    with pytest.warns(ResourceWarning, match="closed while views of it are alive"):
        await m.aclose()
    assert m.closed
    assert apmem2.mappings() == []
    assert mapped(m.address)
    assert bytes(memoryview(holder).tobytes()).strip(b"\x5a") == b""
    with pytest.raises(apmem2.ClosedError):
        _ = m.view
    del holder
    await until(lambda: not mapped(m.address))


@pytest.mark.asyncio
async def test_a_map_without_views_is_unmapped_when_aclose_returns(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    view = m.view
    array = numpy.frombuffer(m[0:PAGE], dtype="u1")
    del view, array
    await m.aclose()
    assert not mapped(m.address)


@pytest.mark.asyncio
async def test_a_released_view_does_not_hold_the_memory(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    with m[0:PAGE] as part:
        part[0] = 1
    await m.aclose()
    assert not mapped(m.address)


def test_the_last_of_many_views_unmaps_in_whatever_order_they_go(run_program: Any) -> None:
    """All orders of: closing, and letting go of five things that look into the map."""
    run_program(
        PRELUDE
        + """
warnings.simplefilter("ignore", ResourceWarning)

def touch(holders):
    for holder in holders.values():
        assert holder[0] == 7
        holder[0] = 7

async def main():
    count = 0
    for order in itertools.permutations(range(5)):
        m = await apmem2.open("a", size=4 * PAGE)
        m[0] = 7
        address = m.address
        view = m.view
        part = view[0:PAGE]
        inner = part[0:100][0:10]
        array = numpy.frombuffer(part, dtype="u1")
        holders = {0: view, 1: part, 2: inner, 3: array}
        del view, part, inner, array
        closed = False
        for step in order:
            if step == 4:
                await m.aclose()
                closed = True
            else:
                assert holders[step][0] == 7
                del holders[step]
            touch(holders)
            if holders or not closed:
                assert mapped(address), order
        await until(lambda: not mapped(address))
        count += 1
    assert count == 120 and apmem2.mappings() == []
    await until(lambda: not any("/a" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                                if os.path.exists(f"/proc/self/fd/{fd}")))

asyncio.run(main())
"""
    )


def test_views_of_a_closed_map_may_be_used_and_dropped_by_other_threads(run_program: Any) -> None:
    run_program(
        PRELUDE
        + """
warnings.simplefilter("ignore", ResourceWarning)

async def main():
    for _ in range(50):
        m = await apmem2.open("a", size=8 * PAGE)
        m.view[:] = b"v" * (8 * PAGE)
        go = threading.Event()

        def look(view):
            go.wait()
            for _ in range(100):
                assert bytes(view[0:10]) == b"v" * 10
            assert numpy.frombuffer(view, dtype="u1").sum() == ord("v") * len(view)
            view.release()

        threads = [threading.Thread(target=look, args=(m[i * PAGE : (i + 1) * PAGE],)) for i in range(8)]
        for thread in threads:
            thread.start()
        go.set()
        address = m.address
        await m.aclose()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        del threads, thread, look
        gc.collect()
        await until(lambda: not mapped(address))

asyncio.run(main())
"""
    )


def test_memory_stays_for_the_jobs_that_use_it_whatever_the_program_lets_go(run_program: Any) -> None:
    """Map, loop and views are all dropped while a sync is held at its gate."""
    run_program(
        PRELUDE
        + """
warnings.simplefilter("ignore", ResourceWarning)

async def main():
    m = await apmem2.open("a", size=4 * PAGE)
    m[0] = 9
    lib.apm_observe_hold(lib.APM_CALL_MSYNC, 0, 1)
    await m.flush(0, PAGE)
    while not lib.apm_observe_held():
        await asyncio.sleep(0)
    return m.address

address = asyncio.run(main())
gc.collect()
assert mapped(address)
assert apmem2.statistics().in_flight == 1
lib.apm_observe_hold(0, 0, 0)
wait_until(lambda: apmem2.statistics().in_flight == 0)

async def later():
    m = await apmem2.open("a")  # the bridge of the closed loop lets go here
    assert m[0] == 9
    await m.aclose()

asyncio.run(later())
gc.collect()
wait_until(lambda: not mapped(address))
assert apmem2.mappings() == []
"""
    )


@pytest.mark.asyncio
async def test_closing_waits_for_the_jobs_of_other_loops(directory: Path, faults: Any) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    faults.hold("msync")
    persisted = threading.Event()

    async def elsewhere() -> None:
        await m.persist(0, PAGE)
        persisted.set()

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    await faults.held()
    closing = asyncio.ensure_future(m.aclose())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not closing.done()
    assert mapped(m.address)
    assert not persisted.is_set()
    faults.release()
    with warnings.catch_warnings():
        # the other loop may not have fetched its completion, which holds the memory, when the map is closed
        warnings.simplefilter("ignore", ResourceWarning)
        await closing
    await asyncio.to_thread(thread.join)
    assert persisted.is_set()
    await until(lambda: not mapped(m.address))


@pytest.mark.asyncio
async def test_the_core_itself_keeps_the_memory_that_a_job_uses(directory: Path, faults: Any) -> None:
    """Beside what the operation holds in Python, the job pins its map; here nothing else is left of the map."""

    def error(code: int) -> apmem2.PmemError:
        return apmem2.PmemError("refused", code=code)

    m = await apmem2.open(directory / "a", size=SIZE)
    address = m.address
    bridge = runtime.bridge()
    job = runtime.Operation(bridge, lib.APM_JOB_PERSIST, error, None)
    job.map, job.size = m.handle, PAGE
    faults.hold("msync")
    bridge.start(job)
    await faults.held()
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m
        gc.collect()
    other = await apmem2.open(directory / "b", size=SIZE)
    await other.aclose()  # unmappings happen one after the other: this one would be the second
    assert mapped(address)
    faults.release()
    await job
    await until(lambda: not mapped(address))


# ---- maps that nobody closed -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_forgotten_map_warns_and_is_unregistered_and_unmapped(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    address = m.address
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m
        gc.collect()
    assert apmem2.mappings() == []
    assert len(mapping.registry._table) == 0
    assert apmem2.find(address, 1) is None
    await until(lambda: not mapped(address))
    async with apmem2.open(directory / "a") as again:
        await again.persist()


@pytest.mark.asyncio
async def test_a_forgotten_map_with_a_view_stays_mapped_for_the_view(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    m[5] = 55
    address, part = m.address, m[5:6]
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m
        gc.collect()
    assert part[0] == 55
    assert mapped(address)
    del part
    await until(lambda: not mapped(address))


@pytest.mark.asyncio
async def test_a_forgotten_map_in_a_circle_is_found_by_the_collector(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    address = m.address
    circle: list[Any] = [m]
    circle.append(circle)
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m, circle
        gc.collect()
    await until(lambda: not mapped(address))


@pytest.mark.asyncio
async def test_a_closed_map_is_collected_without_a_word(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=SIZE)
    await m.aclose()
    del m
    gc.collect()


@pytest.mark.asyncio
async def test_a_forgotten_adoption_gives_the_buffer_back_and_unmaps_nothing(directory: Path) -> None:
    (directory / "a").write_bytes(bytes(SIZE))
    with (directory / "a").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    m = await apmem2.map_from_existing(memory)
    address = m.address
    with pytest.raises(BufferError):
        memory.close()
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m
        gc.collect()
    assert mapped(address)
    memory[0] = 1
    memory.close()


@pytest.mark.asyncio
async def test_an_adopted_buffer_is_free_when_aclose_returns(directory: Path) -> None:
    (directory / "a").write_bytes(bytes(SIZE))
    with (directory / "a").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    m = await apmem2.map_from_existing(memory)
    await m.persist()
    await m.aclose()
    memory.close()


@pytest.mark.asyncio
async def test_a_view_of_a_closed_adoption_holds_the_buffer(directory: Path) -> None:
    (directory / "a").write_bytes(b"z" * SIZE)
    with (directory / "a").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    m = await apmem2.map_from_existing(memory)
    part = m[0:3]
    await m.aclose()  # without a warning: there is nothing that we would unmap
    with pytest.raises(BufferError):
        memory.close()
    assert bytes(part) == b"zzz"
    del part
    memory.close()


@pytest.mark.asyncio
async def test_a_refused_adoption_frees_the_buffer_while_its_error_is_still_held(directory: Path) -> None:
    (directory / "a").write_bytes(bytes(SIZE))
    with (directory / "a").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    m = await apmem2.map_from_existing(memory)
    with pytest.raises(apmem2.MappingExistsError) as caught:
        await apmem2.map_from_existing(memory)
    await m.aclose()
    memory.close()
    assert caught.value.existing is m


@pytest.mark.asyncio
async def test_memory_of_a_map_that_is_closing_can_be_asked_for_without_stopping_the_loop(
    directory: Path, faults: Any
) -> None:
    """The map is registered until its jobs have ended. An adoption in between once looked at it for ever."""
    m = await apmem2.open(directory / "a", size=SIZE)
    part = m[0:PAGE]
    faults.hold("msync")
    await m.flush(0, 1)
    await faults.held()
    closing = asyncio.ensure_future(m.aclose())
    await asyncio.sleep(0)
    assert m.closed
    with pytest.raises(apmem2.MappingExistsError) as caught:
        await apmem2.map_from_existing(part)
    assert caught.value.existing is m
    del caught, part
    gc.collect()
    faults.release()
    await closing


# ---- inline work beside a close --------------------------------------------------------------------------------------


def test_inline_work_beside_a_close_in_another_thread_never_touches_unmapped_memory(run_program: Any) -> None:
    """The C call runs without the GIL; meanwhile another thread closes the map and the pool unmaps what it may."""
    run_program(
        PRELUDE
        + """
warnings.simplefilter("ignore", ResourceWarning)
os.environ["PMEM2_FORCE_GRANULARITY"] = "CACHE_LINE"
sys.setswitchinterval(1e-5)
box = []
start, done = threading.Barrier(3), threading.Barrier(3)
ROUNDS = 150

def worker(ask):
    async def main():
        for _ in range(ROUNDS):
            start.wait()
            m = box[0]
            try:
                while True:
                    await ask(m)
            except apmem2.ClosedError:
                pass
            del m
            done.wait()
    asyncio.run(main())

async def closer():
    for number in range(ROUNDS):
        box[:] = [await apmem2.open("a", size=64 * PAGE)]
        address = box[0].address
        await asyncio.to_thread(start.wait)
        for _ in range(number % 7):
            await asyncio.sleep(0)
        await box[0].aclose()
        await asyncio.to_thread(done.wait)
        box.clear()
        await until(lambda: not mapped(address))

threads = [threading.Thread(target=worker, args=(ask,)) for ask in (
    lambda m: m.persist(0, 16384),
    lambda m: m.memcpy(16384, b"x" * 16384),
)]
for thread in threads:
    thread.start()
asyncio.run(closer())
for thread in threads:
    thread.join()
assert apmem2.mappings() == []
""",
        timeout=100,
    )


def test_pool_work_beside_a_close_in_another_thread_ends_or_says_closed(run_program: Any) -> None:
    run_program(
        PRELUDE
        + """
warnings.simplefilter("ignore", ResourceWarning)
box = []
start, done = threading.Barrier(3), threading.Barrier(3)
ROUNDS = 60

def worker(ask):
    async def main():
        for _ in range(ROUNDS):
            start.wait()
            m = box[0]
            ended = []
            while not any(ended):
                ended = await asyncio.gather(*(ask(m) for _ in range(3)), return_exceptions=True)
            assert all(end is None or isinstance(end, apmem2.ClosedError) for end in ended), ended
            del m, ended
            done.wait()
    asyncio.run(main())

async def closer():
    for number in range(ROUNDS):
        box[:] = [await apmem2.open("a", size=8 * PAGE)]
        address = box[0].address
        await asyncio.to_thread(start.wait)
        for _ in range(number % 7):
            await asyncio.sleep(0)
        await box[0].aclose()
        await asyncio.to_thread(done.wait)
        box.clear()
        gc.collect()
        await until(lambda: not mapped(address))

threads = [threading.Thread(target=worker, args=(ask,)) for ask in (
    lambda m: m.memcpy(0, b"x" * 64), lambda m: m.persist(PAGE, 64))]
for thread in threads:
    thread.start()
asyncio.run(closer())
for thread in threads:
    thread.join()
assert apmem2.mappings() == [] and apmem2.statistics().in_flight == 0
""",
        timeout=100,
    )


# ---- many loops ------------------------------------------------------------------------------------------------------


def in_threads(*mains: Callable[[], Any], uv: bool = True) -> None:
    """Run each coroutine function in a thread and loop of its own; every second one on uvloop."""
    errors: list[BaseException] = []

    def run(main: Callable[[], Any], factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(main())
        except BaseException as error:
            errors.append(error)

    factories = itertools.cycle([asyncio.new_event_loop, uvloop.new_event_loop])
    threads = [threading.Thread(target=run, args=pair) for pair in zip(mains, factories, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("word", ["PAGE", "CACHE_LINE"])
def test_a_map_serves_many_loops_of_both_kinds_at_once(
    directory: Path, forced: Callable[[str], None], word: str
) -> None:
    forced(word)
    path, each, count = directory / "a", 64, 100

    async def opening() -> apmem2.Map:
        return await apmem2.open(path, size=6 * count * each)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", apmem2.DurabilityWarning)
        m = asyncio.run(opening())

    def user(number: int) -> Callable[[], Any]:
        async def main() -> None:
            async def one(index: int) -> None:
                at = (number * count + index) * each
                await m.memcpy(at, bytes([number + 1]) * each)
                await m.persist(at, each)
                await m.flush(at, each)
                await m.drain()

            await asyncio.gather(*(one(index) for index in range(count)))

        return main

    in_threads(*(user(number) for number in range(6)))
    asyncio.run(m.aclose())
    expected = b"".join(bytes([number + 1]) * (count * each) for number in range(6))
    assert path.read_bytes() == expected


def test_a_drain_covers_a_flush_that_another_loop_had_accepted(directory: Path, faults: Any, recorder: Any) -> None:
    async def opening() -> apmem2.Map:
        return await apmem2.open(directory / "a", size=SIZE)

    m = asyncio.run(opening())
    flushed, draining = threading.Event(), threading.Event()
    marks: list[int] = []

    async def flusher() -> None:
        faults.hold("msync")
        await m.flush(0, PAGE)
        flushed.set()

    async def drainer() -> None:
        await asyncio.to_thread(flushed.wait)
        drain = asyncio.ensure_future(m.drain())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not drain.done()
        draining.set()
        await drain
        marks.append(recorder.mark())

    async def opener() -> None:
        await asyncio.to_thread(draining.wait)
        faults.release()

    in_threads(flusher, drainer, opener)
    (sync,) = [event for event in recorder.events() if event.name == "msync"]
    assert sync.ended < marks[0]
    asyncio.run(m.aclose())


def test_the_failure_of_a_flush_is_told_to_a_drain_of_another_loop(directory: Path, faults: Any) -> None:
    async def flusher() -> apmem2.Map:
        m = await apmem2.open(directory / "a", size=SIZE)
        faults.fail("msync", 5)
        await m.flush(0, PAGE)
        return m

    m = asyncio.run(flusher())
    wait_until(lambda: apmem2.statistics().in_flight == 0)
    with pytest.raises(apmem2.PersistError):
        uvloop.run(m.drain())
    with pytest.raises(apmem2.MapFailedError):  # those bytes are not durable: nobody may be told that they are
        asyncio.run(m.drain())
    asyncio.run(m.aclose())
    assert not mapped(m.address)


def test_a_map_outlives_the_loop_that_opened_it(directory: Path) -> None:
    async def opening() -> apmem2.Map:
        return await apmem2.open(directory / "a", size=SIZE)

    async def using(m: apmem2.Map) -> None:
        m[0] = 1
        await m.persist(0, 1)

    m = asyncio.run(opening())
    asyncio.run(using(m))
    uvloop.run(using(m))
    asyncio.run(m.aclose())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_loop_closed_with_work_in_flight_leaks_nothing(
    directory: Path, faults: Any, new_loop: Callable[[], asyncio.AbstractEventLoop], caplog: pytest.LogCaptureFixture
) -> None:
    """stop() and close() in the middle: persists, a copy from the caller's buffer and an opener are under way."""
    path = directory / "a"

    async def opening() -> apmem2.Map:
        return await apmem2.open(path, size=SIZE)

    m = asyncio.run(opening())
    before = len(descriptors())
    loop = new_loop()

    async def start() -> None:
        faults.hold("msync")
        tasks.append(asyncio.ensure_future(m.persist(0, 1)))
        await faults.held()
        tasks.append(asyncio.ensure_future(m.persist(PAGE, 1)))
        tasks.append(asyncio.ensure_future(m.memcpy(0, bytearray(b"c" * 300_000)[:SIZE])))
        tasks.append(
            asyncio.ensure_future(apmem2.map_new(apmem2.Source.from_path(path), required_granularity=page)._once())
        )
        tasks.append(asyncio.ensure_future(m.drain()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asyncio.get_running_loop().stop()

    page = apmem2.Granularity.PAGE
    tasks: list[Any] = []
    task = loop.create_task(start())
    loop.run_forever()
    loop.close()
    del task, loop
    tasks.clear()
    gc.collect()
    faults.release()
    wait_until(lambda: apmem2.statistics().in_flight == 0)

    async def later() -> None:
        await m.persist()
        assert [bridge for bridge in runtime._bridges if bridge.loop.is_closed()] == []
        gc.collect()
        await m.aclose()

    asyncio.run(later())
    gc.collect()
    wait_until(lambda: not mapped(m.address))
    wait_until(lambda: len(descriptors()) <= before)
    assert apmem2.mappings() == []


def test_many_loops_one_after_another_leak_no_descriptor_thread_or_bridge(directory: Path) -> None:
    async def main(number: int) -> None:
        async with apmem2.open(directory / "a", size=SIZE) as m:
            await m.memcpy(0, number.to_bytes(2, "little"))
            await asyncio.gather(*(m.persist(page * PAGE, 1) for page in range(16)))

    for number in range(5):
        asyncio.run(main(number))
    fds, threads, bridges = len(descriptors()), apmem2.statistics().threads, len(runtime._bridges)
    for number in range(100):
        (uvloop.run if number % 2 else asyncio.run)(main(number))
    assert len(runtime._bridges) <= bridges
    assert apmem2.statistics().threads <= max(threads, 16)
    wait_until(lambda: len(descriptors()) <= fds)
    assert (directory / "a").read_bytes()[:2] == (99).to_bytes(2, "little")


def test_many_loops_in_threads_leak_nothing(directory: Path) -> None:
    async def main() -> None:
        async with apmem2.open(directory / "a", size=SIZE) as m:
            await m.persist()

    in_threads(main, main)
    for _ in range(10):
        in_threads(main, main, main, main)
    asyncio.run(main())  # lets go of the bridges of all closed loops
    assert len(runtime._bridges) <= 2
    assert apmem2.statistics().in_flight == 0


def test_the_registry_lock_passes_between_loops_in_the_order_of_asking(directory: Path) -> None:
    (directory / "a").write_bytes(bytes(64 * PAGE))
    with (directory / "a").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 64 * PAGE)

    def user(number: int) -> Callable[[], Any]:
        async def main() -> None:
            view = memoryview(memory)
            for turn in range(20):
                at = (number * 8 + turn % 8) * PAGE
                part = view[at : at + PAGE]
                m = await apmem2.map_from_existing(part)
                with pytest.raises(apmem2.MappingExistsError):
                    await apmem2.map_from_existing(part)
                await m.persist()
                await m.aclose()
                part.release()
            view.release()

        return main

    in_threads(*(user(number) for number in range(8)))
    assert apmem2.mappings() == []
    gc.collect()
    memory.close()
