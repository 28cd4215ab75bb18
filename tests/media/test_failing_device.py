"""Maps on a disk that really fails, fills up or hangs, below a real file system of the host's kernel.

The kernel keeps the new bytes of a failed write-back, calls them clean, and tells each description once. So a map must
learn of it whoever was told first, the file stays failed until all are closed, and what is read after opening it anew
is what the disk has. One event loop is enough here: what is tested is the kernel below it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import apmem2

from .disk import FaultyDisk, requirements

REASON = requirements("ext4", "xfs")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

PAGE = mmap.PAGESIZE
PAGES = 16
OLD, NEW = b"o" * PAGE, b"N" * PAGE
BAD = 5  # the page of the file that the disk does not take


@pytest.fixture(params=["ext4", "ext4-nojournal", "xfs"])
def disk(request: pytest.FixtureRequest) -> Iterator[FaultyDisk]:
    with FaultyDisk() as disk:
        disk.mkfs(request.param)
        disk.mount()
        yield disk


def make_file(disk: FaultyDisk, name: str = "file") -> Path:
    """A file of OLD in small folios, durable."""
    path = disk.mount_point / name
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    for page in range(PAGES):
        os.pwrite(fd, OLD, page * PAGE)
    os.fsync(fd)
    os.close(fd)
    return path


def extent(disk: FaultyDisk, path: Path, page: int = BAD) -> tuple[int, int]:
    """First and last byte of a page of the file on the disk."""
    first = disk.extent_of(path, page * PAGE)
    return first, first + PAGE - 1


def break_page(disk: FaultyDisk, path: Path, page: int = BAD, number: int = errno.EIO) -> None:
    disk.fail_writes(*extent(disk, path, page), errno=number)


def on_disk(disk: FaultyDisk, path: Path, page: int = BAD) -> bytes:
    return disk.read_raw(extent(disk, path, page)[0], PAGE)


def map_file(path: Path) -> tuple[int, mmap.mmap]:
    fd = os.open(path, os.O_RDWR)
    return fd, mmap.mmap(fd, 0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def store(m: apmem2.Map) -> None:
    m[BAD * PAGE : (BAD + 1) * PAGE] = NEW
    await m.persist(BAD * PAGE, PAGE)


async def copy(m: apmem2.Map) -> None:
    await m.memcpy(BAD * PAGE, NEW)


async def fill(m: apmem2.Map) -> None:
    await m.memset(BAD * PAGE, ord("N"), PAGE)


async def flush(m: apmem2.Map) -> None:
    m[BAD * PAGE : (BAD + 1) * PAGE] = NEW
    await m.flush(BAD * PAGE, PAGE)
    await m.drain()


async def nodrain(m: apmem2.Map) -> None:
    await m.memcpy(BAD * PAGE, NEW, apmem2.MemFlags.NODRAIN)
    await m.drain()


async def noflush(m: apmem2.Map) -> None:
    await m.memcpy(BAD * PAGE, NEW, apmem2.MemFlags.NOFLUSH)
    await m.persist()


async def _one_round(*work: Coroutine[Any, Any, None]) -> None:
    """All of them at once, with gaps between their pages; when one fails, all are told."""
    results = await asyncio.gather(*work, return_exceptions=True)
    errors = [error for error in results if error is not None]
    assert len(errors) in (0, len(results)), "a round has one outcome"
    for error in errors:
        raise error


async def scattered_copies(m: apmem2.Map) -> None:
    await _one_round(*(m.memcpy(page * PAGE, NEW) for page in (BAD - 4, BAD, BAD + 4)))


async def scattered_stores(m: apmem2.Map) -> None:
    pages = (BAD - 2, BAD, BAD + 2)
    for page in pages:
        m[page * PAGE : (page + 1) * PAGE] = NEW
    await _one_round(*(m.persist(page * PAGE, PAGE) for page in pages))


ACTS = {act.__name__: act for act in (store, copy, fill, flush, nodrain, noflush, scattered_copies, scattered_stores)}


async def fails(work: Coroutine[Any, Any, None], *numbers: int) -> apmem2.PersistError:
    with pytest.raises(apmem2.PersistError) as caught:
        await work
    assert caught.value.errno in (numbers or (errno.EIO,))
    return caught.value


async def assert_old_bytes_then_good(disk: FaultyDisk, path: Path) -> None:
    """Opened anew it shows what the disk has, and when the disk is well again, all is well."""
    async with apmem2.open(path) as again:
        assert again[BAD * PAGE : (BAD + 1) * PAGE] == OLD, "the page cache was believed"
        assert on_disk(disk, path) == OLD
        disk.clear()
        await store(again)
        assert on_disk(disk, path) == NEW


@pytest.mark.parametrize("act", ACTS)
def test_bytes_that_the_disk_did_not_take_are_never_acknowledged(disk: FaultyDisk, act: str) -> None:
    path = make_file(disk)

    async def work() -> None:
        m = await apmem2.open(path)
        await m.memcpy(0, NEW)
        break_page(disk, path)
        first = await fails(ACTS[act](m))
        assert isinstance(m.failed, apmem2.PersistError)
        assert m.failed.errno == first.errno
        for again in (m.persist, m.flush, m.drain, lambda: copy(m), lambda: fill(m)):
            # The kernel would say ok from now on; a drain tells of its own flush each time.
            with pytest.raises((apmem2.MapFailedError, apmem2.PersistError)):
                await again()
        with pytest.raises(apmem2.MapFailedError):
            await apmem2.open(path)
        with suppress(apmem2.PersistError):  # whoever closes a map whose flush failed may be told again
            await m.aclose()
        assert m.closed
        await assert_old_bytes_then_good(disk, path)
        assert on_disk(disk, path, 0) == NEW

    run(work())


def test_a_page_stored_into_after_the_failure_is_written_or_the_file_stays_closed(disk: FaultyDisk) -> None:
    path = make_file(disk)

    async def work() -> None:
        async with apmem2.open(path) as m:
            break_page(disk, path)
            await fails(store(m))
            m[BAD * PAGE : (BAD + 1) * PAGE] = b"L" * PAGE  # dirty again
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await apmem2.open(path)
        async with apmem2.open(path) as again:  # the disk is still bad, and the page was given up
            assert again[BAD * PAGE : (BAD + 1) * PAGE] == on_disk(disk, path) == OLD
            disk.clear()
            await store(again)
        assert on_disk(disk, path) == NEW

    run(work())


def test_both_maps_of_a_file_learn_of_it_and_another_file_on_the_disk_goes_on(disk: FaultyDisk) -> None:
    path, other_path = make_file(disk), make_file(disk, "other")

    async def work() -> None:
        source = apmem2.Source.from_path(path)
        async with (
            apmem2.open(path) as m,
            apmem2.map_new(source, required_granularity=apmem2.Granularity.PAGE, offset=PAGE) as second,
            apmem2.open(other_path) as other,
        ):
            break_page(disk, path)
            first = await fails(store(m))
            with pytest.raises(apmem2.MapFailedError) as caught:
                await second.persist(0, 1)
            assert str(caught.value.__cause__) == str(first)
            await store(other)
            assert on_disk(disk, other_path) == NEW
        await assert_old_bytes_then_good(disk, path)

    run(work())


@pytest.mark.parametrize("told", ["owner", "sync"])
@pytest.mark.parametrize("kind", ["owned", "adopted"])
def test_an_error_that_somebody_else_was_told_first_is_told_to_us_as_well(
    disk: FaultyDisk, told: str, kind: str
) -> None:
    """Law 13: the page is clean and the other description has had its error; ours has not."""
    path = make_file(disk)

    async def work() -> None:
        fd, memory = map_file(path)
        m = await (apmem2.map_from_existing(memory) if kind == "adopted" else apmem2.open(path))
        break_page(disk, path)
        m[BAD * PAGE : (BAD + 1) * PAGE] = NEW
        if told == "owner":
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.fsync(fd)
        else:
            os.sync()
        with suppress(OSError):
            memory.flush()  # and the description of the owner's mapping as well
        os.fsync(fd)  # the kernel says ok
        assert on_disk(disk, path) == OLD
        await fails(m.persist(BAD * PAGE, PAGE))
        await m.aclose()
        memory.close()
        os.close(fd)
        await assert_old_bytes_then_good(disk, path)

    run(work())


def test_an_adopted_mapping_whose_persist_failed_is_refused_while_its_owner_keeps_it(disk: FaultyDisk) -> None:
    """The lost bytes are pinned in the page cache by the mapping itself: nothing may be believed before it is gone."""
    path = make_file(disk)

    async def work() -> None:
        fd, memory = map_file(path)
        async with apmem2.map_from_existing(memory) as m:
            break_page(disk, path)
            memory[BAD * PAGE : (BAD + 1) * PAGE] = NEW
            await fails(m.persist(BAD * PAGE, PAGE))
        for opening in (apmem2.map_from_existing(memory), apmem2.open(path)):
            with pytest.raises(apmem2.MapFailedError) as caught:
                await opening
            assert caught.value.code == apmem2.ErrorCode.CACHE_NOT_DROPPED
            assert isinstance(caught.value.__cause__, OSError)
            assert caught.value.__cause__.errno == errno.EIO
            del opening, caught
        await asyncio.sleep(0)
        gc.collect()  # the exceptions' tracebacks hold the buffer
        memory.close()
        os.close(fd)
        await assert_old_bytes_then_good(disk, path)

    run(work())


def test_a_disk_without_space_below_a_file_that_was_allocated_is_an_error_like_any_other(disk: FaultyDisk) -> None:
    """A thin volume can be full although the file system is not."""
    path = make_file(disk)

    async def work() -> None:
        async with apmem2.open(path) as m:
            break_page(disk, path, number=errno.ENOSPC)
            await fails(store(m), errno.ENOSPC, errno.EIO)
            with pytest.raises(apmem2.MapFailedError):
                await m.persist()
        await assert_old_bytes_then_good(disk, path)

    run(work())


def test_a_flush_that_the_disk_refuses_is_an_error(disk: FaultyDisk) -> None:
    """The write was done, but only into the disk's cache."""
    path = make_file(disk)

    async def work() -> None:
        async with apmem2.open(path) as m:
            m[0] = 1
            await m.persist(0, 1)
            disk.fail_flushes()
            m[1] = 1
            await fails(m.persist(1, 1))
            assert m.failed is not None
            disk.clear()
            with pytest.raises(apmem2.MapFailedError):
                await m.persist(1, 1)

    if disk.kind == "ext4-nojournal":
        run(work())
    else:
        pytest.skip("a journal that cannot be flushed takes its whole file system down")


