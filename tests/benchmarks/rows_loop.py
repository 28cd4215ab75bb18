"""Many tasks on one loop: how near to the loop's own ceiling, how far above the remedy that people use, and does the
loop stay free for others?"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, nullcontext
from statistics import median
from time import perf_counter, perf_counter_ns

import apmem2

from .context import Context, Entry, Limits, Worker, plain_mapping, scattered_pages, small_folio_mapping
from .harness import MIB, PAGE, Goal, Rounds, Row, interleave, median_ratio, per_second, percentile

THREADS = 32
DATA = os.urandom(PAGE)
TICK_S = 0.001

Each = Callable[[int], Awaitable[object]]


async def rate(each: Each, tasks: int, turns: int) -> float:
    """Operations per second of tasks that do turns of `each(number of the task)`, one after the other."""

    async def one(number: int) -> None:
        for _ in range(turns):
            await each(number)

    began = perf_counter()
    await asyncio.gather(*(one(number) for number in range(tasks)))
    return tasks * turns / (perf_counter() - began)


async def released(_: int) -> None:
    """A future released by call_soon: what any operation on this loop costs at least."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.call_soon(future.set_result, None)
    await future


async def ceiling(c: Context) -> list[Row]:
    """memcpy of 64 B by 1,024 tasks."""
    tasks, turns = c.scale.many_tasks, c.scale.turns
    data = DATA[:64]
    with c.scratch() as path:
        async with apmem2.open(path(), c.scale.file_bytes) as m:
            rounds = Rounds(c.device)

            async def copy(number: int) -> None:
                await m.memcpy(number * 64, data)

            async def ours() -> float:
                with rounds:
                    return await rate(copy, tasks, turns)

            await ours()
            left, right = await interleave(c.scale.alternations, ours, lambda: rate(released, tasks, turns))
    row = Row(
        f"memcpy of 64 B + durable, {tasks:,} tasks",
        "the loop's ceiling: a future per operation, by call_soon",
        per_second(median(left)),
        per_second(median(right)),
        median_ratio(left, right),
        Goal(">=", 0.4),
    )
    return [rounds.book(row)]


