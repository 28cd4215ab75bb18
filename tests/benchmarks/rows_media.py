"""What reaches the device for a page, and what comes from it in a scan."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import apmem2

from .context import Context, Entry, plain_mapping, random_pages
from .harness import MIB, PAGE, Goal, Rounds, Row, interleave, median_ratio, microseconds
from .rows_persist import copy_pages, store_and_persist

SCAN_PIECE = 8 * MIB
READ_WHOLE = "import sys\nwith open(sys.argv[1], 'rb', buffering=0) as f:\n    while f.read(1 << 20): pass"


def read_by_another_process(path: os.PathLike[str]) -> None:
    """From its beginning to its end, as cat does."""
    subprocess.run([sys.executable, "-S", "-c", READ_WHOLE, str(path)], check=True)


def drop_cached(path: Path) -> None:
    """The next read comes from the device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def scan(m: apmem2.Map) -> float:
    """Nanoseconds for one byte of each page, in order: each piece is populated while the one before it is read."""
    view = m.view
    began = perf_counter_ns()
    ahead = asyncio.ensure_future(m.populate(0, min(SCAN_PIECE, len(m))))
    for at in range(0, len(m), SCAN_PIECE):
        after = min(at + SCAN_PIECE, len(m))
        await ahead
        if after < len(m):
            ahead = asyncio.ensure_future(m.populate(after, min(SCAN_PIECE, len(m) - after)))
        view[at:after:PAGE].tobytes()
    return perf_counter_ns() - began


async def device_bytes(c: Context) -> list[Row]:
    """Per persisted page, over the whole life of a file."""
    if not c.device:
        return [Row("device bytes per persisted page", "4 KiB", skipped="no block device below this directory")]
    size, count = c.scale.file_bytes, c.scale.operations
    rows: list[Row] = []

    async def measure(m: apmem2.Map, case: str, promised: bool = True) -> None:
        for name, run in (("persist", store_and_persist), ("memcpy", copy_pages)):
            rounds = Rounds(c.device)
            each: list[float] = []
            for _ in range(min(5, c.scale.alternations)):
                before = rounds.bytes_written
                with rounds:
                    await run(m, random_pages(size, count))
                each.append((rounds.bytes_written - before) / count)
            goal = Goal("<=", 1.2) if promised else None
            what = f"device bytes per page, {name}, {case}"
            rows.append(rounds.book(Row(what, "4 KiB", f"{median(each):,.0f} B", "4,096 B", median(each) / PAGE, goal)))

    with c.scratch() as path:
        file = path()
        async with apmem2.open(file, size) as m:
            await measure(m, "(a) fresh")
        async with apmem2.open(file, size) as m:
            await measure(m, "(b) opened anew")
        read_by_another_process(file)
        async with apmem2.open(file, size) as m:
            await measure(m, "(c) read by another process before")
        async with apmem2.open(file, size) as m:
            await scan(m)
            await measure(m, "(d) after our own scan")
        async with apmem2.open(file, size) as m:
            read_by_another_process(file)
            # Nothing can be done about that from here: whoever wants one page for one page then uses memcpy.
            await measure(m, "(c') read by another process while mapped", promised=False)
    return rows


async def cold_scan(c: Context) -> list[Row]:
    """Through a map, against a plain mapping that the kernel reads ahead for."""
    size = c.scale.scan_bytes
    with c.scratch() as path:
        file, bare = path(), path()
        c.written(file, size, MIB)
        c.written(bare, size, MIB)
        with c.loop_on(bare, size, "keep", "scan") as plain:

            async def ours() -> float:
                async with apmem2.open(file, size) as m:  # drops what is cached
                    return await scan(m)

            async def read_only() -> float:
                drop_cached(file)
                async with apmem2.map_new(
                    apmem2.Source.from_path(file),
                    required_granularity=apmem2.Granularity.PAGE,
                    protection=apmem2.Protection.READ,
                ) as m:
                    began = perf_counter_ns()
                    m.view[::PAGE].tobytes()
                    return perf_counter_ns() - began

            async def theirs() -> tuple[float, float]:
                return plain.run(1)[0], await read_only()

            await ours()
            await theirs()
            left, both = await interleave(max(5, c.scale.alternations), ours, theirs)
            right, reading = [one[0] for one in both], [one[1] for one in both]
    return [
        Row(
            f"cold sequential scan, {size // MIB} MiB",
            "C loop, a plain mapping",
            microseconds(median(left)),
            microseconds(median(right)),
            median_ratio(right, left),
            Goal(">=", 0.8),
        ),
        Row(
            f"cold sequential scan, {size // MIB} MiB, read-only map",
            "C loop, a plain mapping",
            microseconds(median(reading)),
            microseconds(median(right)),
            median_ratio(right, reading),
        ),
    ]


async def adopted_map(c: Context) -> list[Row]:
    """Somebody else's mapping of a file in large folios: a persisted page before and after the cure, and a scan."""
    if not c.device:
        return [Row("device bytes per persisted page", "4 KiB", skipped="no block device below this directory")]
    size, count = c.scale.scan_bytes, c.scale.operations
    rows: list[Row] = []
    with c.scratch() as path, ExitStack() as stack:
        file, bare = path(), path()
        c.written(file, size, MIB)
        c.written(bare, size, MIB)
        memory = plain_mapping(stack, file, size)
        plain = stack.enter_context(c.loop_on(bare, size, "keep", "scan"))
        async with apmem2.map_from_existing(memory) as m:

            async def measure(case: str, goal: Goal | None) -> None:
                rounds = Rounds(c.device)
                with rounds:
                    await store_and_persist(m, random_pages(size, count))
                each, told = rounds.bytes_written / count, await m.write_amplification()
                row = Row(f"device bytes per page, adopted map, {case}", "4 KiB", f"{each:,.0f} B", "4,096 B")
                row.ratio, row.goal, row.note = each / PAGE, goal, f"write_amplification() says {told}"
                rows.append(rounds.book(row))

            async def cold() -> float:
                memory.madvise(mmap.MADV_DONTNEED)
                drop_cached(file)
                return await scan(m)

            async def theirs() -> float:
                return plain.run(1)[0]

            await measure("large folios", None)
            began = perf_counter_ns()
            split = await m.split_folios(random_access=True)
            took = perf_counter_ns() - began
            await measure("after split_folios", Goal("<=", 1.2))
            rows[-1].note += f"; {split / MIB:.0f} MiB split in {microseconds(took)}"
            await cold()
            await theirs()
            left, right = await interleave(max(5, c.scale.alternations), cold, theirs)
            await measure("after split_folios and a cold scan", Goal("<=", 1.2))
        rows.append(
            Row(
                f"cold sequential scan, {size // MIB} MiB, adopted map after split_folios",
                "C loop, a plain mapping",
                microseconds(median(left)),
                microseconds(median(right)),
                median_ratio(right, left),
                Goal(">=", 0.8),
            )
        )
    return rows


ENTRIES = [Entry("bytes", device_bytes), Entry("scan", cold_scan), Entry("adopted", adopted_map)]