def test_a_file_on_a_disk_that_hangs_stops_nobody_else(disk: FaultyDisk, directory: Path) -> None:
    """Law 8: the round holds one thread and its own waiters, and closing ends when the disk answers."""
    path, same_disk = make_file(disk), make_file(disk, "other")

    async def work() -> None:
        async with (
            apmem2.open(path) as m,
            apmem2.open(same_disk) as neighbour,
            apmem2.open(directory / "elsewhere", size=PAGES * PAGE) as other,
        ):
            disk.hold("write", *extent(disk, path))
            stuck = [asyncio.ensure_future(store(m))]
            await asyncio.get_running_loop().run_in_executor(None, disk.wait_for, "held", 1)
            stuck += [asyncio.ensure_future(m.persist(0, 1)) for _ in range(40)]
            for turn in range(20):
                await store(other)
                await other.memcpy(0, bytes([turn]))
                async with apmem2.open(directory / f"new{turn}", size=PAGE) as new:
                    await new.memcpy(0, b"x")
            await neighbour.memcpy(0, NEW)
            assert on_disk(disk, same_disk, 0) == NEW
            assert not any(job.done() for job in stuck)
            assert apmem2.statistics().oldest_round_s > 0
            disk.clear()
            disk.release()
            await asyncio.gather(*stuck)
            assert on_disk(disk, path) == NEW

    run(work())


def test_a_write_that_hangs_and_then_fails_is_told_to_all_who_waited(disk: FaultyDisk) -> None:
    path = make_file(disk)

    async def work() -> None:
        m = await apmem2.open(path)
        disk.hold("write", *extent(disk, path))
        first = asyncio.ensure_future(store(m))
        await asyncio.get_running_loop().run_in_executor(None, disk.wait_for, "held", 1)
        later = asyncio.ensure_future(m.persist(0, 1))
        closing = asyncio.ensure_future(m.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        disk.clear()
        disk.release(errno.EIO)
        results = await asyncio.gather(first, later, closing, return_exceptions=True)
        assert isinstance(results[0], apmem2.PersistError)
        assert isinstance(results[1], apmem2.MapFailedError | apmem2.PersistError | apmem2.ClosedError)
        assert results[2] is None or isinstance(results[2], apmem2.PmemError)
        assert m.closed
        await assert_old_bytes_then_good(disk, path)

    run(work())
