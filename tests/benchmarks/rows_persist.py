"""One page made durable by one task: what do we add to the bare system call?"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import apmem2
from apmem2.core import runtime
from apmem2.core.errors import error_of
from apmem2.native import ffi, lib

from .context import Context, Entry, plain_mapping, random_pages, scattered_pages
from .harness import (
    MIB,
    PAGE,
    Goal,
    Rounds,
    Row,
    interleave,
    median_ratio,
    microseconds,
    percentile,
)

DATA = os.urandom(PAGE)


async def copy_pages(m: apmem2.Map, offsets: Sequence[int]) -> list[float]:
    """Nanoseconds of each durable one-page memcpy."""
    took: list[float] = []
    for offset in offsets:
        began = perf_counter_ns()
        await m.memcpy(offset, DATA)
        took.append(perf_counter_ns() - began)
    return took


async def store_and_persist(m: apmem2.Map, offsets: Sequence[int]) -> list[float]:
    """Nanoseconds of each store into a page and its persist."""
    took: list[float] = []
    view = m.view
    for offset in offsets:
        began = perf_counter_ns()
        view[offset : offset + PAGE] = DATA
        await m.persist(offset, PAGE)
        took.append(perf_counter_ns() - began)
    return took


async def round_trips(count: int, pause_ns: float = 0) -> list[float]:
    """Nanoseconds of each empty job: to a thread of the pool and back. After a pause the processors have gone to sleep,
    as they have while a disk works."""
    took: list[float] = []
    for _ in range(count):
        if pause_ns:
            time.sleep(pause_ns / 1e9)  # noqa: ASYNC251 - the loop has nothing else to do
        began = perf_counter_ns()
        await runtime.control(lib.APM_JOB_NOOP, ffi.NULL, lambda code: error_of(code, "an empty job"))
        took.append(perf_counter_ns() - began)
    return took


def p50(samples: Sequence[Sequence[float]]) -> float:
    """Over all pieces."""
    return median(one for piece in samples for one in piece)


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    """Of each piece: what one operation takes. A mean would be the scheduler's, whenever somebody else is busy; the
    tail has rows of its own."""
    return [median(piece) for piece in samples]


def pieces(c: Context) -> tuple[int, int]:
    """(how many, how long): the shorter they are, the more both sides see of the same weather."""
    return c.scale.alternations * 4, max(4, c.scale.operations // 4)


def by_four(samples: Sequence[list[float]]) -> list[list[float]]:
    """Four neighbouring pieces as one: a tail needs more samples than a median."""
    return [[one for piece in samples[at : at + 4] for one in piece] for at in range(0, len(samples), 4)]


async def memcpy_one_page(c: Context) -> list[Row]:
    """Against pwritev2(RWF_DSYNC), an empty round trip, and store + msync on large folios."""
    size, (times, count) = c.scale.file_bytes, pieces(c)
    with c.scratch() as path:
        small = c.written(path(), size, PAGE)
        large = c.written(path(), size, MIB)
        large_too = c.written(path(), size, MIB)
        with (
            c.loop_on(small, size, "keep", "dsync") as dsync,
            c.loop_on(large, size, "keep", "msync") as msync,
            c.loop_on(large_too, size, "keep", "dsync") as dsync_large,
        ):
            async with apmem2.open(path(), size) as m:
                await m.populate()
                await copy_pages(m, random_pages(size, count // 4 + 1))
                await round_trips(count // 4 + 1)
                rounds = Rounds(c.device)

                pause_ns = median(dsync.run(count))

                async def ours() -> tuple[list[float], list[float], list[float]]:
                    with rounds:
                        copies = await copy_pages(m, random_pages(size, count))
                    return copies, await round_trips(count), await round_trips(count, pause_ns)

                async def theirs() -> tuple[list[float], list[float], list[float]]:
                    return dsync.run(count), msync.run(count), dsync_large.run(count)

                await theirs()
                left, right = await interleave(times, ours, theirs)
    copies, trips, slow_trips = ([one[i] for one in left] for i in range(3))
    writes, large_syncs, large_writes = ([one[i] for one in right] for i in range(3))
    added = [one - other for one, other in zip(medians(copies), medians(writes), strict=True)]
    too_noisy = "" if median(added) > 0 else "measured below zero: this machine is too busy to tell"
    what = "memcpy + durable, 1 task, 1 page"
    rows = [
        Row(
            what,
            "C loop, pwritev2(RWF_DSYNC), 4 KiB-written file",
            microseconds(p50(copies)),
            microseconds(p50(writes)),
            median_ratio(medians(writes), medians(copies)),
            Goal(">=", 0.8),
        ),
        Row(
            f"{what}: latency added (p50)",
            "an empty native pool round trip",
            microseconds(median(added)),
            microseconds(p50(trips)),
            median_ratio(added, medians(trips)),
            Goal("<=", 1.5),
            void=too_noisy,
        ),
        Row(
            f"{what}: latency added (p50)",
            "the same after a pause as long as the write",
            microseconds(median(added)),
            microseconds(p50(slow_trips)),
            median_ratio(added, medians(slow_trips)),
        ),
        Row(
            what,
            "C loop, store + msync, 1 MiB-written file",
            microseconds(p50(copies)),
            microseconds(p50(large_syncs)),
            median_ratio(medians(large_syncs), medians(copies)),
            Goal(">=", 1.5),
        ),
        Row(
            what,
            "C loop, pwritev2(RWF_DSYNC), 1 MiB-written file",
            microseconds(p50(copies)),
            microseconds(p50(large_writes)),
            median_ratio(medians(large_writes), medians(copies)),
        ),
    ]
    return [rounds.book(row) for row in rows]


async def persist_one_page(c: Context) -> list[Row]:
    """Against store + msync on 4 KiB folios: throughput, and p99."""
    size, (times, count) = c.scale.file_bytes, pieces(c)
    with c.scratch() as path:
        bare = c.written(path(), size, PAGE)
        with c.loop_on(bare, size, "drop", "msync") as msync:
            async with apmem2.open(path(), size) as m:
                await m.populate()
                await store_and_persist(m, random_pages(size, count))
                msync.run(count)
                rounds = Rounds(c.device)

                async def ours() -> list[float]:
                    with rounds:
                        return await store_and_persist(m, random_pages(size, count))

                left, right = await interleave(times, ours, lambda: msync.turn(count))
    against = "C loop, store + msync, 4 KiB folios"
    rows = [
        Row(
            "persist after a store, 1 task, 1 page",
            against,
            microseconds(p50(left)),
            microseconds(p50(right)),
            median_ratio(medians(right), medians(left)),
            Goal(">=", 0.8),
        ),
        p99_row("p99 of a one-page persist, 1 task", against, by_four(left), by_four(right)),
    ]
    return [rounds.book(row) for row in rows]


def p99_row(name: str, against: str, left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> Row:
    """Median of the ratios of p99s."""
    tails, their_tails = ([percentile(one, 99) for one in side] for side in (left, right))
    return Row(
        name,
        against,
        microseconds(median(tails)),
        microseconds(median(their_tails)),
        median_ratio(tails, their_tails),
        Goal("<=", 2),
    )


async def p99_of_many(c: Context) -> list[Row]:
    """256 tasks on scattered pages, against one round of the bare loop over as many pages."""
    size, tasks, turns = c.scale.file_bytes, c.scale.tasks, c.scale.turns
    with c.scratch() as path:
        bare = c.written(path(), size, PAGE)
        with (
            c.loop_on(bare, size, "drop", f"round:{tasks}") as each,
            c.loop_on(bare, size, "drop", f"once:{tasks}") as once,
        ):
            async with apmem2.open(path(), size) as m:
                await m.populate()
                rounds = Rounds(c.device)

                async def ours() -> list[float]:
                    with rounds:
                        lists = await asyncio.gather(
                            *(store_and_persist(m, [offset] * turns) for offset in scattered_pages(size, tasks))
                        )
                    return [one for some in lists for one in some]

                async def theirs() -> tuple[list[float], list[float]]:
                    return each.run(turns), once.run(turns)

                await ours()
                await theirs()
                left, right = await interleave(c.scale.alternations, ours, theirs)
    name = f"p99 of a one-page persist, {tasks} tasks"
    row = p99_row(name, f"C loop, a round of {tasks}: store all, msync each", left, [one[0] for one in right])
    better = p99_row(name, f"C loop, a round of {tasks} with one flush", left, [one[1] for one in right])
    better.goal = None
    return [rounds.book(row), rounds.book(better)]


def dirty_bytes_mapped(address: int) -> int:
    """Bytes of the mapping that begins at address which are dirty, as the kernel's table tells."""
    inside = False
    total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = int(words[0].split("-")[0], 16) == address
        elif inside and words[0] in ("Shared_Dirty:", "Private_Dirty:"):
            total += int(words[1]) * 1024
    return total


