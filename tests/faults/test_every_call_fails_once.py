"""Every outside call fails once: the first, the second, … until a run of the workload sees no failure any more.

After each failure: the right exception or success by the plain way, nothing acknowledged that is not in the file,
everything works again after closing, and nothing is left: no descriptor, no registry entry, no half-made file.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apmem2
from apmem2.native import lib

if TYPE_CHECKING:
    from conftest import Faults

PAGE = mmap.PAGESIZE
FIRST, GROWN = 4 * PAGE, 8 * PAGE
ALWAYS = 1 << 30
BY_PAGE = apmem2.Granularity.PAGE


class Ledger:
    """What was acknowledged, what was refused, and whether the refusals were right."""

    def __init__(self, directory: Path, planted: int) -> None:
        self.directory = directory
        self.planted = planted
        self.acknowledged: dict[tuple[str, int], int] = {}  # byte of a page by (file, page)
        self.errors: list[BaseException] = []
        self.wrong: list[str] = []

    def forget(self) -> None:
        """The exceptions without their tracebacks."""
        for error in self.errors:
            error.__traceback__ = None

    def judge(self, error: BaseException) -> None:
        """Remember it, and whether it is one that a caller can be given for the planted failure."""
        self.errors.append(error)
        told = error.__cause__ if isinstance(error, apmem2.MapFailedError) else error
        right = isinstance(error, apmem2.PmemError) and error.code < 0
        if isinstance(told, MemoryError):
            right = right and self.planted == errno.ENOMEM
        else:
            right = right and isinstance(told, OSError) and told.errno == self.planted
        if not right:
            self.wrong.append(f"{error!r} from {error.__cause__!r}")

    @asynccontextmanager
    async def attempt(self, name: str = "", page: int = -1, value: int = 0) -> AsyncIterator[None]:
        """Something that may be refused; when it is not, the page of the file has the value."""
        try:
            yield
        except (apmem2.PmemError, OSError) as error:
            self.judge(error)
        else:
            if page >= 0:
                self.acknowledged[name, page] = value


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            continue  # the one of the listing itself
    return found


def _memory(path: Path) -> mmap.mmap | None:
    if not path.exists() or path.stat().st_size != GROWN:
        return None
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


async def _close(ledger: Ledger, m: apmem2.Map) -> None:
    async with ledger.attempt():
        await m.aclose()
    assert m.closed


async def workload(ledger: Ledger) -> None:
    """Everything that maps can do, in four sessions; each act has a page of its own."""
    path, page = ledger.directory / "a", bytes(PAGE)
    attempt = ledger.attempt

    async with attempt():
        m = await apmem2.open(path, size=FIRST)
        async with attempt("a", 0, 1):
            await m.memcpy(0, page.replace(b"\0", b"\1"))
        async with attempt("a", 1, 2):
            m[PAGE : 2 * PAGE] = b"\2" * PAGE
            await m.persist(PAGE, PAGE)
        async with attempt("a", 2, 3):
            await m.memcpy(2 * PAGE, b"\3" * PAGE, apmem2.MemFlags.NODRAIN)
            await m.drain()
        async with attempt("a", 3, 4):
            await m.memcpy(3 * PAGE, b"\4" * PAGE, apmem2.MemFlags.NOFLUSH)
            await m.persist(3 * PAGE, PAGE)
        await _close(ledger, m)

    async with attempt():
        m = await apmem2.open(path, size=GROWN, grow=True, populate=True)
        async with attempt("a", 4, 5):
            await m.memset(4 * PAGE, 5, PAGE)
        async with attempt("a", 5, 6):
            m[5 * PAGE : 6 * PAGE] = b"\6" * PAGE
            await m.flush(5 * PAGE, PAGE)
            await m.drain()
        async with attempt("a", 1, 11):
            ledger.acknowledged.pop(("a", 1), None)
            scattered = (m.memcpy(PAGE, b"\13" * PAGE), m.memcpy(3 * PAGE, b"\4" * PAGE))  # one round, a gap between
            for error in await asyncio.gather(*scattered, return_exceptions=True):
                if error is not None:
                    raise error
        async with attempt():
            source = apmem2.Source.from_path(path)
            second = await apmem2.map_new(source, required_granularity=BY_PAGE, offset=PAGE)
            async with attempt("a", 6, 7):
                second[5 * PAGE : 6 * PAGE] = b"\7" * PAGE
                await second.persist(5 * PAGE, PAGE)
            await _close(ledger, second)
        await _close(ledger, m)

    memory = _memory(path)
    if memory is not None:
        async with attempt():
            m = await apmem2.map_from_existing(memory)
            async with attempt("a", 7, 8):
                memory[7 * PAGE :] = b"\10" * PAGE
                await m.persist(7 * PAGE, PAGE)
            async with attempt("a", 0, 9):
                ledger.acknowledged.pop(("a", 0), None)
                await m.memcpy(0, b"\11" * PAGE)
            await _close(ledger, m)
        if ledger.errors:  # whose tracebacks hold the adopted buffer: in the loop until its next turn, and in cycles
            ledger.forget()
            await asyncio.sleep(0)
            gc.collect()
        memory.close()

    async with attempt():
        m = await apmem2.open(ledger.directory / "sparse", size=FIRST, sparse=True)
        async with attempt("sparse", 1, 10):
            await m.memcpy(PAGE, b"\12" * PAGE)
        await _close(ledger, m)


async def check(ledger: Ledger, leftover: bool = False) -> None:
    """Everything works again, and what was acknowledged is there."""
    assert apmem2.mappings() == []
    for name, content in _files(ledger.directory).items():
        if leftover and name.startswith(".apmem2-"):
            continue
        assert name in ("a", "sparse"), f"left behind: {name}"
        assert len(content) in (FIRST, GROWN), f"half made: {name} of {len(content)} bytes"
    for name in ("a", "sparse"):
        async with apmem2.open(ledger.directory / name, size=GROWN, grow=True) as m:
            for (file, page), value in ledger.acknowledged.items():
                if file == name:
                    assert m[page * PAGE : (page + 1) * PAGE] == bytes([value]) * PAGE, (file, page)
            await m.memcpy(7 * PAGE, b"z" * PAGE)
            await m.persist()
    assert _files(ledger.directory)["a"][-PAGE:] == b"z" * PAGE


async def every_descriptor_closed(before: set[str], allowed: int = 0) -> None:
    """Files are closed in the pool: wait for it. The number of a leak would never come down."""
    left = _descriptors() - before
    for _ in range(20_000):
        if len(left) <= allowed:
            break
        await asyncio.sleep(0)
        left = _descriptors() - before
    assert len(left) <= allowed, f"left open: {left}"
    for line in left:
        os.close(int(line.split()[0]))


CASES = [
    ("malloc", [errno.ENOMEM], ""),
    ("open", [errno.EMFILE, errno.ENOMEM], ""),
    ("fstat", [errno.EIO], ""),
    ("fallocate", [errno.ENOSPC, errno.EINTR], ""),
    ("ftruncate", [errno.ENOSPC], ""),
    ("mmap", [errno.ENOMEM], ""),
    ("mmap_sync", [errno.ENOMEM], ""),
    ("munmap", [errno.ENOMEM], ""),
    ("msync", [errno.EIO, errno.ENOSPC, errno.EINTR, errno.ENOMEM], ""),
    ("fdatasync", [errno.EIO, errno.EINTR], "sync_file_range"),
    ("fsync", [errno.EIO, errno.EINTR], ""),
    ("fsync_directory", [errno.EIO, errno.EINTR], ""),
    ("sync_file_range", [errno.EIO, errno.ENOSPC, errno.EINTR], ""),
    ("range_written", [errno.EIO, errno.ENOSPC, errno.EINTR], ""),
    ("pwrite", [errno.EIO, errno.ENOSPC, errno.EINTR, 0], ""),
    ("pwrite", [errno.EIO, errno.ENOSPC, 0], "pwrite_dsync"),
    ("pwrite_dsync", [errno.EIO, errno.ENOSPC, errno.EINTR, 0], ""),
    ("link", [errno.EIO], ""),
    ("link", [errno.ENOSPC], "tmpfile"),
    ("open", [errno.ENOSPC], "tmpfile"),
    ("unlink", [errno.EIO], "tmpfile"),
    ("tmpfile", [errno.ENOSPC, errno.EMFILE], ""),
    ("query", [errno.ENOMEM, errno.EINTR], ""),
    ("fadvise", [errno.EIO], ""),
    ("madvise", [errno.EIO, errno.EAGAIN], ""),
    ("close", [errno.EIO], ""),
]
# What a caller need not be told, because the work is done all the same.
UNTOLD = {
    *(("mmap_sync", number) for number in (errno.ENOMEM, errno.EIO)),
    ("munmap", errno.ENOMEM),
    ("unlink", errno.EIO),
    *(("query", number) for number in (errno.ENOMEM, errno.EIO, errno.EINTR)),
    *(("fadvise", number) for number in (errno.EIO, errno.ENOMEM)),
    *(("close", number) for number in (errno.EIO, errno.EINTR)),
    *((name, errno.EINTR) for name in ("msync", "fdatasync", "fsync", "fsync_directory", "pwrite", "pwrite_dsync")),
    *((name, errno.EINTR) for name in ("sync_file_range", "range_written")),
    ("pwrite", 0),
    ("pwrite_dsync", 0),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "number", "also"),
    [
        pytest.param(name, number, also, id="-".join(filter(None, (name, errno.errorcode.get(number, "short"), also))))
        for name, numbers, also in CASES
        for number in numbers
    ],
)
async def test_a_call_that_fails_once_is_told_or_survived(
    directory: Path, faults: Faults, name: str, number: int, also: str
) -> None:
    await workload(Ledger(_made(directory, "warm"), 0))  # the pool's threads and the loop's bridge are there after it
    failures = 0
    for n in range(1, 1000):
        before = _descriptors()
        ledger = Ledger(_made(directory, str(n)), number)
        if also:
            faults.fail(also, errno.EOPNOTSUPP, count=ALWAYS)
        faults.fail(name, number, nth=n, short_bytes=0 if number else 100)
        with warnings.catch_warnings():
            # A file that could not be re-opened is taken by a dup, and says so.
            warnings.simplefilter("ignore", apmem2.DurabilityWarning)
            await workload(ledger)
        seen = faults.calls(name) >= n
        faults.clear()
        if not seen:
            assert ledger.errors == []
            assert len(ledger.acknowledged) == 9, "the workload is not what it says"
            break
        failures += bool(ledger.errors)
        if (name, number) in UNTOLD:
            assert ledger.errors == []
        assert ledger.wrong == [], f"call {n}"
        ledger.forget()
        await check(ledger, leftover=name == "unlink")
        await every_descriptor_closed(before, allowed=int(name == "close"))
        assert apmem2.statistics().in_flight == 0
        assert apmem2.statistics().threads <= 16
    else:
        raise AssertionError("the workload never ends without a failure")
    assert n > 1, f"the workload never calls {name}"
    assert failures or (name, number) in UNTOLD, "nobody was ever told"


def _made(directory: Path, name: str) -> Path:
    path = directory / name
    path.mkdir()
    return path


# ---- opening anew after a failure: its calls fail as well ----


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("fdatasync", errno.EIO),
        ("fstat", errno.EIO),
        ("malloc", errno.ENOMEM),
        ("fadvise", errno.EIO),
        ("mmap", errno.ENOMEM),
        ("mincore", errno.ENOMEM),
        ("open", errno.EMFILE),
        ("fsync", errno.EIO),
    ],
)
async def test_a_failed_file_is_never_believed_because_looking_at_its_cache_failed(
    directory: Path, faults: Faults, name: str, number: int
) -> None:
    path = directory / "a"
    await (await apmem2.open(path, size=FIRST)).aclose()
    for n in range(1, 100):
        before = _descriptors()
        m = await apmem2.open(path)
        faults.fail("msync", errno.EIO)
        with pytest.raises(apmem2.PersistError):
            await m.persist(0, 1)
        faults.clear()
        await m.aclose()
        faults.fail(name, number, nth=n)
        faults.fail("mincore", number if name == "mincore" else 0, nth=n, count=int(name == "mincore"))
        refused: apmem2.PmemError | None = None
        try:
            again = await apmem2.open(path)
        except apmem2.PmemError as error:
            refused = error
        else:
            assert faults.calls("mincore"), "the page cache was believed unseen"
            await again.aclose()
        seen = faults.calls(name) >= n
        faults.clear()
        if refused is not None:
            assert isinstance(refused, MemoryError | OSError)
            refused.__traceback__ = None  # whose frames hold what was opened
            await asyncio.sleep(0)
            gc.collect()
            again = await apmem2.open(path)  # and then it can be opened
            await again.persist()
            await again.aclose()
        await every_descriptor_closed(before)
        if not seen:
            assert refused is None
            break
    assert n > 1, f"opening anew never calls {name}"


# ---- the runtime's own start: each in a fresh process ----

FRESH = """
import asyncio, sys, warnings
from pathlib import Path
from faults.test_every_call_fails_once import Ledger, check, workload
from apmem2.native import lib
import apmem2

