"""What does a small persist wait for while a long one is under way: of another map of its file, or of another file?

A long persist is cut into pieces, and a small one of the same file may have to wait for one of them, never for all. One
of another file waits for nothing of ours: what is left then is the device, which both share, and no library can help.
Only the persist is timed, not the store before it, which may fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import median
from time import perf_counter, perf_counter_ns

import apmem2

from .context import Context, Entry, random_pages
from .harness import MIB, PAGE, Rounds, Row, microseconds, percentile

PIECE = 4 * MIB  # what the core hands to one msync of a long persist
SMALL = 1 * MIB  # where the small ones go
DATA = (b"\x05" * PAGE, b"\x06" * PAGE)
FILLS = (b"\x07" * MIB, b"\x08" * MIB)


async def small_persists(m: apmem2.Map, count: int, until: asyncio.Task[None] | None = None) -> list[float]:
    """Nanoseconds of one-page persists, one after the other: count of them, or as many as end up beside `until`."""
    took: list[float] = []
    while not until.done() if until is not None else len(took) < count:
        (offset,) = random_pages(SMALL, 1)
        m[offset : offset + PAGE] = DATA[len(took) % 2]
        began = perf_counter_ns()
        await m.persist(offset, PAGE)
        took.append(perf_counter_ns() - began)
    return took


def make_dirty(m: apmem2.Map, offset: int, size: int, turn: int) -> None:
    """Store into every page of a range."""
    for at in range(offset, offset + size, MIB):
        m[at : at + min(MIB, offset + size - at)] = FILLS[turn % 2][: min(MIB, offset + size - at)]


class Beside:
    """Small persists alone and beside long ones, in turns."""

    def __init__(self, c: Context) -> None:
        self.rounds = Rounds(c.device)
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.worst: list[float] = []
        self.long_s: list[float] = []

    async def turn(self, large: apmem2.Map, offset: int, size: int, small: apmem2.Map) -> None:
        """One long persist of [offset, offset + size) with small ones meanwhile, then as many alone."""
        make_dirty(large, offset, size, len(self.worst))
        with self.rounds:
            began = perf_counter()
            long = asyncio.create_task(large.persist(offset, size))
            await asyncio.sleep(0)  # it is accepted first
            took = await small_persists(small, 0, long)
            await long
            self.long_s.append(perf_counter() - began)
        with self.rounds:
            self.alone += await small_persists(small, max(len(took), 50))
        self.beside += took
        self.worst.append(max(took))

    def note(self) -> str:
        """How long, how many."""
        milliseconds = median(self.long_s) * 1000
        return f"{len(self.beside)} small ones beside {len(self.long_s)} long ones of {milliseconds:.0f} ms"

    def row(self, name: str, against: str, ours: float, theirs: float) -> Row:
        """One ratio of these."""
        row = Row(name, against, microseconds(ours), microseconds(theirs), ours / theirs, note=self.note())
        return self.rounds.book(row)


def quantile_rows(found: Beside, what: str, against: str, percents: Sequence[int]) -> list[Row]:
    """p50, p99: beside the long ones against alone."""
    rows = []
    for percent in percents:
        ours, theirs = percentile(found.beside, percent), percentile(found.alone, percent)
        rows.append(found.row(f"{what}: p{percent}", against, ours, theirs))
    return rows


async def same_file(c: Context) -> list[Row]:
    """Another map of the same file, 256 MiB: the worst that law 11 allows."""
    dirty = c.scale.dirty_bytes
    piece = min(PIECE, dirty)
    with c.scratch() as path:
        file, bare = path(), c.written(path(), 4 * piece, PAGE)
        with c.loop_on(bare, 4 * piece, "drop", f"adjacent:{piece // PAGE}") as limit:
            async with (
                apmem2.open(file, SMALL + dirty) as large,
                apmem2.map_new(
                    apmem2.Source.from_path(file), required_granularity=apmem2.Granularity.PAGE, length=SMALL
                ) as small,
            ):
                await small.populate()
                found = Beside(c)
                pieces: list[float] = []
                for _ in range(max(1, min(5, c.scale.alternations))):
                    pieces += limit.run(2)
                    await found.turn(large, SMALL, dirty, small)
    what = f"1-page persist beside {dirty // MIB} MiB of the same file"
    limit_name = f"C loop, store + msync of one piece ({piece // MIB} MiB)"
    return [
        found.row(f"{what}: worst", limit_name, median(found.worst), median(pieces)),
        found.row(f"{what}: p50", limit_name, median(found.beside), median(pieces)),
        *quantile_rows(found, what, "the same on a quiet file", (50, 99)),
    ]


async def other_file(c: Context) -> list[Row]:
    """A long persist of one file, small ones of another."""
    rows: list[Row] = []
    for size in c.scale.large_bytes:
        with c.scratch() as path:
            async with apmem2.open(path(), size) as large, apmem2.open(path(), SMALL) as small:
                await small.populate()
                found = Beside(c)
                for _ in range(max(1, min(5 if size <= 256 * MIB else 2, c.scale.alternations))):
                    await found.turn(large, 0, size, small)
        what = f"1-page persist beside {size // MIB} MiB of another file"
        rows += quantile_rows(found, what, "the same on a quiet device", (50, 99))
    return rows


ENTRIES = [Entry("same", same_file), Entry("other", other_file)]
