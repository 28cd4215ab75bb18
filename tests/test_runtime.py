"""The bridge between a loop and the pool: what leaves together, what comes back together, and what is bounded."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import apmem2
from apmem2.core import config, runtime
from apmem2.native import lib
from tests.conftest import Faults

PAGE = mmap.PAGESIZE
HANG_S = 20  # only tells a hang from work


class Door:
    """The core, with its submissions written down: the number of jobs in each."""

    def __init__(self) -> None:
        self.submissions: list[int] = []
        self.answers: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def apm_pool_submit(self, channel: Any, jobs: Any, count: int) -> int:
        answer: int = lib.apm_pool_submit(channel, jobs, count)
        self.submissions.append(count)
        self.answers.append(answer)
        return answer


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """Between the runtime and the core."""
    found = Door()
    monkeypatch.setattr(runtime, "lib", found)
    yield found
    monkeypatch.undo()


async def until(true: Callable[[], bool]) -> None:
    """Let the loop turn until something is true."""
    async with asyncio.timeout(HANG_S):
        while not true():  # noqa: ASYNC110 - nobody could set an event
            await asyncio.sleep(0)


def noop(kind: int | None = None) -> runtime.Operation:
    """A round trip through the pool that does nothing, started."""

    def error(code: int) -> apmem2.PmemError:
        return apmem2.PmemError(f"refused with {code}", code=code)

    bridge = runtime.bridge()
    return bridge.start(runtime.Operation(bridge, lib.APM_JOB_NOOP if kind is None else kind, error, None))


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_jobs_of_one_tick_leave_in_one_call(directory: Path, door: Door) -> None:
    async with apmem2.open(directory / "a", size=100 * PAGE) as m:
        door.submissions.clear()
        await asyncio.gather(*(m.persist(page * PAGE, 1) for page in range(100)))
        assert door.submissions == [100]


@pytest.mark.asyncio
async def test_the_jobs_of_a_tick_beyond_one_call_leave_in_full_calls(door: Door) -> None:
    await asyncio.gather(*(noop() for _ in range(1500)))
    assert door.submissions == [1024, 476]


@pytest.mark.asyncio
async def test_jobs_of_one_tick_on_one_file_share_one_round(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=100 * PAGE) as m:
        before = apmem2.statistics()
        await asyncio.gather(*(m.persist(page * PAGE, 1) for page in range(100)))
        after = apmem2.statistics()
        assert after.rounds == before.rounds + 1
        assert after.round_jobs == before.round_jobs + 100
        assert after.sync_calls == before.sync_calls + 1  # adjacent pages are one range
        assert after.submitted == before.submitted + 100


@pytest.mark.asyncio
async def test_a_flush_leaves_at_the_call_and_after_what_was_asked_before_it(directory: Path, door: Door) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        door.submissions.clear()
        earlier = asyncio.ensure_future(m.memcpy(0, b"x"))
        await asyncio.sleep(0)
        assert door.submissions == []
        await m.flush(0, 1)
        assert door.submissions == [2]
        await earlier
        await m.drain()


@pytest.mark.asyncio
async def test_nothing_else_of_the_tick_is_touched_by_a_refused_job() -> None:
    operations = [noop(), noop(), noop(kind=99), noop(), noop()]
    results = await asyncio.gather(*operations, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), type(None), apmem2.PmemError, type(None), type(None)]
    bridge = runtime.bridge()
    assert bridge.in_flight() == []
    assert len(bridge._free) == len(bridge._slots)


@pytest.mark.asyncio
async def test_many_operations_wait_for_a_group_and_the_first_error_is_raised_at_the_end() -> None:
    operations = [noop(kind=99), noop(), noop(kind=98), noop()]
    with pytest.raises(apmem2.PmemError):
        await runtime.gather(operations)
    assert {operation.tag for operation in operations} == {runtime.Operation.ENDED}


# ---- back ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(descriptor, value) of the eventfds that were read: the value counts the writes since the last read."""
    found: list[tuple[int, int]] = []
    read = os.read

    def reading(fd: int, size: int) -> bytes:
        data = read(fd, size)
        if size == 8:
            found.append((fd, int.from_bytes(data, "little")))
        return data

    monkeypatch.setattr(runtime.os, "read", reading)
    return found


