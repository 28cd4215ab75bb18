"""Did a change lose a goal, or win one? `python -m tests.benchmarks.compare --before a.json … --after b.json …`

Of each side all runs of all its files count. Ratios only: times and rates belong to the hour in which they were taken.
Status 1 when a goal that more than half of the runs before met is no longer met by more than half of those after.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import Goal, Row, Verdict
from .report import ratio_text
from .series import Series, runs_of, series_of

# What must be alike before two ratios say something about the code between them.
SAME = ("processor", "kernel", "python", "file systems", "scale")


@dataclass(frozen=True)
class Side:
    """Files of results of one state of the code."""

    headers: list[dict[str, str]]
    runs: list[list[Row]]


def load(paths: Sequence[Path]) -> Side:
    """Read them; ValueError with the file's name where one is no file of results."""
    headers, runs = [], []
    for path in paths:
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            headers.append(dict(found["header"]))
            runs += list(runs_of(found))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what --json wrote ({type(error).__name__}: {error})") from error
    return Side(headers, runs)


@dataclass(frozen=True)
class Change:
    """One row on both sides; None: it is not there."""

    before: Series | None
    after: Series | None

    @property
    def key(self) -> tuple[str, str, str]:
        """File system, what, against."""
        series = self.after or self.before
        assert series is not None
        return series.key

    @property
    def goal(self) -> Goal | None:
        """Today's, on both sides: a goal that moved is no change of the code."""
        found = self.after.goal if self.after is not None else None
        return found or (self.before.goal if self.before is not None else None)

    @property
    def goal_text(self) -> str:
        """Said aloud when it moved: a goal that was lowered hides a loss from `lost`."""
        then = self.before.goal if self.before is not None else None
        moved = self.before is not None and self.after is not None and then != self.after.goal
        return f"{then or 'none'} -> {self.after.goal or 'none'}" if moved and self.after else str(self.goal or "")

    def was_met(self, series: Series | None) -> bool | None:
        """By more than half of its runs (a void one meets nothing). None: cannot be said, or nothing was asked."""
        if series is None or self.goal is None or all(row.verdict is Verdict.SKIPPED for row in series.rows):
            return None
        met = sum(row.speaks and row.ratio is not None and self.goal.met(row.ratio) for row in series.rows)
        return met * 2 > len(series.rows)

    @property
    def lost(self) -> bool:
        """It was met and is not any more. A row that is no longer there at all is for the reader to judge."""
        return self.was_met(self.before) is True and self.was_met(self.after) is False

    @property
    def word(self) -> str:
        """What happened to the goal."""
        if self.before is None or self.after is None:
            return "only before" if self.after is None else "only after"
        then, now = self.was_met(self.before), self.was_met(self.after)
        if then is None or now is None:
            return "" if self.goal is None else "not comparable"
        return {(True, False): "LOST", (False, True): "won", (True, True): "met", (False, False): "not met"}[then, now]

    @property
    def factor(self) -> float | None:
        """The ratio after, in parts of the one before; None where one is a difference that came out below zero."""
        then, now = (side.ratio if side is not None else None for side in (self.before, self.after))
        return now / then if now is not None and then is not None and then > 0 and now >= 0 else None


def changes(before: Side, after: Side) -> list[Change]:
    """Every row of either side, those of `after` first."""
    then = {series.key: series for series in series_of(before.runs)}
    now = {series.key: series for series in series_of(after.runs)}
    return [Change(then.get(key), now.get(key)) for key in [*now, *(key for key in then if key not in now)]]


def differences(before: Side, after: Side) -> Iterator[str]:
    """What besides the code is not the same."""
    for name in SAME:
        values = [list(dict.fromkeys(one.get(name, "unknown") for one in side.headers)) for side in (before, after)]
        if values[0] != values[1] or len(values[0]) > 1:
            yield f"{name} differs: before {' | '.join(values[0])}; after {' | '.join(values[1])}"


def cell(series: Series | None) -> str:
    """A median ratio, or why there is none."""
    if series is None:
        return "none"
    return series.verdict.value if series.ratio is None else ratio_text(series.ratio)


def table(found: Sequence[Change]) -> Iterator[str]:
    """One line a row, lost goals first."""
    lines = [("file system", "before", "after", "change", "goal", "", "what, and against what")]
    for change in sorted(found, key=lambda one: not one.lost):
        file_system, what, against = change.key
        percent = "" if change.factor is None else f"{(change.factor - 1) * 100:+.0f} %"
        goal, beside = change.goal_text, f"{what}, against {against}" if against else what
        lines.append((file_system, cell(change.before), cell(change.after), percent, goal, change.word, beside))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    for line in lines:
        yield "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 when a goal was lost, 2 when a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description="Ratios only.")
    parser.add_argument("--before", type=Path, nargs="+", required=True, help="what --json wrote, earlier")
    parser.add_argument("--after", type=Path, nargs="+", required=True, help="what --json wrote, now")
    chosen = parser.parse_args(arguments)
    try:
        before, after = load(chosen.before), load(chosen.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in differences(before, after):
        print(line)
    found = changes(before, after)
    print(f"{len(before.runs)} runs before, {len(after.runs)} after: medians of the ratios\n")
    print(*table(found), sep="\n")
    lost = sum(change.lost for change in found)
    print(f"\ngoals lost: {lost}, won: {sum(change.word == 'won' for change in found)}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
