"""The registry: the fair lock for all loops and threads, and the table of who has which memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from apmem2.core.registry import FairLock, Registry

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def waiting(lock: FairLock) -> int:
    return len(lock._queue)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread or task. The test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def enter(lock: FairLock, note: Callable[[], None] = lambda: None) -> None:
    async with lock:
        note()


async def is_free(lock: FairLock) -> None:
    """It can be had, and had again."""
    for _ in range(2):
        await asyncio.wait_for(enter(lock), 30)
    assert waiting(lock) == 0


class InThread:
    """A coroutine in a loop of a thread of its own."""

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]], loop: str = "asyncio") -> None:
        self.error: BaseException | None = None
        self._run = run
        self._loop = LOOPS[loop]
        self.thread = threading.Thread(target=self._main)
        self.thread.start()

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop) as runner:
                runner.run(self._run())
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


# ---- the lock ----


@pytest.mark.asyncio
async def test_nobody_is_inside_beside_another() -> None:
    lock, inside = FairLock(), [0]

    async def one() -> None:
        for _ in range(10):
            async with lock:
                inside[0] += 1
                await asyncio.sleep(0)
                assert inside[0] == 1
                await asyncio.sleep(0)
                inside[0] -= 1

    await asyncio.gather(*(one() for _ in range(20)))
    await is_free(lock)


@pytest.mark.asyncio
async def test_first_come_is_first_served() -> None:
    lock, order = FairLock(), list[int]()
    async with lock:
        tasks = []
        for number in range(20):
            tasks.append(asyncio.ensure_future(enter(lock, lambda number=number: order.append(number))))
            await until(lambda number=number: waiting(lock) == number + 1)
    await asyncio.gather(*tasks)
    assert order == list(range(20))


@pytest.mark.asyncio
async def test_who_leaves_and_comes_again_goes_to_the_end() -> None:
    lock, order = FairLock(), list[str]()

    async def one(name: str) -> None:
        for _ in range(3):
            async with lock:
                order.append(name)
                await asyncio.sleep(0)

    async with lock:
        tasks = [asyncio.ensure_future(one(name)) for name in "abc"]
        await until(lambda: waiting(lock) == 3)
    await asyncio.gather(*tasks)
    assert "".join(order) == "abc" * 3


@pytest.mark.parametrize("loop", LOOPS)
def test_first_come_is_first_served_across_loops_and_threads(loop: str) -> None:
    lock, order = FairLock(), list[int]()

    async def main() -> None:
        threads = []
        async with lock:
            for number in range(8):
                threads.append(InThread(lambda number=number: enter(lock, lambda: order.append(number)), loop))
                await until(lambda number=number: waiting(lock) == number + 1)
            assert order == []
        for one in threads:
            await asyncio.to_thread(one.join)
        await is_free(lock)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    assert order == list(range(8))


@pytest.mark.parametrize("loop", LOOPS)
def test_threads_take_turns_under_load(loop: str) -> None:
    lock, inside, entered = FairLock(), [0], [0]

    async def one() -> None:
        for _ in range(50):
            async with lock:
                inside[0] += 1
                await asyncio.sleep(0)
                assert inside[0] == 1
                entered[0] += 1
                inside[0] -= 1

    async def several() -> None:
        await asyncio.gather(*(one() for _ in range(5)))

    threads = [InThread(several, loop) for _ in range(4)]
    for thread in threads:
        thread.join()
    assert entered[0] == 4 * 5 * 50
    assert waiting(lock) == 0


@pytest.mark.asyncio
async def test_a_loop_whose_task_waits_goes_on() -> None:
    """The waiter waits in its loop: its thread is free for others."""
    lock, turns, stop = FairLock(), [0], threading.Event()

    async def other() -> None:
        task = asyncio.ensure_future(enter(lock))
        while not stop.is_set():
            turns[0] += 1
            await asyncio.sleep(0)
        await task

    async with lock:
        thread = InThread(other)
        await until(lambda: waiting(lock) == 1)
        seen = turns[0]
        await until(lambda: turns[0] > seen + 100)
    stop.set()
    await asyncio.to_thread(thread.join)


@pytest.mark.asyncio
async def test_an_exception_inside_gives_the_turn_on() -> None:
    lock = FairLock()

    async def fails() -> None:
        async with lock:
            await until(lambda: waiting(lock) == 1)
            raise ValueError("inside")

    failing, behind = asyncio.ensure_future(fails()), asyncio.ensure_future(enter(lock))
    with pytest.raises(ValueError, match="inside"):
        await failing
    await behind
    await is_free(lock)


@pytest.mark.asyncio
async def test_a_holder_that_is_cancelled_gives_the_turn_on() -> None:
    lock, never = FairLock(), asyncio.Event()

    async def holds() -> None:
        async with lock:
            await never.wait()

    holder = asyncio.ensure_future(holds())
    behind = asyncio.ensure_future(enter(lock))
    await until(lambda: waiting(lock) == 1)
    holder.cancel()
    await behind
    assert holder.cancelled()
    await is_free(lock)


@pytest.mark.asyncio
async def test_a_cancelled_waiter_is_passed_over() -> None:
    lock, order = FairLock(), list[int]()
    async with lock:
        tasks = [asyncio.ensure_future(enter(lock, lambda number=number: order.append(number))) for number in range(5)]
        await until(lambda: waiting(lock) == 5)
        for number in (0, 2, 4):
            tasks[number].cancel()
        await asyncio.wait([tasks[number] for number in (0, 2, 4)])
        assert waiting(lock) == 2
        assert order == []
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 3]
    assert [task.cancelled() for task in tasks] == [True, False, True, False, True]
    await is_free(lock)


@pytest.mark.parametrize("ticks", [0, 1, 2])
@pytest.mark.asyncio
async def test_a_waiter_cancelled_at_the_moment_of_its_turn_passes_it_on(ticks: int) -> None:
    """Its turn has been given to it, and is on the way to its loop; it never enters."""
    lock, order = FairLock(), list[int]()
    async with lock:
        first = asyncio.ensure_future(enter(lock, lambda: order.append(1)))
        second = asyncio.ensure_future(enter(lock, lambda: order.append(2)))
        await until(lambda: waiting(lock) == 2)
    for _ in range(ticks):
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first, second], timeout=30)
    assert second.done()
    assert not second.cancelled()
    assert order == ([2] if first.cancelled() else [1, 2])
    assert first.cancelled() or ticks > 0
    await is_free(lock)


@pytest.mark.asyncio
async def test_a_waiter_cancelled_together_with_the_holders_leaving_from_another_thread_loses_no_turn() -> None:
    lock = FairLock()
    entered = [0]

    async def one() -> None:
        async with lock:
            entered[0] += 1

    async def other() -> None:
        for number in range(300):
            tasks = [asyncio.ensure_future(one()) for _ in range(3)]
            for _ in range(number % 4):
                await asyncio.sleep(0)
            tasks[number % 3].cancel()
            await asyncio.wait(tasks)

    threads = [InThread(other, loop) for loop in ("asyncio", "uvloop", "asyncio", "uvloop")]
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert entered[0] >= 4 * 300 * 2
    await is_free(lock)


def _left_waiting(lock: FairLock, count: int = 1) -> tuple[asyncio.AbstractEventLoop, list[asyncio.Task[None]]]:
    """A loop that stopped while its tasks wait for the lock."""
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(enter(lock)) for _ in range(count)]
    loop.run_until_complete(until(lambda: waiting(lock) == count))
    return loop, tasks


def _be_quiet(tasks: list[asyncio.Task[None]]) -> None:
    """asyncio would complain that they were destroyed while they wait: that is what is tested here."""
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_waiter_whose_loop_was_closed_is_passed_over() -> None:
    lock, order = FairLock(), list[str]()

    async def main() -> None:
        async with lock:
            loop, tasks = await asyncio.to_thread(_left_waiting, lock, 2)
            loop.close()
            behind = asyncio.ensure_future(enter(lock, lambda: order.append("behind")))
            await until(lambda: waiting(lock) == 3)
        await asyncio.wait_for(behind, 30)
        _be_quiet(tasks)
        del tasks
        gc.collect()  # their coroutines are closed now: that takes no turn from anybody
        await is_free(lock)

    asyncio.run(main())
    assert order == ["behind"]


def test_a_waiter_whose_loop_is_closed_on_the_way_of_its_turn_passes_it_on_when_it_is_collected() -> None:
    lock, order = FairLock(), list[str]()

    async def main() -> None:
        async with lock:
            loop, tasks = await asyncio.to_thread(_left_waiting, lock)
            behind = asyncio.ensure_future(enter(lock, lambda: order.append("behind")))
            await until(lambda: waiting(lock) == 2)
        loop.close()  # the turn was handed to it, and it did not run again
        _be_quiet(tasks)
        del tasks, loop
        while not behind.done():  # again and again: the thread that made them may hold them for a moment yet
            gc.collect()
            await asyncio.sleep(0)
        await is_free(lock)

    asyncio.run(main())
    assert order == ["behind"]


def test_a_coroutine_that_is_collected_while_the_lock_is_busy_with_itself_does_not_stop_it() -> None:
    """A collection comes at any moment: also in the middle of an operation of the lock, on the same thread. There it
    closes abandoned coroutines that wait for that very lock; a mutex that is not reentrant stood still for ever."""
    done = threading.Event()

    def run() -> None:
        lock = FairLock()

        async def main() -> None:
            async with lock:
                loop, tasks = await asyncio.to_thread(_left_waiting, lock)
                alive = weakref.ref(tasks[0])
            loop.close()  # its turn was handed to it, and it did not run again
            _be_quiet(tasks)
            del tasks, loop
            while alive() is not None:
                with lock._mutex:
                    gc.collect()
                await asyncio.sleep(0)
            await is_free(lock)

        asyncio.run(main())
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(20), "the lock waits for itself"


# ---- the table ----


class Owner:
    """Whoever memory belongs to."""


def test_what_was_added_is_found_by_any_byte_of_it() -> None:
    registry: Registry[Owner] = Registry()
    owner = Owner()
    assert registry.add(owner, 100, 10) is not None
    assert [registry.find(address, 1) is owner for address in (99, 100, 109, 110)] == [False, True, True, False]
    assert registry.find(0, 100) is None
    assert registry.find(0, 101) is owner
    assert registry.find(105, 0) is None


def test_what_overlaps_is_not_added_and_what_touches_is() -> None:
    registry: Registry[Owner] = Registry()
    low, high, other = Owner(), Owner(), Owner()
    assert registry.add(low, 100, 10) is not None
    assert registry.add(other, 109, 1) is None
    assert registry.add(other, 0, 101) is None
    assert registry.add(high, 110, 10) is not None
    assert registry.owners() == [low, high]
    assert registry.find(0, 1000) is low


def test_an_entry_is_removed_once_and_leaves_its_place() -> None:
    registry: Registry[Owner] = Registry()
    first, second = Owner(), Owner()
    entry = registry.add(first, 100, 10)
    assert entry is not None
    assert registry.remove(entry) is True
    assert registry.remove(entry) is False
    assert registry.add(second, 100, 10) is not None
    assert registry.remove(entry) is False  # an equal range is not the same entry
    assert registry.owners() == [second]


def test_an_owner_that_is_gone_is_in_nobodys_way() -> None:
    registry: Registry[Owner] = Registry()
    owner = Owner()
    entry = registry.add(owner, 100, 10)
    assert entry is not None
    del owner
    assert registry.owners() == []
    assert registry.find(100, 1) is None
    assert registry.add(Owner(), 105, 10) is not None


def test_an_owner_whose_end_was_noted_is_in_nobodys_way() -> None:
    registry: Registry[Owner] = Registry()
    owner, other = Owner(), Owner()
    entry = registry.add(owner, 100, 10)
    assert entry is not None
    registry.forget(entry)
    assert registry.overlapping(100, 10) is None
    assert registry.add(other, 100, 10) is not None
    registry.forget(entry)  # late: the place has another owner by now
    assert registry.owners() == [other]


def test_a_collection_in_the_middle_of_an_operation_only_leaves_a_note() -> None:
    """The mutex is held by the very thread that collects: whoever waited for it would wait for ever."""
    registry: Registry[Owner] = Registry()
    owner = Owner()
    entry = registry.add(owner, 100, 10)
    assert entry is not None
    with registry._mutex:
        registry.forget(entry)
        assert len(registry._table) == 1
    assert registry.owners() == []
    assert len(registry._table) == 0


def test_threads_that_add_one_range_have_one_winner() -> None:
    registry: Registry[Owner] = Registry()
    barrier = threading.Barrier(8)
    owners = [Owner() for _ in range(8)]
    won = list[tuple[int, int]]()

    def run(number: int) -> None:
        for turn in range(200):
            barrier.wait()
            if registry.add(owners[number], turn * 10 + number % 3, 8) is not None:
                won.append((turn, number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turn for turn, _ in won) == list(range(200))
