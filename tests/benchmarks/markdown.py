"""The table of the README, from files of results: `python -m tests.benchmarks --markdown a.json …` prints it.

Only rows with a goal, one line each, a column for each file system: median ratio over all runs, and whether more than
half of them met it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .harness import Verdict
from .report import ratio_text
from .series import Series

ANY = "any"  # the file system of rows that depend on none


def escaped(text: str) -> str:
    """A bar would end the cell."""
    return text.replace("|", "\\|")


def cell(series: Series | None) -> str:
    """A ratio; what is no plain success is said in words."""
    if series is None:
        return ""
    if series.ratio is None:
        return series.verdict.value.lower()
    text = ratio_text(series.ratio)
    return text if series.verdict is Verdict.MET else f"**{text}, {series.verdict.value.lower()}**"


def grid(every: Sequence[Series], columns: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """One table of the rows that have a goal on one of these file systems."""
    cells = {series.key: series for series in every if series.goal is not None}
    lines = dict.fromkeys((what, against) for file_system, what, against in cells if file_system in columns)
    if not lines:
        return
    yield f"| what | against | goal | {' | '.join(names)} |"
    yield f"|---|---|---|{'---|' * len(columns)}"
    for what, against in lines:
        found = [cells.get((column, what, against)) for column in columns]
        goal = next(series.goal for series in found if series is not None)
        sign = {">=": "≥", "<=": "≤"}[goal.relation] if goal else ""
        bound = f"{goal.bound:g}" if goal else ""
        yield f"| {escaped(what)} | {escaped(against)} | {sign} {bound} | {' | '.join(map(cell, found))} |"


def table(head: dict[str, str], every: Sequence[Series], runs: int) -> str:
    """All of it, with the command and the machine."""
    columns = list(dict.fromkeys(series.key[0] for series in every if series.key[0] != ANY))
    lines = [
        f"`make bench` on {head['processor']}, {head['kernel']}, {head['python']}; {head['file systems']}.",
        f"Medians of {runs} {'runs' if runs > 1 else 'run'}.",
        "",
    ]
    lines += grid(every, columns, columns)
    lines += ["", *grid(every, [ANY], ["ratio"])]
    return "\n".join(lines).rstrip() + "\n"
