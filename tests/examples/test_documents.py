"""What the documents show runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty directory, with the examples importable."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_of_the_readme_runs_as_printed(directory: Path, number: int) -> None:
    done = run(directory, "-W", "error", "-c", BLOCKS[number])
    assert done.returncode == 0, done.stderr
    if number == 0:
        assert done.stdout == "b'hello' POWER_LOSS\n"


def test_the_freeze_example_runs(directory: Path) -> None:
    done = run(directory, "-W", "error", "-m", "examples.loop_freeze", "8")
    assert done.returncode == 0, done.stderr
    assert "asyncio.to_thread(mm.flush)" in done.stdout
    assert "await m.persist()" in done.stdout
