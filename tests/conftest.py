"""What every test stands on: both event loops, a directory on a real disk, nothing left over.

Async tests (`@pytest.mark.asyncio`) run twice, on asyncio in debug mode and on uvloop. Warnings are errors, every test
has a timeout, and after each test no map may be registered, no fault planted and no gate shut.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import uvloop

import apmem2
from apmem2.native import ffi, lib

Program = Callable[..., subprocess.CompletedProcess[str]]


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 3600  # no timed test in this suite
    return loop


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], object]]:
    return {"asyncio": _debug_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory on a disk: on tmpfs every map would warn that nothing survives a power cut."""
    words = Path("/proc/self/mountinfo").read_text().splitlines()
    device = tmp_path.stat().st_dev
    number = f"{device >> 8 & 0xFFF}:{device & 0xFF}"
    if any(f" {number} " in line and " - tmpfs " in line for line in words):
        pytest.skip("the temporary directory is on tmpfs: run with --basetemp on a disk")
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test gives back what it took."""
    yield
    lib.apm_fault_clear()
    lib.apm_observe_hold(0, 0, 0)
    lib.apm_observe_start(0)
    gc.collect()
    assert apmem2.mappings() == []


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Force a granularity for maps that are made from now on."""

    def force(word: str) -> None:
        monkeypatch.setenv("PMEM2_FORCE_GRANULARITY", word)

    return force


@pytest.fixture
def run_program(directory: Path) -> Program:
    """Run a Python program in a process of its own, in an empty directory; its output is text."""

    def run(
        text: str, *arguments: str, timeout: float = 60, check: bool = True, flags: tuple[str, ...] = ("-X", "dev")
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *flags, "-c", text, *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done

    return run


class Recorder:
    """What the core asked of the outside, in order. See apm_observe.c."""

    def __init__(self, capacity: int = 200_000) -> None:
        assert lib.apm_observe_start(capacity) == 0
        self._capacity = capacity

    def mark(self, number: int = 0) -> int:
        """The order number of this moment."""
        return int(lib.apm_observe_mark(number))

    def events(self) -> list[Event]:
        """All calls that have ended."""
        out = ffi.new("struct apm_event[]", self._capacity)
        lost = ffi.new("uint64_t *")
        count = lib.apm_observe_read(out, 0, self._capacity, lost)
        assert lost[0] == 0, "the recorder was too small"
        return [Event(e.begun, e.ended, e.call, e.result, e.object, e.offset, e.size, e.thread) for e in out[0:count]]

    def calls(self) -> list[str]:
        """Names of the calls in the order in which they began."""
        return [event.name for event in sorted(self.events(), key=lambda event: event.begun)]


class Event:
    """One call: see struct apm_event."""

    NAMES: ClassVar[dict[int, str]] = {
        getattr(lib, name): name.removeprefix("APM_CALL_").lower() for name in dir(lib) if name.startswith("APM_CALL_")
    }

    def __init__(
        self, begun: int, ended: int, call: int, result: int, obj: int, offset: int, size: int, thread: int
    ) -> None:
        self.begun = begun
        self.ended = ended
        self.name = self.NAMES[call]
        self.result = result
        self.object = obj
        self.offset = offset
        self.size = size
        self.thread = thread

    def __repr__(self) -> str:
        return f"<{self.begun}-{self.ended} {self.name} {self.object:#x} {self.offset:#x}+{self.size} = {self.result}>"


@pytest.fixture
def recorder() -> Recorder:
    """Recording from here to the end of the test."""
    return Recorder()


def call_number(name: str) -> int:
    """enum apm_call by the name of an event."""
    return int(getattr(lib, f"APM_CALL_{name.upper()}"))


class Faults:
    """Makes outside calls fail, and holds them."""

    def fail(self, name: str, errno: int, *, nth: int = 1, count: int = 1, short_bytes: int = 0) -> None:
        """From the nth call of this kind on, count of them fail with errno (0, short_bytes: write that much)."""
        assert lib.apm_fault_set(call_number(name), nth, count, errno, short_bytes) == 0

    def clear(self) -> None:
        """No faults, and the counts begin again."""
        lib.apm_fault_clear()

    def calls(self, name: str) -> int:
        """Calls of this kind since the last clear (counted once a fault was set)."""
        return int(lib.apm_fault_calls(call_number(name)))

    def hold(self, name: str, inode: int = 0) -> None:
        """Calls of this kind wait before they begin."""
        lib.apm_observe_hold(call_number(name), inode, 1)

    def release(self) -> None:
        """They go on."""
        lib.apm_observe_hold(0, 0, 0)

    async def held(self, count: int = 1) -> None:
        """Wait until count calls stand at the gate."""
        while lib.apm_observe_held() < count:  # noqa: ASYNC110 - a thread of the pool sets no event
            await asyncio.sleep(0)


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Planted failures, taken away at the end."""
    yield Faults()
    lib.apm_observe_hold(0, 0, 0)
    lib.apm_fault_clear()
