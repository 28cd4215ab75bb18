"""The C core by itself: its own tests, built with `cc` alone, plain and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "apmem2" / "native"


def sanitizer_missing(flag: str, directory: Path) -> bool:
    """Can this compiler build and run a program with that sanitizer?"""
    source = directory / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    built = subprocess.run(["cc", flag, str(source), "-o", str(directory / "empty")], capture_output=True, check=False)
    return built.returncode != 0 or subprocess.run([str(directory / "empty")], check=False).returncode != 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("target", "flag"), [("test", ""), ("asan", "-fsanitize=address,undefined"), ("tsan", "-fsanitize=thread")]
)
def test_the_core_passes_its_own_tests(target: str, flag: str, tmp_path: Path) -> None:
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("needs make and cc (Debian: apt-get install make gcc)")
    if flag and sanitizer_missing(flag, tmp_path):
        pytest.skip(f"this compiler has no {flag} (Debian's gcc has)")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["make", "-C", str(NATIVE), target], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_pool: " in done.stdout
