"""Law 16: every trick has its plain way. Each is forced off by itself, as old kernels, gVisor and seccomp refuse it.

With any of them gone everything still works, and is still durable: the record holds a proof for each acknowledgement.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from crash.test_acknowledgements import Acknowledgement, Area, unproven

import apmem2

if TYPE_CHECKING:
    from conftest import Event, Faults, Recorder

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE
ALWAYS = 1 << 30
REFUSALS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM]
refused_with = pytest.mark.parametrize("number", REFUSALS, ids=[errno.errorcode[number] for number in REFUSALS])


def map_file(path: Path) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def content(path: Path) -> bytes:
    return path.read_bytes()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def syncs_after(recorder: Recorder, mark: int) -> list[Event]:
    """Writes and syncs in the order in which they began."""
    wanted = ("pwrite", "pwrite_dsync", "msync", "sync_file_range", "fdatasync", "fsync")
    return [event for event in recorder.events() if event.begun > mark and event.name in wanted]


async def everything(directory: Path, recorder: Recorder) -> None:
    """Make a file, use it in every way, and prove each acknowledgement."""
    path = directory / "a"
    told: list[Acknowledgement] = []
    made = await apmem2.open(path, size=SIZE)
    memory = map_file(path)
    async with made as m, apmem2.map_from_existing(memory) as adopted:
        inode = path.stat().st_ino
        areas = [Area(found.address, found.size, 0, inode) for found in (m, adopted)]
        descriptors = {int(m.pointer.file.fd): inode}
        assert m.durability is apmem2.Durability.POWER_LOSS

        def acknowledge(placed: int, page: int, *, written: bool = False, asked: bool = False) -> None:
            told.append(Acknowledgement(placed, recorder.mark(), inode, page * PAGE, PAGE, written, asked))

        placed = recorder.mark()
        await m.memcpy(0, b"0" * PAGE)
        acknowledge(placed, 0, written=True)
        m[PAGE : 2 * PAGE] = b"1" * PAGE
        placed = recorder.mark()
        await m.persist(PAGE, PAGE)
        acknowledge(placed, 1)
        placed = recorder.mark()
        await m.memset(2 * PAGE, ord("2"), PAGE)
        acknowledge(placed, 2, written=True)
        placed = recorder.mark()
        await m.memcpy(3 * PAGE, b"3" * PAGE, apmem2.MemFlags.NODRAIN)
        await m.drain()
        acknowledge(placed, 3, written=True)
        memory[4 * PAGE : 5 * PAGE] = b"4" * PAGE
        placed = recorder.mark()
        await adopted.persist(4 * PAGE, PAGE)
        acknowledge(placed, 4, asked=True)
        placed = recorder.mark()
        await adopted.memcpy(5 * PAGE, b"5" * PAGE)
        acknowledge(placed, 5, written=True)
        m[PAGE : 2 * PAGE] = b"1" * PAGE
        m[4 * PAGE : 5 * PAGE] = b"4" * PAGE
        placed = recorder.mark()  # one round, pages with gaps between them
        await asyncio.gather(m.persist(PAGE, PAGE), adopted.persist(4 * PAGE, PAGE), m.memcpy(7 * PAGE, b"7" * PAGE))
        acknowledge(placed, 1)
        acknowledge(placed, 4, asked=True)
        acknowledge(placed, 7, written=True)
        placed = recorder.mark()
        await m.memcpy(6 * PAGE - 8, m[5 * PAGE : 6 * PAGE])  # overlapping
        told.append(Acknowledgement(placed, recorder.mark(), inode, 6 * PAGE - 8, PAGE, True))
        assert unproven(recorder.events(), told, areas, descriptors) == []
    memory.close()
    assert names(directory) == ["a"]
    async with apmem2.open(path) as again:
        assert again[: 6 * PAGE] == b"".join(bytes([byte]) * PAGE for byte in b"012345")
    assert content(path)[6 * PAGE - 8 : 7 * PAGE - 8] == b"5" * PAGE


@pytest.mark.asyncio
@refused_with
@pytest.mark.parametrize(
    "name",
    [
        "pwrite_dsync",
        "sync_file_range",
        "range_written",
        "madvise",
        "fadvise",
        "mmap_sync",
        "tmpfile",
        "fallocate",
        "query",
    ],
)
async def test_with_a_trick_refused_everything_works_and_is_durable(
    directory: Path, faults: Faults, recorder: Recorder, name: str, number: int
) -> None:
    faults.fail(name, number, count=ALWAYS)
    await everything(directory, recorder)
    assert faults.calls(name), f"{name} was never tried"


@pytest.mark.asyncio
@refused_with
async def test_without_synchronous_writes_a_copy_is_written_and_then_synced(
    directory: Path, faults: Faults, recorder: Recorder, number: int
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.fail("pwrite_dsync", number, count=ALWAYS)
        before = recorder.mark()
        await m.memcpy(100, b"x" * 100)
        await m.memset(PAGE, 7, 2 * PAGE)
        assert m.failed is None
        calls = syncs_after(recorder, before)
        assert [event.name for event in calls] == ["pwrite_dsync", "pwrite", "msync"] * 2
        for sync, offset, size in ((calls[2], 0, PAGE), (calls[5], PAGE, 2 * PAGE)):
            assert (sync.offset, sync.size, sync.result) == (m.address + offset, size, 0), "not the pages of the copy"


@pytest.mark.asyncio
@refused_with
async def test_without_range_syncs_an_adopted_persist_asks_by_syncing_the_data(
    directory: Path, faults: Faults, recorder: Recorder, number: int
) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        memory = map_file(path)
        async with apmem2.map_from_existing(memory) as adopted:
            faults.fail("sync_file_range", number, count=ALWAYS)
            before = recorder.mark()
            await adopted.persist(0, 1)
            calls = syncs_after(recorder, before)
            assert [event.name for event in calls] == ["msync", "sync_file_range", "fdatasync"]
            assert calls[2].object == m.pointer.file.fd
            assert calls[2].result == 0
        memory.close()


@pytest.mark.asyncio
@refused_with
async def test_without_unnamed_files_creation_goes_by_a_temporary_name(
    directory: Path, faults: Faults, recorder: Recorder, number: int
) -> None:
    faults.fail("tmpfile", number, count=ALWAYS)
    faults.hold("link")
    task = asyncio.ensure_future(apmem2.open(directory / "a", size=SIZE).__aenter__())
    await faults.held()
    (seen,) = names(directory)
    assert seen != "a"
    assert seen.startswith(".")
    assert (directory / seen).stat().st_size == SIZE
    faults.release()
    async with await task:
        assert names(directory) == ["a"]
        order = [name for name in recorder.calls() if name in ("fsync", "link", "unlink", "fsync_directory")]
        assert order == ["fsync", "link", "unlink", "fsync", "fsync_directory"]  # and its link count


@pytest.mark.asyncio
@refused_with
async def test_without_fallocate_writing_allocates_the_file(directory: Path, faults: Faults, number: int) -> None:
    faults.fail("fallocate", number, count=ALWAYS)
    async with apmem2.open(directory / "a", size=64 * PAGE):
        assert (directory / "a").stat().st_blocks * 512 >= 64 * PAGE
    async with apmem2.open(directory / "a", size=128 * PAGE, grow=True):
        assert (directory / "a").stat().st_blocks * 512 >= 128 * PAGE


@pytest.mark.asyncio
@refused_with
@pytest.mark.parametrize("times", [1, 2], ids=["the unnamed file", "any hard link"])
async def test_without_hard_links_creation_finds_another_way(
    directory: Path, faults: Faults, recorder: Recorder, number: int, times: int
) -> None:
    faults.fail("link", number, count=times)
    async with apmem2.open(directory / "a", size=SIZE) as m:
        await m.memcpy(0, b"x")
        assert names(directory) == ["a"]
    order = [name for name in recorder.calls() if name in ("fsync", "link", "fsync_directory")]
    assert order[-3:] == ["link", "fsync", "fsync_directory"]


@pytest.mark.asyncio
@refused_with
@pytest.mark.parametrize("times", [1, ALWAYS], ids=["populating", "any advice"])
async def test_without_advice_populate_is_no_error(directory: Path, faults: Faults, number: int, times: int) -> None:
    """It promises that touching the range does not wait, not how: advice is one way, reading the pages another."""
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.fail("madvise", number, count=times)
        await m.populate()
        assert m.failed is None


@pytest.mark.asyncio
@refused_with
async def test_without_the_query_the_table_is_read(
    directory: Path, faults: Faults, recorder: Recorder, number: int
) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        faults.fail("query", number, count=ALWAYS)
        memory = map_file(path)
        other = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        async with apmem2.map_from_existing(memory) as adopted:
            assert adopted.pointer.file == m.pointer.file, "another file was found than the one that is mapped"
        with pytest.raises(apmem2.PrivateMemoryError):
            await apmem2.map_from_existing(other)
        memory.close()
    assert faults.calls("query")


@pytest.mark.asyncio
async def test_an_error_that_is_no_refusal_is_no_reason_for_the_plain_way(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        faults.fail("pwrite_dsync", errno.EIO)
        before = recorder.mark()
        with pytest.raises(apmem2.PersistError):
            await m.memcpy(0, b"x")
        assert not [event for event in recorder.events() if event.begun > before and event.name == "pwrite"]