@pytest.mark.asyncio
async def test_the_completions_of_a_round_come_back_with_one_wake_up(
    directory: Path, reads: list[tuple[int, int]]
) -> None:
    async with apmem2.open(directory / "a", size=100 * PAGE) as m:
        reads.clear()
        await asyncio.gather(*(m.persist(page * PAGE, 1) for page in range(100)))
        assert reads == [(runtime.bridge()._fd, 1)]


@pytest.mark.asyncio
async def test_completions_that_were_not_yet_fetched_cause_no_second_write(
    directory: Path, reads: list[tuple[int, int]]
) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        await m.flush(0, 1)
        while apmem2.statistics().in_flight:
            pass  # the loop must not turn: nobody fetches
        await m.flush(0, 1)
        while apmem2.statistics().in_flight:
            pass
        reads.clear()
        await until(lambda: not runtime.bridge().in_flight())
        assert reads == [(runtime.bridge()._fd, 1)]


@pytest.mark.asyncio
async def test_a_failed_round_gives_each_waiter_an_exception_of_its_own(directory: Path, faults: Any) -> None:
    """An exception carries its traceback: one object raised in two tasks would show the stack of both."""
    m = await apmem2.open(directory / "a", size=2 * PAGE)
    faults.fail("msync", 5)
    first, second = await asyncio.gather(m.persist(0, 1), m.persist(PAGE, 1), return_exceptions=True)
    assert isinstance(first, apmem2.PersistError)
    assert isinstance(second, apmem2.PersistError)
    assert first is not second
    await m.aclose()


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_more_tasks_than_slots_all_complete_in_the_order_in_which_they_asked(run_program: Any) -> None:
    run_program(
        """
import asyncio, apmem2
from apmem2.core import runtime
apmem2.configure(jobs_max=3)

async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        await asyncio.gather(*(m.memcpy(0, number.to_bytes(2, "little")) for number in range(60)))
        assert bytes(m[:2]) == (59).to_bytes(2, "little")
        await asyncio.gather(*(m.persist(n * 64, 64) for n in range(60)), *(m.flush(n * 64, 64) for n in range(60)))
        await m.drain()
        bridge = runtime.bridge()
        assert len(bridge._slots) == 3 and not bridge.in_flight() and not bridge._tick
    assert apmem2.statistics().in_flight == 0

asyncio.run(main())
"""
    )


def test_a_flush_waits_for_its_acceptance_and_not_for_its_end(run_program: Any) -> None:
    run_program(
        """
import asyncio, apmem2
from apmem2.core import runtime
from apmem2.native import lib
apmem2.configure(jobs_max=2)

async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        lib.apm_observe_hold(lib.APM_CALL_MSYNC, 0, 1)
        await m.flush(0, 1)      # accepted: returns although the round hangs
        await m.flush(4096, 1)
        third = asyncio.ensure_future(m.flush(8192, 1))
        fourth = asyncio.ensure_future(m.flush(12288, 1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not third.done() and not fourth.done()
        submitted = apmem2.statistics().submitted
        fourth.cancel()
        try:
            await fourth
        except asyncio.CancelledError:
            pass
        lib.apm_observe_hold(0, 0, 0)
        await third
        assert apmem2.statistics().submitted == submitted + 1
        await m.drain()

asyncio.run(main())
"""
    )


def test_a_pool_of_the_least_size_runs_everything(run_program: Any) -> None:
    run_program(
        """
import asyncio, apmem2
apmem2.configure(threads=6)

async def main():
    async with apmem2.open("a", size=1 << 16) as m, apmem2.open("b", size=1 << 16) as n:
        await asyncio.gather(*(x.memcpy(i, b"x") for i in range(200) for x in (m, n)))
        assert apmem2.statistics().threads <= 6

asyncio.run(main())
"""
    )


