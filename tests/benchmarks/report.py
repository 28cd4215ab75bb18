"""The header, the table of text and the file of results.

Two lines a row, so that 120 columns do: verdict, ratio of each run and goal stand side by side, and what was measured
stands above what it was measured against. At the end the rows that did not reach their goal are named once more.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from .harness import Row, Verdict
from .series import Series, as_json, series_of

WIDTH = 120
WHAT = 66  # columns of what was measured
COLOURS = {Verdict.MET: "32", Verdict.NOT_MET: "31", Verdict.VOID: "35", Verdict.ERROR: "31"}


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system_of(directory: Path) -> str:
    """Type, device and whether it keeps a journal, of what directory is on."""
    number = os.stat(directory).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    kind = device = "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            kind, device = right.split()[:2]
    if kind == "ext4":
        name = Path("/sys/dev/block", wanted).resolve().name
        kind += "" if list(Path("/proc/fs/jbd2").glob(f"{name}-*")) else " without a journal"
    return f"{kind} on {'a loop device' if device.startswith('/dev/loop') else device}"


def header(loop_name: str, file_systems: Sequence[str], scale: str, runs: int) -> dict[str, str]:
    """What the figures belong to."""
    import apmem2

    return {
        "processor": f"{processor()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} usable",
        "load": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}, loop: {loop_name}",
        "apmem2": Path(apmem2.__file__).parent.as_posix(),
        "file systems": "; ".join(dict.fromkeys(file_systems)),
        "scale": scale,
        "runs": str(runs),
    }


def ratio_text(ratio: float) -> str:
    """Three digits that matter: enough for a comparison, and as much as one run is worth."""
    return f"{ratio:.0f}" if abs(ratio) >= 100 else f"{ratio:.1f}" if abs(ratio) >= 20 else f"{ratio:.2f}"


def lines_of(series: Series, columns: int) -> Iterator[str]:
    """Its lines in the table; columns: of the ratios."""
    _, what, against = series.key
    row = series.example
    goal = str(series.goal or "")
    ratios = " ".join(ratio_text(ratio) for ratio in series.ratios)
    indent = " " * (8 + columns + 9)
    beside = f"against {against}" if against else ""
    yield f"{series.verdict.value:8}{ratios:{columns}} {goal:8}{what:{WHAT}} {row.ours}".rstrip()
    yield f"{indent}  {beside:{WHAT - 2}} {row.theirs}".rstrip()
    for why in filter(None, (*series.reasons, row.note)):
        yield from textwrap.wrap(why, WIDTH, initial_indent=indent + "  ", subsequent_indent=indent + "  ")


def summary(every: Sequence[Series]) -> Iterator[str]:
    """How many of each verdict; then by name what did not reach its goal, or cannot be said."""
    counts = {verdict: sum(series.verdict is verdict for series in every) for verdict in Verdict}
    names = {Verdict.INFORMATION: "without a goal"}
    yield ", ".join(f"{names.get(verdict, verdict.value)}: {count}" for verdict, count in counts.items() if count)
    for verdict in (Verdict.NOT_MET, Verdict.VOID, Verdict.ERROR):
        for series in every:
            if series.verdict is verdict:
                file_system, what, against = series.key
                found = " ".join(ratio_text(ratio) for ratio in series.ratios)
                wanted = f": {found} for {series.goal}" if found and series.goal else ""
                beside = f", against {against}" if against else ""
                yield f"  {verdict.value}: {file_system}: {what}{beside}{wanted}"


def show(head: dict[str, str], runs: Sequence[Sequence[Row]]) -> None:
    """All of it."""
    print()
    for name, value in head.items():
        print(f"{name + ':':14}{value}")
    print("Only ratios are claims: they compare inside one run. Times and rates are information.")
    if len(runs) > 1:
        print(
            f"{len(runs)} runs: a goal is met when more than half of them meet it. Figures are those of the middle one."
        )
    if os.getloadavg()[0] > len(os.sched_getaffinity(0)):
        print("Others are busy on this machine: whoever is in their way loses, so that no ratio here says much.")
    every = series_of(runs)
    columns = max([5, *(len(" ".join(map(ratio_text, series.ratios))) for series in every)])
    file_system = ""
    for series in every:
        if series.key[0] != file_system:
            file_system = series.key[0]
            print(f"\n{file_system}\n{'':8}{'ratio':{columns}} {'goal':8}what, and against what")
        first, *more = lines_of(series, columns)
        colour = COLOURS.get(series.verdict) if sys.stdout.isatty() else None
        print(f"\x1b[{colour}m{first[:8]}\x1b[0m{first[8:]}" if colour else first, *more, sep="\n")
    print()
    for line in summary(every):
        print(line)


def save(path: Path, head: dict[str, str], runs: Sequence[Sequence[Row]]) -> None:
    """As JSON, every run with all its rows."""
    found = {"header": head, "runs": [[as_json(row) for row in rows] for rows in runs]}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
