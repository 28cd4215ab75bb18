"""At cache-line granularity no system call is left: what does an awaited persist cost then, and the C core alone?"""

from __future__ import annotations

import asyncio
import operator
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import apmem2
from apmem2.native import lib

from .context import HERE, ROOT, Context, Entry
from .harness import PAGE, Goal, Row, interleave, median_ratio
from .rows_loop import Ticker, idle, milliseconds


@contextmanager
def cache_lines() -> Iterator[None]:
    """Maps made in here work in cache lines, whatever the medium."""
    before = os.environ.get("PMEM2_FORCE_GRANULARITY")
    os.environ["PMEM2_FORCE_GRANULARITY"] = "CACHE_LINE"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", apmem2.DurabilityWarning)
            yield
    finally:
        del os.environ["PMEM2_FORCE_GRANULARITY"]
        if before is not None:
            os.environ["PMEM2_FORCE_GRANULARITY"] = before


class Checked:
    """The least that a safe persist could be: open? inside? then into C, which does nothing."""

    __slots__ = ("closed", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.closed = False

    async def persist(self, offset: int, size: int) -> None:
        """Checked as ours is."""
        if self.closed:
            raise apmem2.ClosedError("closed")
        start, length = operator.index(offset), operator.index(size)
        if start < 0 or length < 0 or start + length > self.size:
            raise apmem2.OutOfRangeError("outside")
        lib.apm_page_size()


async def persist_lines(m: apmem2.Map | Checked, view: memoryview, count: int) -> float:
    """Nanoseconds of one store of a byte and the awaited persist of its line."""
    began = perf_counter_ns()
    for offset in range(0, count * 64, 64):
        view[offset] = 1
        await m.persist(offset, 64)
    return (perf_counter_ns() - began) / count


async def empty_threads(count: int) -> float:
    """Nanoseconds of an empty to_thread."""
    began = perf_counter_ns()
    for _ in range(count):
        await asyncio.to_thread(int)
    return (perf_counter_ns() - began) / count


async def lines(c: Context) -> list[Row]:
    """64 B persists."""
    count = c.scale.operations * 50
    size = max(count * 64, PAGE)
    with c.scratch() as path, cache_lines():
        async with apmem2.open(path(), size) as m:
            if m.granularity is not apmem2.Granularity.CACHE_LINE:
                return [Row("64 B persist, cache line, awaited", "-", skipped="this processor cannot flush lines")]
            plain = memoryview(bytearray(size))
            checked = Checked(size)

            async def ours() -> float:
                return await persist_lines(m, m.view, count)

            async def theirs() -> tuple[float, float]:
                return await persist_lines(checked, plain, count), await empty_threads(c.scale.operations)

            await ours()
            await theirs()
            left, right = await interleave(max(5, c.scale.alternations), ours, theirs)
            tight, quiet = [], []
            for _ in range(max(1, c.scale.alternations // 2)):
                async with Ticker() as ticker:
                    end = perf_counter_ns() + c.scale.lag_s * 1e9
                    while perf_counter_ns() < end:
                        await persist_lines(m, m.view, 100)
                tight.append(ticker.p99)
                quiet.append((await idle(c.scale.lag_s / 2)).p99)
    calls, threads = [one[0] for one in right], [one[1] for one in right]
    ns = f"{median(left):,.0f} ns"
    what = "64 B store + persist, cache line, awaited"
    return [
        Row(what, "an empty to_thread", ns, f"{median(threads):,.0f} ns", median_ratio(threads, left), Goal(">=", 50)),
        Row(
            what,
            "a checked coroutine with an empty cffi call",
            ns,
            f"{median(calls):,.0f} ns",
            median_ratio(left, calls),
            Goal("<=", 2),
        ),
        Row(
            "p99 loop lag in a tight loop of them (ms)",
            "1 ms (beside it: the idle loop)",
            milliseconds(median(tight)),
            milliseconds(median(quiet)),
            median(tight) / 1e6,
            Goal("<=", 1),
        ),
    ]


def build_compare(directory: Path) -> str:
    """Build the comparison with libpmem2; a reason when it cannot be had."""
    source = HERE / "native" / "pmem2_compare.c"
    if not source.exists():
        return f"{source.name} is not there"
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        return f"needs a C compiler ({compiler})"
    probe = [compiler, "-E", "-include", "libpmem2.h", "-x", "c", "/dev/null", "-o", os.devnull]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "needs libpmem2.h: install libpmem2-dev"
    core = ROOT / "apmem2" / "native"
    files = [core / f"apm_{name}.c" for name in ("cpu", "flush", "copy", "copy_generic", "copy_x86")]
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", f"-I{core}", "-o", str(directory / "pmem2_compare")]
    command += [str(source), *map(str, files), "-lpmem2", "-lpthread", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"does not build: {done.stderr.strip().splitlines()[-1]}"


def compared(output: str) -> list[Row]:
    """Rows of what pmem2_compare printed: 'op flag size ours_ns theirs_ns ratio', ratio above 1: we are faster."""
    cells: list[tuple[str, int, float, bool]] = []
    for line in output.splitlines():
        words = line.split()
        if len(words) in (6, 7) and not line.startswith("#"):
            try:
                cells.append((" ".join(words[:3]), int(words[2]), float(words[5]), words[-1] == "*"))
            except ValueError:
                continue  # one of the summary's lines
    against = "libpmem2"
    what = "C flush, memcpy, memset"
    if not cells:
        return [Row(what, against, error="no cells in the output of pmem2_compare")]

    def geometric(ratios: list[float]) -> float:
        product = 1.0
        for one in ratios:
            product *= one ** (1 / len(ratios))
        return product

    worst = min(cells, key=lambda cell: cell[2])
    below = sum(cell[2] < 0.95 for cell in cells)
    rows = [
        Row(
            f"{what}, the worst of {len(cells)} cells",
            against,
            ratio=worst[2],
            goal=Goal(">=", 0.95),
            note=f"{worst[0]}{' *' if worst[3] else ''}; {below} cells below 0.95",
        ),
        Row(f"{what}, geometric mean", against, ratio=geometric([cell[2] for cell in cells]), goal=Goal(">=", 1.05)),
    ]
    small = [cell[2] for cell in cells if cell[1] <= 256]
    if small:
        rows.append(Row(f"{what}, 8 - 256 B, geometric mean", against, ratio=geometric(small), goal=Goal(">=", 1.2)))
    alike = [cell[2] for cell in cells if not cell[3]]
    if alike and len(alike) < len(cells):
        note = f"worst {min(alike):.2f}; without {len(cells) - len(alike)} cells where only libpmem2 streams"
        rows.append(Row(f"{what}, the same durability, geometric mean", against, ratio=geometric(alike), note=note))
    return rows


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """To its end: the loop has nothing else to do."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def pmem2(c: Context) -> list[Row]:
    """The C core alone against libpmem2's."""
    with c.scratch() as path:
        here = path()
        here.mkdir()
        reason = build_compare(here)
        if reason:
            return [Row("C flush, memcpy, memset", "libpmem2", skipped=reason)]
        quick = ["--quick"] if c.scale.operations < 100 else []
        command = [str(here / "pmem2_compare"), *quick, "9" if not quick else "3"]
        done = run(command)
    if done.returncode:
        return [Row("C flush, memcpy, memset", "libpmem2", error=done.stderr.strip() or f"status {done.returncode}")]
    return compared(done.stdout)


ENTRIES = [Entry("line", lines, each=False), Entry("pmem2", pmem2, each=False)]
