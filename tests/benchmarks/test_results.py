"""Results of several runs are put together, written, read again, compared and shown; nothing is lost or made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import compare, markdown
from .harness import Goal, Row, Verdict
from .report import WIDTH, lines_of, save, show
from .rows_trip import break_even
from .series import as_json, from_json, series_of

HEADER = {
    "processor": "one",
    "kernel": "Linux 6",
    "python": "CPython 3.11, loop: asyncio",
    "file systems": "host is ext4 on /dev/sda",
    "scale": "quick",
}


def row(ratio: float | None = 1.0, **more: object) -> Row:
    fields: dict[str, object] = {"name": "what", "against": "that", "file_system": "host", "goal": Goal(">=", 0.8)}
    return Row(ratio=ratio, **(fields | more))  # type: ignore[arg-type]


def runs(*ratios: float, **more: object) -> list[list[Row]]:
    return [[row(ratio, **more)] for ratio in ratios]


def written(path: Path, several: list[list[Row]], **head: str) -> Path:
    save(path, HEADER | head, several)
    return path


def compared(tmp_path: Path, before: list[list[Row]], after: list[list[Row]], **head: str) -> int:
    then, now = written(tmp_path / "then.json", before), written(tmp_path / "now.json", after, **head)
    return compare.main(["--before", str(then), "--after", str(now)])


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.0, 0.7, 0.9), Verdict.MET),
        ((1.0, 0.7, 0.7), Verdict.NOT_MET),
        ((1.0, 0.7), Verdict.NOT_MET),
        ((0.9,), Verdict.MET),
    ],
)
def test_a_goal_is_met_when_more_than_half_of_the_runs_meet_it(ratios: tuple[float, ...], verdict: Verdict) -> None:
    (series,) = series_of(runs(*ratios))
    assert series.verdict is verdict
    assert series.ratios == list(ratios)


def test_a_void_run_meets_nothing_and_its_ratio_is_not_counted() -> None:
    (series,) = series_of([[row(1.0)], [row(9.0, void="too few flushes")], [row(9.0, void="too few flushes")]])
    assert series.verdict is Verdict.VOID
    assert series.ratio == 1.0
    assert series.reasons == ["too few flushes"]
    (series,) = series_of([[row(1.0)], [row(1.0)], [row(None, error="broke")]])
    assert series.verdict is Verdict.MET


def test_rows_of_different_file_systems_are_different_rows() -> None:
    assert len(series_of([[row(), row(file_system="xfs")], [row()]])) == 2


def test_the_figures_shown_are_those_of_the_run_in_the_middle() -> None:
    (series,) = series_of([[row(3.0, ours="c")], [row(1.0, ours="a")], [row(2.0, ours="b")]])
    assert series.example.ours == "b"


def test_a_row_survives_being_written() -> None:
    for one in (row(1.5, note="n"), row(None, skipped="not here"), row(2.0, goal=None), row(2.0, void="v")):
        assert from_json(json.loads(json.dumps(as_json(one)))) == one


def test_a_verdict_in_a_file_is_not_believed() -> None:
    assert from_json(as_json(row(0.1)) | {"verdict": "met"}).verdict is Verdict.NOT_MET


def test_a_lost_goal_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, runs(1.0, 1.0, 0.5), runs(0.5, 0.5, 1.0)) == 1
    text = capsys.readouterr().out
    assert "LOST" in text
    assert "-50 %" in text
    assert "goals lost: 1, won: 0" in text


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ((0.5,), (0.9,), "won"),
        ((1.0,), (0.9,), "met"),
        ((0.5,), (0.4,), "not met"),
        ((1.0, 1.0, 1.0), (0.5, 0.9, 0.9), "met"),
    ],
)
def test_what_is_no_loss_is_status_0(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: tuple[float, ...],
    after: tuple[float, ...],
    word: str,
) -> None:
    assert compared(tmp_path, runs(*before), runs(*after)) == 0
    assert word in capsys.readouterr().out


def test_a_row_that_became_void_or_broke_lost_its_goal(tmp_path: Path) -> None:
    assert compared(tmp_path, runs(1.0), runs(1.0, void="too few flushes")) == 1
    assert compared(tmp_path, runs(1.0), [[row(None, error="broke")]]) == 1


def test_a_row_that_was_skipped_or_void_before_cannot_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, [[row(None, skipped="not here")]], runs(0.5)) == 0
    assert compared(tmp_path, runs(9.0, void="v"), runs(0.5)) == 0
    assert compared(tmp_path, runs(1.0), [[row(None, skipped="not here")]]) == 0
    assert "not comparable" in capsys.readouterr().out


def test_rows_of_one_side_only_are_shown_and_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, [[row(name="old")]], [[row(name="new")]]) == 0
    text = capsys.readouterr().out
    assert "only before" in text
    assert "only after" in text


def test_a_goal_that_moved_is_asked_of_both_sides_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, runs(1.0), runs(0.7, goal=Goal(">=", 0.6))) == 0
    assert compared(tmp_path, runs(1.0), runs(0.5, goal=Goal(">=", 2))) == 0
    assert ">= 0.8 -> >= 0.6" in capsys.readouterr().out


def test_a_difference_below_zero_has_no_percentage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, runs(-0.5, goal=Goal("<=", 1)), runs(0.5, goal=Goal("<=", 1))) == 0
    assert "%" not in capsys.readouterr().out


def test_another_machine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, runs(1.0), runs(1.0), kernel="Linux 7") == 0
    text = capsys.readouterr().out
    assert "kernel differs: before Linux 6; after Linux 7" in text
    assert "python differs" not in text


def test_several_files_of_a_side_are_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(written(tmp_path / f"{number}.json", runs(ratio))) for number, ratio in enumerate((1.0, 0.5, 0.9))]
    assert compare.main(["--before", *files, "--after", files[1]]) == 1
    assert "3 runs before, 1 after" in capsys.readouterr().out


def test_times_and_rates_are_never_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, runs(1.0, ours="1 ms", theirs="1 ms"), runs(1.0, ours="9 s", theirs="9 s")) == 0
    text = capsys.readouterr().out
    assert "9 s" not in text
    assert "1 ms" not in text


@pytest.mark.parametrize("text", ["", "{}", '{"header": {}, "runs": [[{"name": "x"}]]}', "[1]"])
def test_what_is_no_file_of_results_is_status_2(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    assert compare.main(["--before", str(bad), "--after", str(bad)]) == 2
    assert "bad.json" in capsys.readouterr().err


def test_the_table_fits_and_ends_with_what_was_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    long = "p99 of a one-page persist of a file with a long name, 256"
    show(HEADER, [[row(0.5, name=long, ours="123,456/s", note="word " * 60), row(name="good")]] * 3)
    text = capsys.readouterr().out
    table, _, end = text.partition("\n\n")[2].partition("\nmet: 1")
    assert max(map(len, table.splitlines())) <= WIDTH
    assert "NOT MET 0.50 0.50 0.50 >= 0.8" in table
    assert f"NOT MET: host: {long}, against that: 0.50 0.50 0.50 for >= 0.8" in end
    assert "good" not in end


def test_ours_stands_above_theirs() -> None:
    (series,) = series_of([[row(ours="OURS", theirs="THEIRS")]])
    first, second, *_ = lines_of(series, 5)
    assert first.index("OURS") == second.index("THEIRS")


def test_the_readme_has_a_line_for_each_row_with_a_goal_and_a_column_for_each_file_system() -> None:
    every = series_of(
        [
            [
                row(0.9),
                row(0.5, file_system="xfs"),
                row(1.0, name="no goal", goal=None),
                row(3.0, name="of C", file_system=markdown.ANY, goal=Goal("<=", 5)),
                row(None, name="absent", skipped="not here"),
            ]
        ]
    )
    text = markdown.table(HEADER, every, 1)
    assert "| what | against | goal | host | xfs |\n|---|---|---|---|---|\n" in text
    assert "| what | that | ≥ 0.8 | 0.90 | **0.50, not met** |" in text
    assert "| absent | that | ≥ 0.8 | skipped |  |" in text
    assert "| of C | that | ≤ 5 | 3.00 |" in text
    assert "no goal" not in text


@pytest.mark.parametrize(
    ("inline", "size"), [([1, 2, 9, 9], 4), ([1, 9, 2, 9], 8), ([1, 1, 1, 1], None), ([9, 9, 9, 9], 1)]
)
def test_inline_work_is_worth_it_up_to_the_last_size_at_which_it_is_cheaper(inline: list[float], size: int) -> None:
    assert break_even((1, 2, 4, 8), inline, [5, 5, 5, 5]) == size
