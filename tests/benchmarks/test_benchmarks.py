"""The benchmarks measure what they say, and can be run. Nothing here depends on how fast anything is."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path
from statistics import median

import pytest

import apmem2

from . import harness, rows_native
from .__main__ import ENTRIES, parse, place, run_entry, runner
from .context import Context, Limits, build_limits, scattered_pages
from .harness import DEFAULT, PAGE, TINY, Counters, Device, Goal, Rounds, Row, Verdict
from .report import file_system_of, save, show


def test_a_percentile_is_the_nearest_rank() -> None:
    samples = list(range(1, 101))
    assert harness.percentile(samples, 99) == 99
    assert harness.percentile(samples, 100) == 100
    assert harness.percentile(reversed(samples), 50) == 50
    assert harness.percentile([7], 1) == 7
    with pytest.raises(ValueError, match="no samples"):
        harness.percentile([], 50)


def test_the_claim_is_the_median_of_the_ratios_of_neighbours() -> None:
    assert harness.median_ratio([1, 20, 3], [2, 10, 3]) == 1
    with pytest.raises(ValueError, match="zip"):
        harness.median_ratio([1], [1, 2])


def test_ours_and_theirs_take_turns_and_the_first_one_changes() -> None:
    order: list[str] = []

    async def one(name: str) -> str:
        order.append(name)
        return name

    left, right = asyncio.run(harness.interleave(4, lambda: one("a"), lambda: one("b")))
    assert "".join(order) == "abbaabba"
    assert (left, right) == (["a"] * 4, ["b"] * 4)
    assert DEFAULT.alternations >= 5


def test_a_goal_is_met_or_not_in_its_own_direction() -> None:
    assert Row("", "", ratio=0.8, goal=Goal(">=", 0.8)).verdict is Verdict.MET
    assert Row("", "", ratio=0.79, goal=Goal(">=", 0.8)).verdict is Verdict.NOT_MET
    assert Row("", "", ratio=2.1, goal=Goal("<=", 2)).verdict is Verdict.NOT_MET
    assert Row("", "", ratio=5).verdict is Verdict.INFORMATION
    with pytest.raises(ValueError, match="a goal is"):
        Goal("<", 1)


class ScriptedDevice(Device):
    def __init__(self, *flushes: int, name: str = "disk") -> None:
        self.name = name
        self._flushes = list(flushes)

    def read(self) -> Counters:
        return Counters(0, self._flushes.pop(0))


@pytest.mark.parametrize(("flushes", "verdict"), [(9, Verdict.VOID), (10, Verdict.MET), (12, Verdict.MET)])
def test_fewer_flushes_than_rounds_void_a_row_however_good_it_is(
    flushes: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((100, 110))
    monkeypatch.setattr(apmem2, "statistics", lambda: type("S", (), {"rounds": next(counts)}))
    rounds = Rounds(ScriptedDevice(5, 5 + flushes))
    with rounds:
        pass
    row = rounds.book(Row("", "", ratio=99, goal=Goal(">=", 1)))
    assert row.verdict is verdict
    assert f"{flushes / 10:.2f} flushes per round" in row.note


def test_a_durable_row_without_rounds_or_without_a_device_says_nothing() -> None:
    row = Rounds(ScriptedDevice()).book(Row("", "", ratio=99, goal=Goal(">=", 1)))
    assert row.verdict is Verdict.VOID
    row = Rounds(ScriptedDevice(name="")).book(Row("", "", ratio=99, goal=Goal(">=", 1)))
    assert row.verdict is Verdict.VOID


def test_scattered_pages_are_never_neighbours() -> None:
    offsets = sorted(scattered_pages(1 << 20, 100))
    assert all(b - a >= 2 * PAGE for a, b in itertools.pairwise(offsets))


def test_the_comparison_with_libpmem2_is_read_back() -> None:
    output = "# clwb\nmemcpy 0 64 10.0 20.0 2.000\nmemcpy 0 4096 10.0 5.0 0.500 *\nall: geometric mean 1.0 of 2\n"
    worst, all_of_them, small, alike = rows_native.compared(output)
    assert (worst.ratio, worst.verdict) == (0.5, Verdict.NOT_MET)
    assert all_of_them.ratio == pytest.approx(1.0)
    assert (small.ratio, alike.ratio) == (2.0, 2.0)
    assert rows_native.compared("nothing")[0].verdict is Verdict.ERROR


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_limits(tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize("operation", ["dsync", "msync", "round:4", "adjacent:4", "once:4", "scan"])
@pytest.mark.parametrize("preparation", ["keep", "drop"])
def test_the_bare_loops_run(limits: Path, tmp_path: Path, preparation: str, operation: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE))
    with Limits(limits, path, 64 * PAGE, preparation, operation) as loop:
        assert len(loop.run(3)) == 3
        assert median(loop.run(2)) > 0


def test_a_bare_loop_that_fails_is_an_error(limits: Path, tmp_path: Path) -> None:
    with Limits(limits, tmp_path / "missing", PAGE, "keep", "dsync") as loop, pytest.raises((RuntimeError, OSError)):
        loop.run(1)


@pytest.mark.parametrize(
    "key", ["memcpy", "bytes", "ceiling", "line", "memory", "many", "same", "other", "trip", "inline"]
)
def test_a_row_runs(limits: Path, tmp_path: Path, key: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.key == key)
    loop, name = runner("asyncio")
    with loop:
        rows = run_entry(entry, Context(tmp_path, "here", TINY, limits, name), loop, "here")
    assert rows
    assert all(row.verdict is not Verdict.ERROR for row in rows), [row.error for row in rows]
    assert not list(tmp_path.iterdir())


def test_the_report_shows_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("a", "b", ratio=1.5, goal=Goal(">=", 1)), Row("c", "d", skipped="not here")]
    show({"kernel": "x"}, [rows])
    save(tmp_path / "found.json", {"kernel": "x"}, [rows])
    text = capsys.readouterr().out
    assert "met: 1, skipped: 1" in text
    assert "not here" in text
    assert "met     1.50  >= 1    a" in text
    assert '"verdict": "met"' in (tmp_path / "found.json").read_text()
    assert file_system_of(tmp_path)


def test_a_file_system_in_memory_does_not_count(tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs a tmpfs at /dev/shm")
    with place("host", Path("/dev/shm")) as where:
        assert "does not count" in str(where)


def test_the_command_line_knows_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--rows", "memcpy,line"]).rows == ["memcpy", "line"]
    with pytest.raises(SystemExit):
        parse(["--rows", "nothing"])
    assert "no row 'nothing'" in capsys.readouterr().err
