"""How is a ratio measured so that noise and kindness cannot make it?

Ours and theirs take turns in small pieces, the one that begins alternates, each pair gives one ratio, and the median of
the ratios is what is claimed. A durable row counts flushes of the device beside our rounds: fewer flushes than rounds
means that something was acknowledged which no flush had covered, and voids the row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TypeVar

import apmem2
from tests.media.disk import DeviceStat

PAGE = 4096
MIB = 1 << 20
A = TypeVar("A")
B = TypeVar("B")


def percentile(samples: Iterable[float], percent: float) -> float:
    """Nearest rank: the smallest sample that at least `percent` of all do not exceed."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of pairs that were measured next to each other."""
    return median(a / b for a, b in zip(above, below, strict=True))


async def interleave(
    times: int, ours: Callable[[], Awaitable[A]], theirs: Callable[[], Awaitable[B]]
) -> tuple[list[A], list[B]]:
    """Run both in turns, `times` times each; who begins alternates. Both are warm: they ran before."""
    left: list[A] = []
    right: list[B] = []
    for turn in range(times):
        if turn % 2:
            right.append(await theirs())
            left.append(await ours())
        else:
            left.append(await ours())
            right.append(await theirs())
    return left, right


class Verdict(Enum):
    """What became of a row."""

    MET = "met"
    NOT_MET = "NOT MET"
    VOID = "VOID"
    SKIPPED = "skipped"
    ERROR = "ERROR"
    INFORMATION = "-"


@dataclass(frozen=True)
class Goal:
    """What a ratio must be."""

    relation: str
    bound: float

    def __post_init__(self) -> None:
        if self.relation not in (">=", "<="):
            raise ValueError(f"a goal is >= or <=, not {self.relation!r}")

    def met(self, ratio: float) -> bool:
        """Is it so?"""
        return ratio >= self.bound if self.relation == ">=" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


@dataclass
class Row:
    """One comparison. `ours` and `theirs` are information; `ratio` is the claim."""

    name: str
    against: str
    ours: str = ""
    theirs: str = ""
    ratio: float | None = None
    goal: Goal | None = None
    note: str = ""
    file_system: str = ""
    void: str = ""
    skipped: str = ""
    error: str = ""

    @property
    def speaks(self) -> bool:
        """Is its ratio a claim?"""
        return not (self.error or self.skipped or self.void)

    def plain(self) -> dict[str, object]:
        """Its fields, for a file of results."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def verdict(self) -> Verdict:
        """Met, not met, or why neither can be said."""
        for reason, verdict in (
            (self.error, Verdict.ERROR),
            (self.skipped, Verdict.SKIPPED),
            (self.void, Verdict.VOID),
        ):
            if reason:
                return verdict
        if self.goal is None or self.ratio is None:
            return Verdict.INFORMATION
        return Verdict.MET if self.goal.met(self.ratio) else Verdict.NOT_MET


@dataclass(frozen=True)
class Counters:
    """What the kernel counted for a block device since it started."""

    bytes_written: int
    flushes: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(self.bytes_written - other.bytes_written, self.flushes - other.flushes)


class Device:
    """The whole block device under a directory. Its counters count everybody's requests: on a disk that others use too,
    bytes are an upper bound, and flushes one as well, or a lower one where two at the same moment were merged."""

    def __init__(self, directory: Path) -> None:
        number = os.stat(directory).st_dev
        self.number = f"{os.major(number)}:{os.minor(number)}"
        where = Path("/sys/dev/block", self.number)
        where = where.resolve() if where.exists() else where
        if (where / "partition").exists():
            where = where.parent
        self._directory = where
        self.name = where.name if (where / "stat").exists() else ""

    def __bool__(self) -> bool:
        return bool(self.name)

    def read(self) -> Counters:
        """As of now."""
        if not self.name:
            return Counters(0, 0)
        found = DeviceStat.of(self._directory)
        return Counters(found.sectors_written * 512, found.flushes)


@dataclass
class Rounds:
    """Sums our rounds and the device's flushes over the pieces that are ours: `with rounds: ...`."""

    device: Device
    rounds: int = 0
    flushes: int = 0
    bytes_written: int = 0
    _counters: Counters = field(default_factory=lambda: Counters(0, 0))
    _rounds: int = 0

    def __enter__(self) -> Rounds:
        self._counters, self._rounds = self.device.read(), apmem2.statistics().rounds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        counters = self.device.read() - self._counters
        self.rounds += apmem2.statistics().rounds - self._rounds
        self.flushes += counters.flushes
        self.bytes_written += counters.bytes_written

    def book(self, row: Row) -> Row:
        """Write the flushes into a durable row, and void it where they are too few or cannot be counted."""
        if not self.device:
            row.void = "no block device below this directory: its flushes cannot be counted"
            return row
        per_round = f"{self.flushes / self.rounds:.2f} flushes per round" if self.rounds else "no rounds"
        row.note = "; ".join(filter(None, (row.note, per_round)))
        if self.rounds == 0:
            row.void = "no round was run"
        elif self.flushes < self.rounds:
            row.void = f"{self.flushes} flushes of the device for {self.rounds} rounds"
        return row


@dataclass(frozen=True)
class Scale:
    """How long to look. `alternations`: pairs of pieces. `operations`: of one piece of a one-task row. `turns`: of each
    task in one piece of a many-task row. Sizes in bytes, durations in seconds."""

    alternations: int
    operations: int
    turns: int
    file_bytes: int
    dirty_bytes: int
    scan_bytes: int
    lag_s: float
    tasks: int
    many_tasks: int
    registered: int
    waiting: int
    large_bytes: tuple[int, ...]
    name: str


DEFAULT = Scale(
    7, 200, 8, 64 * MIB, 256 * MIB, 128 * MIB, 1.0, 256, 1024, 100_000, 100_000, (256 * MIB, 1024 * MIB), "full"
)
QUICK = Scale(5, 60, 4, 32 * MIB, 256 * MIB, 64 * MIB, 0.4, 256, 1024, 20_000, 20_000, (256 * MIB,), "quick")
TINY = Scale(1, 4, 1, 1 * MIB, 1 * MIB, 1 * MIB, 0.02, 8, 16, 150, 150, (2 * MIB,), "tiny")


def microseconds(ns: float) -> str:
    """For the columns of information."""
    return f"{ns / 1000:.1f} µs" if ns < 1e7 else f"{ns / 1e6:.1f} ms"


def per_second(rate: float) -> str:
    """For the columns of information."""
    return f"{rate:,.0f}/s"