def test_what_a_stopped_pool_is_asked_raises_and_fails_no_file(run_program: Any) -> None:
    run_program(
        """
import asyncio, apmem2, warnings
from apmem2.native import lib

async def main():
    m = await apmem2.open("a", size=1 << 16)
    assert lib.apm_pool_stop(1000) == 0
    results = await asyncio.gather(m.persist(0, 1), m.memcpy(0, b"x"), m.flush(0, 1), return_exceptions=True)
    assert [type(result) for result in results] == [apmem2.PoolError] * 3, results
    assert {result.code for result in results} == {apmem2.ErrorCode.STOPPED}
    assert m.failed is None
    try:
        await m.aclose()
    except apmem2.PoolError:
        pass
    assert m.closed

warnings.simplefilter("ignore", ResourceWarning)
asyncio.run(main())
"""
    )


def test_a_thread_that_cannot_be_started_is_told_to_exactly_one_operation(run_program: Any) -> None:
    run_program(
        """
import asyncio, errno, apmem2
from apmem2.native import lib

async def one(name):
    m = await apmem2.open(name, size=1 << 16)
    await m.persist()
    await m.aclose()

async def main():
    lib.apm_fault_set(lib.APM_CALL_PTHREAD_CREATE, 1, 1, errno.EAGAIN, 0)
    first, second = await asyncio.gather(one("a"), one("b"), return_exceptions=True)
    assert isinstance(first, apmem2.PmemError) and first.code == -errno.EAGAIN, first
    assert second is None, second
    lib.apm_fault_clear()
    await one("a")

asyncio.run(main())
"""
    )


def test_the_want_of_further_threads_is_no_failure(run_program: Any) -> None:
    run_program(
        """
import asyncio, errno, apmem2
from apmem2.native import lib

async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        lib.apm_fault_set(lib.APM_CALL_PTHREAD_CREATE, 1, 1000, errno.EAGAIN, 0)
        await asyncio.gather(*(m.memcpy(i, b"x") for i in range(100)), *(m.populate() for _ in range(100)))

asyncio.run(main())
"""
    )


def test_a_file_whose_round_hangs_holds_up_no_other_file(run_program: Any) -> None:
    """Law 8, with as few threads as there can be for it."""
    run_program(
        """
import asyncio, os, apmem2
from apmem2.native import lib
apmem2.configure(threads=6)

async def main():
    async with apmem2.open("a", size=1 << 16) as hung, apmem2.open("b", size=1 << 16) as other:
        lib.apm_observe_hold(lib.APM_CALL_MSYNC, os.stat("a").st_ino, 1)
        waiting = [asyncio.ensure_future(hung.persist(i, 1)) for i in range(10)]
        while not lib.apm_observe_held():
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await asyncio.gather(*(other.persist(i, 1) for i in range(10)))
            await other.populate()
            await asyncio.gather(*(other.memcpy(i, b"x") for i in range(10)))
        assert not any(task.done() for task in waiting)
        assert apmem2.statistics().oldest_round_s > 0
        lib.apm_observe_hold(0, 0, 0)
        await asyncio.gather(*waiting)
    assert apmem2.statistics().oldest_round_s == 0

asyncio.run(main())
"""
    )