@asynccontextmanager
async def default_threads(count: int) -> AsyncIterator[None]:
    """asyncio.to_thread with that many threads."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(count) as pool:
        loop.set_default_executor(pool)
        yield
    loop.set_default_executor(ThreadPoolExecutor())  # the loop shuts it down at its own end


async def many(c: Context) -> list[Row]:
    """persist and memcpy of adjacent ranges and of scattered pages against to_thread(mm.flush, page, 4096), which
    takes whole pages only.

    Both sides: folios of 4 KiB, as many tasks, as many operations of each, the same bytes stored. The note tells by how
    much the loop is faster than theirs that makes nothing durable, and the bare C loop that stores what all tasks store
    in one turn and makes it durable with one flush: no library that does the same is much faster than the slower.
    """
    size, tasks, turns = c.scale.file_bytes, c.scale.tasks, c.scale.turns
    rows: list[Row] = []
    with c.scratch() as path, ExitStack() as stack:
        mapping = small_folio_mapping(stack, c.written(path(), size, PAGE), size)
        bare = c.written(path(), size, PAGE)
        adjacent, scattered = (
            stack.enter_context(c.loop_on(bare, size, "drop", f"{operation}:{tasks}"))
            for operation in ("adjacent", "once")
        )
        kinds: tuple[tuple[str, int, int, list[int], Limits | None], ...] = (
            ("adjacent ranges of 64 B", 64, 60, [number * 64 for number in range(tasks)], None),
            ("adjacent pages", PAGE, 60, [number * PAGE for number in range(tasks)], adjacent),
            ("scattered pages", PAGE, 8, scattered_pages(size, tasks), scattered),
        )
        async with default_threads(min(THREADS, tasks)), apmem2.open(path(), size) as m:
            await m.populate()
            for where, length, bound, offsets, limit in kinds:
                flush, free = (
                    flush_in_thread(mapping, offsets, DATA[:length]),
                    store_only(mapping, offsets, DATA[:length]),
                )
                for name, each in many_ways(m, offsets, DATA[:length]):
                    rounds = Rounds(c.device)

                    async def ours(each: Each = each, rounds: Rounds = rounds) -> float:
                        with rounds:
                            return await rate(each, tasks, turns)

                    async def theirs(
                        flush: Each = flush, free: Each = free, limit: Limits | None = limit
                    ) -> tuple[float, float, float]:
                        bare_ns = median(limit.run(turns)) if limit is not None else math.inf
                        return await rate(flush, tasks, turns), await rate(free, tasks, turns), tasks / bare_ns * 1e9

                    await ours()
                    left, all_others = await interleave(max(5, c.scale.alternations), ours, theirs)
                    right, ceilings, limits = ([one[i] for one in all_others] for i in range(3))
                    threads = f"to_thread(mm.flush, page, 4096), {min(THREADS, tasks)} threads"
                    what = f"{name}, {where}, {tasks} tasks"
                    our_rate = per_second(median(left))
                    ratio = median_ratio(left, right)
                    note = f"the loop's ceiling with the same stores: {median_ratio(ceilings, right):.0f} x"
                    if limit is not None:
                        note += f", the bare C loop: {median_ratio(limits, right):.1f} x"
                    row = Row(what, threads, our_rate, per_second(median(right)), ratio, Goal(">=", bound), note)
                    rows.append(rounds.book(row))
                    if limit is not None:
                        row = Row(
                            what,
                            f"C loop, {tasks} {where}: store all, one flush",
                            our_rate,
                            per_second(median(limits)),
                            median_ratio(left, limits),
                        )
                        rows.append(rounds.book(row))
    return rows


def store_only(mapping: mmap.mmap, offsets: Sequence[int], data: bytes) -> Each:
    """Nothing is made durable: the same store, and a future that call_soon releases."""
    length = len(data)

    async def store(number: int) -> None:
        offset = offsets[number]
        mapping[offset : offset + length] = data
        await released(number)

    return store


def many_ways(m: apmem2.Map, offsets: Sequence[int], data: bytes) -> list[tuple[str, Each]]:
    """Ours: each task has a place of its own."""
    length = len(data)

    async def persist(number: int) -> None:
        offset = offsets[number]
        m[offset : offset + length] = data
        await m.persist(offset, length)

    async def copy(number: int) -> None:
        await m.memcpy(offsets[number], data)

    return [("persist after a store", persist), ("memcpy + durable", copy)]


def flush_in_thread(mapping: mmap.mmap, offsets: Sequence[int], data: bytes) -> Each:
    """Theirs: the page around the place."""
    length = len(data)

    async def flush(number: int) -> None:
        offset = offsets[number]
        mapping[offset : offset + length] = data
        await asyncio.to_thread(mapping.flush, offset // PAGE * PAGE, PAGE)

    return flush


class Ticker:
    """Wants to wake every millisecond, and notes by how many nanoseconds it is late. `async with` it."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def _tick(self) -> None:
        while True:
            due = perf_counter_ns() + TICK_S * 1e9
            await asyncio.sleep(TICK_S)
            self.late.append(max(0.0, perf_counter_ns() - due))

    async def __aenter__(self) -> Ticker:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(2 * TICK_S)
        self.late.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await asyncio.sleep(2 * TICK_S)
        self._task.cancel()
        await asyncio.wait((self._task,))

    @property
    def p99(self) -> float:
        """In nanoseconds."""
        return percentile(self.late, 99)


async def idle(seconds: float) -> Ticker:
    """The loop with nothing but the ticker."""
    async with Ticker() as ticker:
        await asyncio.sleep(seconds)
    return ticker


def milliseconds(ns: float) -> str:
    """For the columns of information."""
    return f"{ns / 1e6:.2f} ms"


