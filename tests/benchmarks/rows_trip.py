"""One empty job to the pool and back: what of its time is Python, what the core, what the kernel's waking of a thread?
And where does work on the caller's own thread begin to cost more than that?

Each of the Python loops, and each setting of `inline_bytes_max`, is a process of its own: a process has one of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from types import TracebackType

import apmem2
from apmem2.native import lib

from .context import HERE, ROOT, Context, Entry, Worker
from .harness import Row, interleave, median_ratio, microseconds

PAUSE_NS = 100_000  # about what a page takes to an SSD
SIZES = tuple(1 << power for power in range(6, 21))
DEFAULT_INLINE = 16384


def build_trip(directory: Path) -> Path:
    """Compile the trips that need no Python, with the C core as it is."""
    core, program = ROOT / "apmem2" / "native", directory / "trip"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{core}", "-pthread"]
    sources = [str(HERE / "native" / "trip.c"), *map(str, sorted(core.glob("apm_*.c")))]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", str(program), *sources], check=True)
    return program


class Trip:
    """One of the C programs, which waits for its turn."""

    def __init__(self, program: Path, operation: str) -> None:
        self._process = subprocess.Popen(
            [str(program), operation], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, count: int, pause_ns: int) -> list[float]:
        """Nanoseconds of each of count trips."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count} {pause_ns}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the trip in C ended with status {self._process.wait()}")
        return [float(one) for one in json.loads(line)["ns"]]

    def __enter__(self) -> Trip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def asked(worker: Worker, *words: object) -> list[float]:
    """One line to a worker and its answer."""
    worker.tell(" ".join(map(str, words)))
    found: list[float] = worker.answer()
    return found


async def trips(c: Context) -> list[Row]:
    """Python on each loop against C, at once and after a pause in which the processors went to sleep."""
    count = c.scale.operations
    loops = [name for name in ("asyncio", "uvloop") if name == "asyncio" or find_spec(name)]
    rows: list[Row] = []
    with c.scratch() as path, ExitStack() as stack:
        here = path()
        here.mkdir()
        program = build_trip(here)
        native = {name: stack.enter_context(Trip(program, name)) for name in ("pool", "handoff", "eventfd")}
        python = {name: stack.enter_context(Worker("trips", name)) for name in loops}
        runs: dict[str, Callable[[int], list[float]]] = {}
        for name, trip in native.items():
            runs[name] = lambda pause, trip=trip: trip.run(count, pause)  # type: ignore[misc]
        for name, worker in python.items():
            runs[name] = lambda pause, worker=worker: asked(worker, "job", count, pause)  # type: ignore[misc]
            runs[f"{name} alone"] = lambda pause, worker=worker: asked(worker, "wake", count, pause)  # type: ignore[misc]
        for pause, when in ((0, ""), (PAUSE_NS, f", after {PAUSE_NS // 1000} µs of sleep")):
            found: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(c.scale.alternations + 1):
                for name, run in runs.items():
                    took = median(run(pause))
                    if turn:  # the first one warms up
                        found[name].append(took)
            pairs = [
                ("empty job in C", "pool", "a thread woken, an eventfd back: nothing else", "handoff"),
                (
                    "a thread woken, an eventfd back, in C",
                    "handoff",
                    "an eventfd and epoll, no other thread",
                    "eventfd",
                ),
            ]
            for name in loops:
                pairs.append((f"empty job on {name}", name, "the same job in C", "pool"))
                pairs.append((f"an eventfd to a reader of {name}", f"{name} alone", "the same in C", "eventfd"))
            for what, ours, against, theirs in pairs:
                rows.append(
                    Row(
                        what + when,
                        against,
                        microseconds(median(found[ours])),
                        microseconds(median(found[theirs])),
                        median_ratio(found[ours], found[theirs]),
                    )
                )
    return rows