async def beside_dirty_pages(c: Context) -> list[Row]:
    """One page, while a quarter of a gigabyte of the same file is dirty through somebody else's mapping."""
    dirty, region, count = c.scale.dirty_bytes, c.scale.file_bytes // 4, max(4, c.scale.operations // 5)
    rows: list[Row] = []
    with c.scratch() as path:
        file = path()
        async with apmem2.open(file, region + dirty) as m:
            await m.populate(0, region)
            with ExitStack() as stack:
                other = plain_mapping(stack, file, dirty, region)
                address = int(ffi.cast("uintptr_t", ffi.from_buffer(other)))
                patterns = (b"\x01" * MIB, b"\x02" * MIB)
                for name, run in (("persist after a store", store_and_persist), ("memcpy + durable", copy_pages)):
                    await run(m, random_pages(region, count))
                    rounds = Rounds(c.device)
                    clean: list[list[float]] = []
                    beside: list[list[float]] = []
                    left_dirty: list[int] = []
                    for turn in range(max(1, min(5, c.scale.alternations))):
                        with rounds:
                            clean.append(await run(m, random_pages(region, count)))
                        for at in range(0, dirty, MIB):
                            other[at : at + MIB] = patterns[turn % 2]
                        with rounds:
                            beside.append(await run(m, random_pages(region, count)))
                        left_dirty.append(dirty_bytes_mapped(address))
                        other.flush()
                    row = Row(
                        f"{name}, {dirty // MIB} MiB of the file dirty",
                        "the same on a clean file",
                        microseconds(p50(beside)),
                        microseconds(p50(clean)),
                        median_ratio(medians(beside), medians(clean)),
                        Goal("<=", 2),
                        note=f"worst {microseconds(max(map(max, beside)))}, clean {microseconds(max(map(max, clean)))}",
                    )
                    rounds.book(row)
                    if min(left_dirty) < dirty * 0.9:
                        row.void = f"written back meanwhile: only {min(left_dirty) // MIB} MiB were still dirty"
                    rows.append(row)
    return rows


ENTRIES = [
    Entry("memcpy", memcpy_one_page),
    Entry("persist", persist_one_page),
    Entry("p99", p99_of_many),
    Entry("dirty", beside_dirty_pages),
]