# ---- inline ----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", ["persist", "memcpy", "memset", "flush"])
async def test_a_tight_loop_of_inline_work_gives_others_their_turn(
    directory: Path, forced: Callable[[str], None], ask: str
) -> None:
    forced("CACHE_LINE")
    with pytest.warns(apmem2.DurabilityWarning):
        m = await apmem2.open(directory / "a", size=PAGE)
    work: dict[str, Callable[[], Any]] = {
        "persist": lambda: m.persist(0, 64),
        "memcpy": lambda: m.memcpy(0, bytes(64)),
        "memset": lambda: m.memset(0, 1, 64),
        "flush": lambda: m.flush(0, 64),
    }
    turns, running = 0, True

    async def other() -> None:
        nonlocal turns
        while running:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(other())
    await asyncio.sleep(0)
    submitted, calls = apmem2.statistics().submitted, 10_240
    for _ in range(calls):
        await work[ask]()
    running = False
    await counting
    budget = calls * (64 + runtime.EACH) // runtime._BREATH
    assert budget - 1 <= turns <= budget + 3
    assert apmem2.statistics().submitted == submitted  # all of it ran here
    await m.aclose()


@pytest.mark.asyncio
async def test_a_tight_loop_of_flushes_at_page_granularity_gives_others_their_turn(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        turns, running = 0, True

        async def other() -> None:
            nonlocal turns
            while running:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(other())
        await asyncio.sleep(0)
        for _ in range(320):
            await m.flush(0, 64)
        running = False
        await counting
        assert turns >= 15
        await m.drain()


def test_inline_bytes_max_of_zero_sends_everything_to_the_pool(run_program: Any) -> None:
    run_program(
        """
import asyncio, os, warnings, apmem2
warnings.simplefilter("ignore", apmem2.DurabilityWarning)
apmem2.configure(inline_bytes_max=0)
os.environ["PMEM2_FORCE_GRANULARITY"] = "CACHE_LINE"

async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        before = apmem2.statistics().submitted
        await m.memcpy(0, b"abc")
        await m.memset(3, 1, 1)
        await m.persist(0, 4)
        await m.flush(0, 4)
        await m.drain()
        assert apmem2.statistics().submitted >= before + 4
        assert bytes(m[:4]) == b"abc\\x01"

asyncio.run(main())
"""
    )


# ---- settings and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 3},
        {"threads": 1025},
        {"threads": True},
        {"threads": "4"},
        {"jobs_max": 0},
        {"jobs_max": (1 << 20) + 1},
        {"inline_bytes_max": -1},
        {"copy_bytes_max": -1},
        {"copy_bytes_max": 1.5},
    ],
)
def test_configure_refuses_what_is_out_of_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        apmem2.configure(**wrong)


def test_configure_comes_before_the_first_use_or_not_at_all(run_program: Any) -> None:
    run_program(
        """
import asyncio, dataclasses, apmem2
first = apmem2.configure(threads=6, inline_bytes_max=100, jobs_max=7, copy_bytes_max=0)
assert (first.threads, first.inline_bytes_max, first.jobs_max, first.copy_bytes_max) == (6, 100, 7, 0)
second = apmem2.configure(threads=7)
assert (second.threads, second.jobs_max) == (7, 7) and first.threads == 6
try:
    first.threads = 9
except dataclasses.FrozenInstanceError:
    pass
else:
    raise SystemExit("settings changed")

async def main():
    async with apmem2.open("a", size=4096) as m:
        try:
            apmem2.configure(threads=6)
        except RuntimeError as error:
            assert "before the first" in str(error)
        else:
            raise SystemExit("configured too late")
        await asyncio.gather(*(m.persist() for _ in range(20)))
        from apmem2.core import runtime
        assert len(runtime.bridge()._slots) <= 7

asyncio.run(main())
assert apmem2.core.config.settle().threads == 7
"""
    )


def test_importing_and_looking_at_the_numbers_starts_nothing(run_program: Any) -> None:
    run_program(
        """
import os, threading
import asyncio, cffi, sortedcontainers
before, tasks = sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
import apmem2
numbers = apmem2.statistics()
assert numbers.submitted == numbers.threads == numbers.in_flight == 0 and numbers.jobs_per_round == 0.0
assert apmem2.mappings() == [] and apmem2.find(1, 1 << 47) is None
apmem2.configure(threads=6)
apmem2.Source.from_path("nowhere")
apmem2.Source.from_fd(0)
apmem2.Source.anonymous(1)
assert sorted(os.listdir("/proc/self/fd")) == before
assert len(os.listdir("/proc/self/task")) == tasks == threading.active_count() == 1
"""
    )


