"""An error is told to everyone whom it concerns, and never swallowed by whoever met it first (promise 3, laws 4, 13).

Each of these was once wrong: a drain that said "durable" after another had been told of the failure, an opener's fsync
that took the file's only report of a lost write-back and kept it to itself, a retried msync that said "ok".
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from pathlib import Path

import pytest

import apmem2
from tests.conftest import Faults, Program, Recorder


@pytest.mark.asyncio
async def test_every_drain_after_a_failed_flush_is_told(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=8192) as m:
        faults.fail("msync", errno.EIO)
        await m.flush(0, 1)
        with pytest.raises(apmem2.PersistError):
            await m.drain()
        for _ in range(3):
            with pytest.raises(apmem2.MapFailedError):
                await m.drain()


@pytest.mark.asyncio
async def test_a_close_tells_of_a_failed_flush_only_if_nobody_was_told(directory: Path, faults: Faults) -> None:
    for drained in (True, False):
        m = await apmem2.open(directory / "a", size=8192)
        faults.clear()
        faults.fail("msync", errno.EIO)
        await m.flush(0, 1)
        if drained:
            with pytest.raises(apmem2.PersistError):
                await m.drain()
            await m.aclose()
        else:
            with pytest.raises(apmem2.PersistError):
                await m.aclose()
        faults.clear()


@pytest.mark.asyncio
async def test_a_drain_on_another_map_of_a_failed_file_is_told(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=8192) as one, apmem2.open(directory / "a") as other:
        faults.fail("msync", errno.EIO)
        with pytest.raises(apmem2.PersistError):
            await one.persist(0, 1)
        with pytest.raises(apmem2.MapFailedError):
            await other.drain()


@pytest.mark.asyncio
async def test_a_sync_that_fails_while_growing_fails_the_file_for_its_maps(directory: Path, faults: Faults) -> None:
    """The description is shared: the report that the opener's fsync took would never come again."""
    async with apmem2.open(directory / "a", size=8192) as m:
        faults.fail("fsync", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await apmem2.open(directory / "a", size=20000, grow=True)
        with pytest.raises(apmem2.MapFailedError) as caught:
            await m.persist(0, 1)
        assert isinstance(caught.value.__cause__, apmem2.PersistError)
        assert caught.value.__cause__.errno == errno.EIO


@pytest.mark.asyncio
async def test_after_a_sync_that_failed_while_opening_the_next_opening_looks_at_the_disk(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    (directory / "a").write_bytes(bytes(8192))
    faults.fail("fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await apmem2.open(directory / "a")
    before = recorder.mark()
    async with apmem2.open(directory / "a"):
        pass
    later = [event.name for event in recorder.events() if event.begun > before]
    assert "mincore" in later, "the page cache was believed"


@pytest.mark.asyncio
async def test_an_msync_without_memory_is_not_asked_twice(directory: Path, faults: Faults, recorder: Recorder) -> None:
    """ENOMEM is what an unmapped page gives as well; of a mapped one it is a failed write-back, and told once only."""
    async with apmem2.open(directory / "a", size=8192) as m:
        faults.fail("msync", errno.ENOMEM)
        with pytest.raises(apmem2.PersistError):
            await m.persist(0, 1)
        assert [name for name in recorder.calls() if name == "msync"] == ["msync"]
        with pytest.raises(apmem2.MapFailedError):
            await m.persist(0, 1)


@pytest.mark.asyncio
async def test_a_synchronous_write_that_worked_once_has_no_plain_way(directory: Path, faults: Faults) -> None:
    """Later, EOPNOTSUPP is what the write-back said, perhaps of another page, and no missing trick."""
    async with apmem2.open(directory / "a", size=8192) as m:
        await m.memcpy(0, b"x")
        faults.fail("pwrite_dsync", errno.EOPNOTSUPP)
        with pytest.raises(apmem2.PersistError):
            await m.memcpy(0, b"y")
        with pytest.raises(apmem2.MapFailedError):
            await m.memcpy(0, b"y")


@pytest.mark.asyncio
async def test_a_copy_that_was_refused_before_it_wrote_fails_nobody_else(directory: Path, faults: Faults) -> None:
    long_data = bytearray(b"z" * 300_000)
    async with apmem2.open(directory / "a", size=1 << 20) as m:
        faults.fail("open", errno.EMFILE, count=10)  # the kernel's table cannot be read: is the source the file itself?
        faults.fail("malloc", errno.ENOMEM, count=10)  # and there is no room for a copy, which would do as well
        with pytest.raises(OSError, match="Cannot allocate memory"):
            await m.memcpy(0, long_data)
        faults.clear()
        faults.fail("open", errno.EMFILE, count=10)
        await m.memcpy(0, long_data)
        assert m.failed is None
        assert bytes(m[0:300_000]) == long_data


@pytest.mark.asyncio
async def test_an_adopted_range_ends_where_its_file_does(directory: Path) -> None:
    """What lies beyond in the last page never reaches the file, and a persist of it would say that the file shrank."""
    (directory / "a").write_bytes(bytes(5000))
    with (directory / "a").open("r+b") as file, mmap.mmap(file.fileno(), 5000) as mm:
        address = apmem2.core.ranges.pin(mm).address
        with pytest.raises(apmem2.OutOfRangeError):
            await apmem2.map_from_existing(address, 8192)
        async with apmem2.map_from_existing(address, 5000) as m:
            await m.persist()


@pytest.mark.asyncio
async def test_a_name_is_synced_also_when_the_file_is_known_already(directory: Path, recorder: Recorder) -> None:
    (directory / "a").write_bytes(bytes(8192))
    fd = os.open(directory / "a", os.O_RDWR)
    try:
        source = apmem2.Source.from_fd(fd)
        async with apmem2.map_new(source, required_granularity=apmem2.Granularity.PAGE):
            before = recorder.mark()
            async with apmem2.open(directory / "a"):
                later = [event.name for event in recorder.events() if event.begun > before]
        assert "fsync" in later
        assert "fsync_directory" in later
    finally:
        os.close(fd)


@pytest.mark.asyncio
async def test_growing_writes_zeros_over_nobodys_bytes(directory: Path, faults: Faults) -> None:
    """Two open and grow the same file: the second gets it when it is whole, and what it then writes stays."""
    (directory / "a").write_bytes(b"x" * 4096)
    async with apmem2.open(directory / "a") as small:
        faults.hold("pwrite", 0)
        first = asyncio.create_task(_opened(directory / "a", 200_000))
        await faults.held()
        second = asyncio.create_task(_opened(directory / "a", 200_000))
        await small.memcpy(0, b"mine", apmem2.MemFlags(0))
        assert (directory / "a").stat().st_size == 4096, "bytes are inside the file that zeros will be written over"
        faults.release()
        one, two = await first, await second
        await two.memcpy(100_000, b"theirs")
        assert bytes(one[100_000:100_006]) == b"theirs"
        assert bytes(one[0:4]) == b"mine"
        await one.aclose()
        await two.aclose()


async def _opened(path: Path, size: int) -> apmem2.Map:
    return await apmem2.open(path, size=size, grow=True)


@pytest.mark.asyncio
async def test_copies_that_hang_on_one_file_leave_room_for_all_else(directory: Path, faults: Faults) -> None:
    """Law 8, of plain copies: however many of one file hang, others are copied, opened and closed meanwhile."""
    async with apmem2.open(directory / "a", size=65536) as hung, apmem2.open(directory / "b", size=65536) as healthy:
        faults.hold("pwrite", (directory / "a").stat().st_ino)
        waiting = [asyncio.create_task(hung.memcpy(0, b"x", apmem2.MemFlags.NOFLUSH)) for _ in range(40)]
        await faults.held(2)
        await healthy.memcpy(0, b"y", apmem2.MemFlags.NOFLUSH)
        async with apmem2.open(directory / "b") as third:
            await third.persist(0, 1)
        faults.release()
        await asyncio.gather(*waiting)


@pytest.mark.asyncio
async def test_drains_that_find_nothing_let_others_run(directory: Path) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with apmem2.open(directory / "a", size=4096) as m:
        beside = asyncio.create_task(other())
        for _ in range(5000):
            await m.drain()
        beside.cancel()
    assert turns > 1


def test_a_file_that_may_not_be_opened_again_is_persisted_all_the_same(run_program: Program, directory: Path) -> None:
    """Opened as root, used as nobody: its durability is UNKNOWN then, and its persists work."""
    if os.getuid() != 0:
        pytest.skip("needs root to give root up: run as root, as .ci/run does")
    (directory / "a").write_bytes(bytes(8192))
    (directory / "a").chmod(0o600)
    run_program(
        """
import asyncio, mmap, os, sys, warnings
import apmem2
warnings.simplefilter("ignore", apmem2.DurabilityWarning)

async def main():
    file = open(sys.argv[1], "r+b")
    mm = mmap.mmap(file.fileno(), 8192)
    os.setgid(65534)
    os.setuid(65534)
    async with apmem2.map_from_existing(mm) as m:
        assert m.durability is apmem2.Durability.UNKNOWN, m
        mm[0] = 7
        await m.persist(0, 1)
        await m.memcpy(1, b"abc")
        assert mm[1:4] == b"abc" and m.failed is None

asyncio.run(main())
""",
        str(directory / "a"),
    )
