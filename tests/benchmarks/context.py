"""Where a row runs: its directory, file system, device and scale; and the bare C loops beside it."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import apmem2

from .harness import MIB, PAGE, Device, Row, Scale

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORKER = HERE / "worker.py"


def build_limits(directory: Path) -> Path:
    """Compile the bare loops."""
    program = directory / "limits"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *flags, "-o", str(program), str(HERE / "native" / "limits.c")], check=True)
    return program


class Limits:
    """One bare C loop on one file: a process that waits for its turn."""

    def __init__(self, program: Path, path: Path, size: int, preparation: str, operation: str) -> None:
        self._process = subprocess.Popen(
            [str(program), str(path), str(size), preparation, operation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, count: int) -> list[float]:
        """Nanoseconds of each of count operations. Blocks, as it should: nothing of ours runs meanwhile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count} {random.getrandbits(32)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare loop ended with status {self._process.wait()}")
        answer = json.loads(line)
        return [float(one) for one in answer["ns"]]

    async def turn(self, count: int) -> list[float]:
        """The same, for `interleave`."""
        return self.run(count)

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def __enter__(self) -> Limits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def same_package() -> dict[str, str]:
    """The environment in which another process finds the apmem2 that this one uses."""
    where = [str(Path(apmem2.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(where)}


class Worker:
    """`worker.py` with a command that answers line by line."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(WORKER), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=same_package()
        )

    def tell(self, what: object) -> None:
        """One line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # at once: what it would put away one by one is of no use to anybody
        self._process.communicate()


@dataclass
class Context:
    """What a row is given."""

    directory: Path
    file_system: str
    scale: Scale
    limits: Path
    loop_name: str = "asyncio"
    device: Device = field(init=False)
    _names: int = 0

    def __post_init__(self) -> None:
        self.device = Device(self.directory)

    @contextmanager
    def scratch(self) -> Iterator[Callable[[], Path]]:
        """Paths for new files, which are removed at the end of the row."""
        here = self.directory / f"row-{self._names}"
        self._names += 1
        here.mkdir()
        count = 0

        def path() -> Path:
            nonlocal count
            count += 1
            return here / f"file-{count}"

        try:
            yield path
        finally:
            shutil.rmtree(here, ignore_errors=True)

    def written(self, path: Path, size: int, piece: int) -> Path:
        """A file written from its beginning in pieces of that size, synced; its pages stay in the cache."""
        with open(path, "xb", buffering=0) as file:
            data = os.urandom(piece)
            for at in range(0, size, piece):
                file.write(data[: min(piece, size - at)])
            os.fsync(file.fileno())
        return path

    def loop_on(self, path: Path, size: int, preparation: str, operation: str) -> Limits:
        """A bare C loop."""
        return Limits(self.limits, path, size, preparation, operation)


def random_pages(size: int, count: int) -> list[int]:
    """Offsets of count random pages of a file."""
    return [random.randrange(size // PAGE) * PAGE for _ in range(count)]


def scattered_pages(size: int, count: int) -> list[int]:
    """Offsets of count different random pages, no two of them adjacent."""
    pairs = size // PAGE // 2
    return [one * 2 * PAGE for one in random.sample(range(pairs), count)]


def small_folio_mapping(stack: ExitStack, path: Path, size: int) -> mmap.mmap:
    """A plain mmap over 4 KiB folios: dropped from the cache, MADV_RANDOM, touched page by page."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    mapping = stack.enter_context(mmap.mmap(fd, size))
    mapping.madvise(mmap.MADV_RANDOM)
    for at in range(0, size, 2 * MIB):
        os.posix_fadvise(fd, at, 2 * MIB, os.POSIX_FADV_WILLNEED)
    with memoryview(mapping) as view, view[::PAGE] as every:
        every.tobytes()
    return mapping


def plain_mapping(stack: ExitStack, path: Path, size: int, offset: int = 0) -> mmap.mmap:
    """Somebody else's mapping of a file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return stack.enter_context(mmap.mmap(fd, size, offset=offset))


@dataclass(frozen=True)
class Entry:
    """A group of rows under one key. `each`: on every file system; else once."""

    key: str
    run: Callable[[Context], Coroutine[Any, Any, list[Row]]]
    each: bool = True
