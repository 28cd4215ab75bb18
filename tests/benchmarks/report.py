"""The header, the table and the file of results."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .harness import Row, Verdict

COLUMNS = ("file system", "what", "against", "ours", "theirs", "ratio", "goal", "verdict", "note")


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
    return f"{kind} on {device}"


def header(loop_name: str, file_systems: Sequence[str]) -> dict[str, str]:
    """What the figures belong to."""
    import apmem2

    return {
        "processor": f"{processor()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} usable",
        "load": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}, loop: {loop_name}",
        "apmem2": Path(apmem2.__file__).parent.as_posix(),
        "file systems": "; ".join(file_systems),
    }


def cells(row: Row) -> tuple[str, ...]:
    """As strings."""
    why = row.error or row.skipped or row.void
    note = "; ".join(filter(None, (why, row.note)))
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    goal = "" if row.goal is None else str(row.goal)
    return (row.file_system, row.name, row.against, row.ours, row.theirs, ratio, goal, row.verdict.value, note)


def show(head: dict[str, str], rows: Sequence[Row]) -> None:
    """Through rich where it is installed and somebody looks; else plain."""
    print()
    for name, value in head.items():
        print(f"{name + ':':14}{value}")
    print("Only ratios are claims: they compare inside this run. Times and rates are information.")
    if os.getloadavg()[0] > len(os.sched_getaffinity(0)):
        print("Others are busy on this machine: whoever is in their way loses, so that no ratio here says much.")
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = None  # type: ignore[misc,assignment]
    if Console is None or not sys.stdout.isatty():
        show_plain(rows)
    else:
        colours = {Verdict.MET: "green", Verdict.NOT_MET: "red", Verdict.VOID: "magenta", Verdict.ERROR: "red"}
        table = Table(*COLUMNS)
        for row in rows:
            table.add_row(*cells(row), style=colours.get(row.verdict, ""))
        Console().print(table)
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    print("\n" + ", ".join(f"{verdict.value}: {count}" for verdict, count in counts.items() if count))


def show_plain(rows: Sequence[Row]) -> None:
    """A table of text."""
    table = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS) - 1)]
    for line in table:
        left = [text.ljust(width) for text, width in zip(line, widths, strict=False)]
        print("  ".join([*left, line[-1]]).rstrip())


def save(path: Path, head: dict[str, str], rows: Sequence[Row]) -> None:
    """As JSON."""
    found = []
    for row in rows:
        found.append(asdict(row) | {"goal": str(row.goal or ""), "verdict": row.verdict.value})
    path.write_text(json.dumps({"header": head, "rows": found}, indent=1, ensure_ascii=False) + "\n")