@pytest.mark.asyncio
async def test_statistics_are_a_snapshot_that_does_not_move(directory: Path, faults: Any) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m:
        before = apmem2.statistics()
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.submitted = 0  # type: ignore[misc]
        seen = dataclasses.asdict(before)
        faults.hold("msync")
        task = asyncio.ensure_future(m.persist(0, 100))
        await faults.held()
        during = apmem2.statistics()
        assert (during.in_flight, during.submitted, during.completed) == (1, before.submitted + 1, before.completed)
        assert during.oldest_round_s > 0
        faults.release()
        await task
        after = apmem2.statistics()
        assert dataclasses.asdict(before) == seen
        assert (after.in_flight, after.completed, after.failed) == (0, before.completed + 1, before.failed)
        assert after.bytes_persisted == before.bytes_persisted + 100
        assert after.latency_max_s >= after.latency_mean_s > 0
        assert after.jobs_per_round == after.round_jobs / after.rounds


@pytest.mark.asyncio
async def test_failed_and_withdrawn_jobs_are_counted_as_such(directory: Path, faults: Any) -> None:
    m = await apmem2.open(directory / "a", size=PAGE)
    before = apmem2.statistics()
    faults.hold("msync")
    faults.fail("msync", 5)
    failing = asyncio.ensure_future(m.persist(0, 1))
    await faults.held()
    withdrawn = asyncio.ensure_future(m.persist(0, 1))
    await until(lambda: apmem2.statistics().submitted == before.submitted + 2)
    withdrawn.cancel()
    await asyncio.wait([withdrawn])
    faults.release()
    with pytest.raises(apmem2.PersistError):
        await failing
    after = apmem2.statistics()
    assert (after.failed, after.withdrawn) == (before.failed + 1, before.withdrawn + 1)
    await m.aclose()