async def lag(c: Context) -> list[Row]:
    """p99 lateness of a 1 ms ticker while 256 tasks make pages durable.

    What is "the same loop without persists"? By the word, the same tasks with the persists taken out: they store as
    they did, and each waits for a future that call_soon releases. But that would excuse whatever makes many tasks wake
    in one pass of the loop, which is partly ours. So the goal is held against the idle loop, which excuses nothing, and
    the other reading stands beside it.
    """
    size, tasks, seconds = c.scale.file_bytes, c.scale.tasks, c.scale.lag_s
    rows: list[Row] = []
    with c.scratch() as path:
        async with apmem2.open(path(), size) as m:
            await m.populate()
            offsets = scattered_pages(size, tasks)
            adjacent = [number * PAGE for number in range(tasks)]
            stores: list[float] = []

            async def persist(offset: int) -> None:
                began = perf_counter_ns()
                m[offset : offset + PAGE] = DATA
                stores.append(perf_counter_ns() - began)
                await m.persist(offset, PAGE)

            async def copy(offset: int) -> None:
                await m.memcpy(offset, DATA)

            async def store(offset: int) -> None:
                m[offset : offset + PAGE] = DATA
                await released(offset)

            async def busy(each: Each, where: list[int], seconds: float, rounds: Rounds | None = None) -> Ticker:
                end = perf_counter() + seconds

                async def one(offset: int) -> None:
                    while perf_counter() < end:
                        await each(offset)

                with rounds or nullcontext():
                    async with Ticker() as ticker:
                        await asyncio.gather(*(one(offset) for offset in where))
                return ticker

            for name, each, where, without in (
                ("memcpy, scattered", copy, offsets, released),
                ("memcpy, adjacent", copy, adjacent, released),
                ("store + persist, scattered", persist, offsets, store),
                ("store + persist, adjacent", persist, adjacent, store),
            ):
                stores.clear()
                rounds = Rounds(c.device)

                async def ours(each: Each = each, where: list[int] = where, rounds: Rounds = rounds) -> Ticker:
                    return await busy(each, where, seconds, rounds)

                async def theirs(without: Each = without, where: list[int] = where) -> tuple[Ticker, Ticker]:
                    return await idle(seconds / 2), await busy(without, where, seconds / 2)

                left, right = await interleave(max(3, c.scale.alternations // 2), ours, theirs)
                for against, side, goal in (
                    ("the idle loop", 0, Goal("<=", 1)),
                    ("the same tasks without it", 1, None),
                ):
                    more = [(ours.p99 - both[side].p99) / 1e6 for ours, both in zip(left, right, strict=True)]
                    row = Row(
                        f"p99 loop lag, {tasks} tasks: {name} (ms more)",
                        against,
                        milliseconds(median(one.p99 for one in left)),
                        milliseconds(median(both[side].p99 for both in right)),
                        median(more),
                        goal,
                        note=f"a store takes {median(stores) / 1000:.1f} µs of the loop" if stores and not side else "",
                    )
                    rows.append(rounds.book(row))
    return rows


async def stall(c: Context) -> list[Row]:
    """Worst lateness of the ticker while a 256 MiB flush runs. The kernel needs a processor for it, which delays any
    loop on the machine; so a ticker in another process is looked at as well, at the same moment."""
    dirty = c.scale.dirty_bytes
    patterns = (b"\x03" * MIB, b"\x04" * MIB)
    with c.scratch() as path:
        async with default_threads(THREADS), apmem2.open(path(), dirty) as m:
            bare = c.written(path(), dirty, MIB)
            with ExitStack() as stack:
                mapping = plain_mapping(stack, bare, dirty)
                await m.populate()
                rounds = Rounds(c.device)
                turns = [0, 0]

                def make_dirty(memory: memoryview | mmap.mmap, side: int) -> None:
                    turns[side] += 1
                    for at in range(0, dirty, MIB):
                        memory[at : at + MIB] = patterns[turns[side] % 2]

                async def ours() -> tuple[Ticker, float]:
                    make_dirty(m.view, 0)
                    with rounds:
                        async with Ticker() as ticker:
                            began = perf_counter()
                            await m.persist()
                            took = perf_counter() - began
                    return ticker, took

                async def theirs() -> tuple[Ticker, float]:
                    make_dirty(mapping, 1)
                    async with Ticker() as ticker:
                        began = perf_counter()
                        await asyncio.to_thread(mapping.flush)
                        took = perf_counter() - began
                    return ticker, took

                _, took_s = await ours()
                elsewhere = stack.enter_context(Worker("ticker"))
                beside: list[float] = []

                async def ours_beside() -> tuple[Ticker, float]:
                    elsewhere.tell(took_s)
                    found = await ours()
                    beside.append(max(elsewhere.answer()))
                    return found

                left, right = await interleave(max(1, min(5, c.scale.alternations)), ours_beside, theirs)
                idle_late = [(await idle(took)).late for _, took in left]
                quiet = [max(late) for late in idle_late]
    worst, their_worst = ([max(ticker.late, default=0.0) for ticker, _ in side] for side in (left, right))
    flush_s = median(took for _, took in left)
    name = f"worst loop lag while {dirty // MIB} MiB are persisted"
    note = f"persist {flush_s * 1000:.0f} ms, mm.flush {median(took for _, took in right) * 1000:.0f} ms"
    note += f"; the idle loop {milliseconds(median(quiet))}"
    # All ticks of all flushes, and as many of the idle loop, just after.
    busy_p99 = percentile([late for ticker, _ in left for late in ticker.late], 99)
    idle_p99 = percentile([late for each in idle_late for late in each], 99)
    rows = [
        Row(
            f"p99 loop lag while {dirty // MIB} MiB are persisted (ms more)",
            "the idle loop",
            milliseconds(busy_p99),
            milliseconds(idle_p99),
            (busy_p99 - idle_p99) / 1e6,
            Goal("<=", 1),
            note=note,
        ),
        Row(
            f"{name} (ms more)",
            "the loop of another process, meanwhile",
            milliseconds(median(worst)),
            milliseconds(median(beside)),
            median(ours - theirs for ours, theirs in zip(worst, beside, strict=True)) / 1e6,
        ),
        Row(
            name,
            "to_thread(mm.flush)",
            milliseconds(median(worst)),
            milliseconds(median(their_worst)),
            median_ratio(worst, their_worst),
        ),
    ]
    return [rounds.book(row) for row in rows]


ENTRIES = [Entry("ceiling", ceiling), Entry("many", many), Entry("lag", lag), Entry("stall", stall)]