call, number, n = (int(word) for word in sys.argv[1:4])
directory = Path("work")
directory.mkdir()
ledger = Ledger(directory, number)

async def main():
    try:
        await workload(ledger)
    finally:
        global told
        told = lib.apm_fault_calls(call) >= n
        lib.apm_fault_clear()

async def again():
    await workload(Ledger(directory, 0)) if not any(directory.iterdir()) else None
    await check(ledger)

lib.apm_fault_set(call, n, 1, number, 0)
asyncio.run(main())
asyncio.run(again())
print("seen" if told else "unseen", "told" if ledger.errors else "untold")
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("eventfd", errno.EMFILE),
        ("eventfd", errno.ENOMEM),
        ("pthread_create", errno.EAGAIN),
        ("malloc", errno.ENOMEM),
    ],
)
def test_a_runtime_whose_start_fails_once_says_so_and_starts_the_next_time(
    run_program: Any, monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, number: int
) -> None:
    here = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    call = int(getattr(lib, f"APM_CALL_{name.upper()}"))
    answers = []
    for n in range(1, 30):
        done = run_program(FRESH, str(call), str(number), str(n), flags=("-X", "dev", "-W", "error"))
        answers.append(done.stdout.strip())
        os.rename(directory / "work", directory / f"work{n}")
        if answers[-1].startswith("unseen"):
            break
    assert answers[0] == "seen told"
    assert answers[-1] == "unseen untold"