def break_even(sizes: tuple[int, ...], inline: list[float], pooled: list[float]) -> int | None:
    """The first size from which on inline work is never cheaper than the pool; None: it always is."""
    first: int | None = None
    for size, here, there in zip(sizes, inline, pooled, strict=True):
        if here < there:
            first = None
        elif first is None:
            first = size
    return first


async def inline(c: Context) -> list[Row]:
    """A persist of dirty cache lines on the loop's own thread against the same in the pool, by size. The lines are
    those of ordinary memory, whatever the file is on: persistent memory takes several times as long for each."""
    name = "uvloop" if c.loop_name.startswith("uvloop") else "asyncio"
    count = max(4, c.scale.operations // 4)
    rows: list[Row] = []
    here: list[float] = []
    there: list[float] = []
    with c.scratch() as path, ExitStack() as stack:
        inlined, pooled = (
            stack.enter_context(Worker("inline", name, most, str(path()))) for most in (str(1 << 30), "0")
        )
        if not all(worker.answer() for worker in (inlined, pooled)):
            return [Row("inline persist, cache line", "in the pool", skipped="this processor cannot flush lines")]
        for size in SIZES:

            async def ours(size: int = size) -> list[float]:
                return asked(inlined, size, count)

            async def theirs(size: int = size) -> list[float]:
                return asked(pooled, size, count)

            await ours()
            await theirs()
            left, right = ([median(one) for one in side] for side in await interleave(3, ours, theirs))
            here.append(median(left))
            there.append(median(right))
            if size in (64, 1024, DEFAULT_INLINE, 4 * DEFAULT_INLINE, SIZES[-1]):
                rows.append(
                    Row(
                        f"inline persist of {size:,} B, cache line, awaited",
                        "the same through the pool",
                        microseconds(here[-1]),
                        microseconds(there[-1]),
                        median_ratio(left, right),
                    )
                )
    found = break_even(SIZES, here, there)
    limit = found or SIZES[-1]
    rows.append(
        Row(
            "inline work costs as much as the pool",
            "the default of inline_bytes_max",
            f"{'' if found else '> '}{limit:,} B",
            f"{DEFAULT_INLINE:,} B",
            limit / DEFAULT_INLINE,
            note="; ".join(
                f"{size:,} B {ns / 1000:.1f} µs" for size, ns in zip(SIZES, here, strict=True) if size >= 4096
            ),
        )
    )
    return rows


def each_call(function: Callable[[], object], count: int) -> float:
    """Nanoseconds of one of count calls."""
    began = perf_counter_ns()
    for _ in range(count):
        function()
    return (perf_counter_ns() - began) / count


async def numbers(c: Context) -> list[Row]:
    """A snapshot of the statistics. What the counters cost an operation is part of an empty job in C above: they are
    always on, so there is no core without them to compare with."""
    count = c.scale.operations * 10

    def pieces(function: Callable[[], object]) -> list[float]:
        return [each_call(function, count) for _ in range(max(3, c.scale.alternations))]

    with warnings.catch_warnings(), c.scratch() as path:
        warnings.simplefilter("ignore", apmem2.DurabilityWarning)
        async with apmem2.open(path(), 4096) as m:
            empty = pieces(lib.apm_page_size)
            asked_for: list[tuple[str, Callable[[], object]]] = [("apmem2.statistics()", apmem2.statistics)]
            of_map = getattr(m, "statistics", None)
            if of_map is not None:
                asked_for.append(("Map.statistics()", of_map))
            rows = []
            for name, function in asked_for:
                took = pieces(function)
                rows.append(
                    Row(
                        name,
                        "an empty cffi call",
                        f"{median(took):,.0f} ns",
                        f"{median(empty):,.0f} ns",
                        median_ratio(took, empty),
                    )
                )
    return rows


ENTRIES = [
    Entry("trip", trips, each=False),
    Entry("inline", inline, each=False),
    Entry("statistics", numbers, each=False),
]
