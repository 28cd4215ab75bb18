"""What became of a row in several runs? A goal is reached when more than half of them reached it (two of three)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .harness import Goal, Row, Verdict

Key = tuple[str, str, str]
WORST_FIRST = (Verdict.ERROR, Verdict.VOID, Verdict.NOT_MET, Verdict.SKIPPED, Verdict.INFORMATION)


@dataclass
class Series:
    """One row of the table, and how it came out in each run in which it was there."""

    key: Key  # file system, what, against
    rows: list[Row] = field(default_factory=list)

    @property
    def goal(self) -> Goal | None:
        """What the ratio is held against."""
        return next((row.goal for row in self.rows if row.goal is not None), None)

    @property
    def ratios(self) -> list[float]:
        """Those that say something: a void row has none."""
        return [row.ratio for row in self.rows if row.ratio is not None and row.speaks]

    @property
    def ratio(self) -> float | None:
        """Median over the runs."""
        return median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> Verdict:
        """Met when it was in more than half of the runs; else the worst that happened."""
        verdicts = [row.verdict for row in self.rows]
        if verdicts.count(Verdict.MET) * 2 > len(verdicts):
            return Verdict.MET
        if all(one in (Verdict.MET, Verdict.NOT_MET) for one in verdicts):
            return Verdict.NOT_MET
        return next(one for one in WORST_FIRST if one in verdicts)

    @property
    def example(self) -> Row:
        """The row of the run whose ratio is in the middle, to show its figures."""
        speaking = [row for row in self.rows if row.ratio is not None and row.speaks]
        ordered = sorted(speaking, key=lambda row: row.ratio or 0.0)
        return ordered[(len(ordered) - 1) // 2] if ordered else self.rows[-1]

    @property
    def reasons(self) -> list[str]:
        """Why nothing can be said, of those runs in which nothing can."""
        return list(dict.fromkeys(why for row in self.rows if (why := row.error or row.skipped or row.void)))


def series_of(runs: Sequence[Sequence[Row]]) -> list[Series]:
    """The rows of all runs, each with its like, in the order of their first appearance."""
    found: dict[Key, Series] = {}
    for rows in runs:
        for row in rows:
            key = (row.file_system, row.name.strip(), row.against)
            found.setdefault(key, Series(key)).rows.append(row)
    return list(found.values())


def as_json(row: Row) -> dict[str, Any]:
    """One row of a file of results."""
    return row.plain() | {"goal": str(row.goal or ""), "verdict": row.verdict.value}


def from_json(found: dict[str, Any]) -> Row:
    """And back. The verdict is computed again, never believed."""
    relation, _, bound = found["goal"].partition(" ")
    known = {name: value for name, value in found.items() if name not in ("goal", "verdict")}
    return Row(**known, goal=Goal(relation, float(bound)) if bound else None)


def runs_of(results: dict[str, Any]) -> Iterator[list[Row]]:
    """The runs of one file of results."""
    for rows in results["runs"]:
        yield [from_json(row) for row in rows]