# ---- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_loop_has_one_bridge_and_another_loop_another() -> None:
    mine = runtime.bridge()
    assert runtime.bridge() is mine
    others: list[runtime.Bridge] = []

    async def elsewhere() -> None:
        await noop()
        others.append(runtime.bridge())

    def run() -> None:
        asyncio.run(elsewhere())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert others[0] is not mine
    assert others[0].loop.is_closed()
    await noop()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nothing_is_called_in_a_loop_that_was_closed_with_work_in_flight(
    directory: Path, faults: Any, new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = asyncio.run(_opened(directory / "a"))
    loop = new_loop()
    bridges: list[runtime.Bridge] = []

    async def start() -> None:
        bridges.append(runtime.bridge())
        faults.hold("msync")
        await m.flush(0, 1)
        await faults.held()
        waiting.append(asyncio.ensure_future(m.persist(0, 1)))
        for _ in range(5):
            await asyncio.sleep(0)

    waiting: list[Any] = []
    loop.run_until_complete(start())
    loop.close()
    (bridge,) = bridges
    called: list[str] = []
    monkeypatch.setattr(bridge, "loop", _Watched(loop, called))
    faults.release()
    while apmem2.statistics().in_flight:
        pass

    async def later() -> None:
        assert runtime.bridge() is not bridge
        assert bridge not in runtime._bridges  # let go, with its descriptor
        assert bridge.in_flight() == []
        await m.persist()
        await m.aclose()

    asyncio.run(later())
    assert called == []
    assert not waiting[0].done()


class _Watched:
    """A closed loop that writes down what is called on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, called: list[str]) -> None:
        self._loop = loop
        self._called = called

    def __getattr__(self, name: str) -> Any:
        if name != "is_closed":
            self._called.append(name)
        return getattr(self._loop, name)


async def _opened(path: Path) -> apmem2.Map:
    return await apmem2.open(path, size=PAGE)


def test_a_bridge_with_work_in_flight_is_kept_until_that_has_ended(directory: Path, faults: Any) -> None:
    m = asyncio.run(_opened(directory / "a"))
    kept: list[runtime.Bridge] = []

    async def start() -> None:
        kept.append(runtime.bridge())
        faults.hold("msync")
        await m.flush(0, 1)
        await faults.held()

    async def between() -> None:
        await noop()
        assert kept[0] in runtime._bridges

    async def after() -> None:
        await noop()
        assert kept[0] not in runtime._bridges
        await m.aclose()

    asyncio.run(start())
    asyncio.run(between())
    faults.release()
    while apmem2.statistics().in_flight:
        pass
    asyncio.run(after())


def test_waking_somebody_whose_loop_is_closed_says_so() -> None:
    async def waiter() -> runtime.Waiter:
        return runtime.Waiter()

    assert asyncio.run(waiter()).wake() is False


def test_the_runtime_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        runtime.bridge()


@pytest.mark.asyncio
async def test_a_loop_whose_bridge_cannot_be_made_says_why_and_leaks_nothing(faults: Any) -> None:
    """No descriptor for the eventfd."""
    faults.fail("eventfd", 24)
    known, fds = len(runtime._bridges), len(os.listdir("/proc/self/fd"))
    runtime._here.bridge = None
    with pytest.raises(apmem2.PmemError) as caught:
        await apmem2.Source.from_path("/nowhere").size()
    assert caught.value.code == -24
    assert len(os.listdir("/proc/self/fd")) <= fds
    assert len(runtime._bridges) <= known
    await noop()


def test_the_defaults_are_inside_their_own_bounds() -> None:
    settings = config.Settings()
    assert 2 <= settings.threads <= 1024
    assert 1 <= settings.jobs_max <= 1 << 20


@pytest.mark.asyncio
async def test_completions_are_settled_a_few_at_a_time(directory: Path, faults: Faults) -> None:
    """Else whoever else is on the loop would wait for all the tasks that a round wakes."""
    count = 400
    async with apmem2.open(directory / "a", size=PAGE) as m:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()
        awake = 0

        async def one() -> None:
            nonlocal awake
            await m.persist(0, 1)
            awake += 1

        tasks = [asyncio.ensure_future(one()) for _ in range(count)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        faults.release()
        seen: list[int] = []
        while awake < count:
            await asyncio.sleep(0)
            if not seen or seen[-1] != awake:
                seen.append(awake)
        await asyncio.gather(first, *tasks)
        steps = [after - before for before, after in itertools.pairwise(seen)]
        assert max(steps) <= 100


@pytest.mark.asyncio
async def test_persists_of_the_tasks_that_a_round_wakes_share_the_next_one(directory: Path, faults: Faults) -> None:
    count = 200
    async with apmem2.open(directory / "a", size=PAGE) as m:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()

        async def one() -> None:
            await m.persist(0, 1)
            await m.persist(0, 1)

        tasks = [asyncio.ensure_future(one()) for _ in range(count)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        faults.release()
        await asyncio.gather(first, *tasks)
        counted = m.statistics()
        assert (counted.rounds, counted.round_jobs) == (3, 1 + 2 * count)


def test_short_copies_beyond_the_slots_arrive_whole(run_program: Any) -> None:
    """What did not fit is joined again, with whatever leaves with it then."""
    run_program(
        """
import asyncio, apmem2
apmem2.configure(jobs_max=3)

async def main():
    async with apmem2.open("a", size=1 << 20) as m:
        data = [bytes([n % 251]) * (n % 97 + 1) for n in range(2000)]
        await asyncio.gather(*(m.memcpy(n * 128, each) for n, each in enumerate(data)))
        assert all(m[n * 128 : n * 128 + len(each)] == each for n, each in enumerate(data))

asyncio.run(main())
"""
    )
