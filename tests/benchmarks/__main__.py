"""Run the benchmarks: `python -m tests.benchmarks` from the root of the project.

--quick                less of everything: about a minute for a file system instead of about three
--runs N               all of it N times, one after the other; a goal is met when more than half of the runs meet it
--rows a,b             only these (--list shows them)
--file-systems LIST    of host, ext4 (with a journal) and xfs (both on loop devices, for root); default: all
--directory DIR        where "host" is and where the loop devices' files lie; default: the current directory
--json FILE            the results of every run as well as the table; `tests.benchmarks.compare` compares two of them
--markdown FILE ...    run nothing: the README's table, from what --json wrote
--loop asyncio|uvloop  default: uvloop where it is installed
--strict               status 1 also when a goal is not met
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import markdown, report, rows_beside, rows_loop, rows_media, rows_native, rows_persist, rows_process, rows_trip
from .compare import load
from .context import ROOT, Context, Entry, build_limits
from .harness import DEFAULT, MIB, QUICK, Row, Scale, Verdict
from .series import series_of

ENTRIES: list[Entry] = [
    *rows_persist.ENTRIES,
    *rows_beside.ENTRIES,
    *rows_media.ENTRIES,
    *rows_loop.ENTRIES,
    *rows_trip.ENTRIES,
    *rows_native.ENTRIES,
    *rows_process.ENTRIES,
]
NOT_ON = ("tmpfs", "ramfs", "overlay")
LOOP_DISK_BYTES = 1280 * MIB


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    keys = [entry.key for entry in ENTRIES]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Ratios inside one run.")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--runs", type=int, default=1, help="all of it so many times (default: 1)")
    parser.add_argument("--rows", default=",".join(keys), help=f"of {','.join(keys)}")
    parser.add_argument("--list", action="store_true", help="show the rows' keys")
    parser.add_argument("--file-systems", default="host,ext4,xfs", help="of host,ext4,xfs (default: all)")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where to work (default: here)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--markdown", type=Path, nargs="+", help="the README's table, from what --json wrote")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), help="default: uvloop where it is installed")
    parser.add_argument("--strict", action="store_true", help="status 1 when a goal is not met")
    chosen = parser.parse_args(arguments)
    chosen.rows = chosen.rows.split(",")
    chosen.file_systems = chosen.file_systems.split(",")
    if chosen.runs < 1:
        parser.error("--runs takes a number from 1 on")
    for one in chosen.rows:
        if one not in keys:
            parser.error(f"no row {one!r}: there are {', '.join(keys)}")
    for one in chosen.file_systems:
        if one not in ("host", "ext4", "xfs"):
            parser.error(f"no file system {one!r}: there are host, ext4, xfs")
    return chosen


def runner(loop: str | None) -> tuple[asyncio.Runner, str]:
    """The loop of the rows."""
    if loop != "asyncio":
        try:
            import uvloop
        except ImportError:
            if loop == "uvloop":
                raise
        else:
            return asyncio.Runner(loop_factory=uvloop.new_event_loop), f"uvloop {version('uvloop')}"
    return asyncio.Runner(), "asyncio"


@contextmanager
def place(name: str, directory: Path) -> Iterator[Path | str]:
    """A directory on that file system, or the reason why there is none."""
    with tempfile.TemporaryDirectory(prefix="apmem2-benchmark-", dir=directory) as here:
        kind = report.file_system_of(Path(here)).split()[0]
        if kind in NOT_ON:
            yield f"{directory} is on {kind}, which does not count: choose another with --directory"
        elif name == "host":
            yield Path(here)
        else:
            from tests.media.disk import LoopDisk, requirements

            reason = requirements(name, fuse=False)
            if reason is not None:
                yield reason
                return
            before, tempfile.tempdir = tempfile.tempdir, here
            try:
                with LoopDisk(LOOP_DISK_BYTES, name, preallocate=True) as disk:
                    yield disk.mount_point
            finally:
                tempfile.tempdir = before


def run_entry(entry: Entry, context: Context, loop: asyncio.Runner, label: str) -> list[Row]:
    """Its rows; an exception is a row that says so."""
    began = time.monotonic()
    print(f"{label:6} {entry.key} ...", end=" ", flush=True, file=sys.stderr)
    try:
        rows = loop.run(entry.run(context))
    except Exception as error:
        rows = [Row(entry.key, "", error=f"{type(error).__name__}: {error}")]
    for row in rows:
        row.file_system = label if entry.each else markdown.ANY
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)
    return rows


def run_all(chosen: argparse.Namespace, scale: Scale, limits: Path, places: list[str], rows: list[Row]) -> None:
    """Every chosen row on every chosen file system; rows that do not depend on it once, on the first."""
    once = False
    for name in chosen.file_systems:
        with place(name, chosen.directory) as where:
            if isinstance(where, str):
                rows.append(Row("every row", "", skipped=where, file_system=name))
                continue
            places.append(f"{name} is {report.file_system_of(where)}")
            # One loop for a file system: it has to be closed, and with it all threads, before that is unmounted.
            loop, loop_name = runner(chosen.loop)
            with loop:
                context = Context(where, name, scale, limits, loop_name)
                for entry in ENTRIES:
                    if entry.key in chosen.rows and (entry.each or not once):
                        rows += run_entry(entry, context, loop, name)
            once = True


def main() -> int:
    """Status 1 when a row broke (with --strict also when a goal was not met)."""
    chosen: Any = parse()
    if chosen.list:
        print("\n".join(entry.key for entry in ENTRIES))
        return 0
    if chosen.markdown:
        side = load(chosen.markdown)
        print(markdown.table(side.headers[0], series_of(side.runs), len(side.runs)), end="")
        return 0
    sys.path.insert(0, str(ROOT))
    chosen.directory = chosen.directory.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was mounted and written is removed then too
    scale = QUICK if chosen.quick else DEFAULT
    places: list[str] = []
    runs: list[list[Row]] = []
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="apmem2-limits-") as build:
        limits = build_limits(Path(build))
        try:
            while len(runs) < chosen.runs:
                runs.append([])
                run_all(chosen, scale, limits, places, runs[-1])
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: what follows is what there was until then", file=sys.stderr)
    loop, loop_name = runner(chosen.loop)
    loop.close()
    head = report.header(loop_name, places, scale.name, len(runs))
    report.show(head, runs)
    if chosen.json:
        report.save(chosen.json, head, runs)
    broken = any(row.verdict is Verdict.ERROR for rows in runs for row in rows)
    bad = {Verdict.NOT_MET, Verdict.VOID, Verdict.ERROR}
    missed = chosen.strict and any(series.verdict in bad for series in series_of(runs))
    return 130 if interrupted else int(broken or missed)


if __name__ == "__main__":
    sys.exit(main())
