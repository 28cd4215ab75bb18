"""Folios of the page cache: what measuring and splitting take, answer and ask of the kernel, and reading in by advice.

What reaches a device is in tests/media/test_page_cache.py.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apmem2
from apmem2 import Granularity, Protection, Sharing, Source

if TYPE_CHECKING:
    from conftest import Event, Faults, Recorder

PAGE = mmap.PAGESIZE
MIB = 1 << 20
SIZE = 6 * MIB + 3 * PAGE
ALWAYS = 1 << 30
REFUSALS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM]


@pytest.fixture
def path(directory: Path) -> Path:
    """A file that was written in large pieces."""
    with (directory / "a").open("xb", buffering=0) as file:
        file.write(os.urandom(SIZE))
        os.fsync(file.fileno())
    return directory / "a"


def mapping(path: Path, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    with path.open("rb" if access == mmap.ACCESS_READ else "r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def all_present(first: int, last: int) -> bool:
    """Are the pages of these addresses in our page tables?"""
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(first // PAGE * 8)
        entries = table.read((last // PAGE - first // PAGE + 1) * 8)
    return len(entries) > 0 and all(entries[at + 7] & 0x80 for at in range(0, len(entries), 8))


CALLS: dict[str, Callable[..., Any]] = {
    "split_folios": apmem2.Map.split_folios,
    "write_amplification": apmem2.Map.write_amplification,
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", CALLS)
async def test_ranges_are_those_of_persist(path: Path, name: str) -> None:
    async with apmem2.open(path) as m:
        call = CALLS[name]
        await call(m, 0, 0)
        await call(m, 100, PAGE)
        await call(m, offset=0, size=SIZE)
        for offset, size in ((-1, 1), (0, SIZE + 1), (SIZE, 1)):
            with pytest.raises(apmem2.OutOfRangeError):
                await call(m, offset, size)
        with pytest.raises(TypeError, match="needs a size"):
            await call(m, 0)
    with pytest.raises(apmem2.ClosedError):
        await call(m)


@pytest.mark.asyncio
async def test_the_number_of_samples_is_bounded(path: Path) -> None:
    async with apmem2.open(path) as m:
        for samples in (0, -1, 1025):
            with pytest.raises(ValueError, match="samples"):
                await m.write_amplification(samples=samples)
        assert await m.write_amplification(samples=1024) in (None, 1.0)


@pytest.mark.asyncio
async def test_a_map_that_may_only_be_read_can_be_split_and_not_measured(path: Path) -> None:
    memory = mapping(path, mmap.ACCESS_READ)
    async with apmem2.map_from_existing(memory) as m:
        assert await m.split_folios() >= 0
        with pytest.raises(apmem2.AccessError):
            await m.write_amplification()
    memory.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("sharing", Sharing)
async def test_where_nothing_is_written_there_is_nothing_to_measure_or_split(
    sharing: Sharing, recorder: Recorder
) -> None:
    with pytest.warns(apmem2.DurabilityWarning):
        m = await apmem2.map_new(Source.anonymous(4 * PAGE), required_granularity=Granularity.PAGE, sharing=sharing)
    async with m:
        m[:4] = b"kept"
        assert await m.write_amplification() is None
        assert await m.split_folios(random_access=True) == 0
        assert m[:4] == b"kept"
    assert "madvise" not in recorder.calls()


@pytest.mark.asyncio
async def test_private_changes_of_a_file_are_kept(path: Path) -> None:
    with pytest.warns(apmem2.DurabilityWarning):
        m = await apmem2.map_new(
            Source.from_path(path), required_granularity=Granularity.PAGE, sharing=Sharing.PRIVATE, length=4 * PAGE
        )
    async with m:
        m[:4] = b"kept"
        assert (await m.split_folios(), await m.write_amplification()) == (0, None)
        assert m[:4] == b"kept"


@pytest.mark.asyncio
async def test_without_a_page_cache_there_is_nothing_to_do(path: Path, forced: Callable[[str], None]) -> None:
    forced("CACHE_LINE")
    with pytest.warns(apmem2.DurabilityWarning):
        m = await apmem2.open(path)
    async with m:
        assert (await m.split_folios(), await m.write_amplification()) == (0, None)


@pytest.mark.asyncio
async def test_what_is_split_is_persisted_before(path: Path, recorder: Recorder) -> None:
    """A dirty folio is not split; and nothing that the kernel does with it afterwards can lose what was stored."""
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        m[: 3 * PAGE] = b"x" * (3 * PAGE)
        before = recorder.mark()
        await m.split_folios(PAGE, 2 * MIB)
        events = [event for event in recorder.events() if event.begun > before]
        synced = [event for event in events if event.name == "msync"]
        assert synced[0].offset == m.address + PAGE
        assert synced[-1].offset + synced[-1].size == m.address + PAGE + 2 * MIB
        assert all(event.result == 0 for event in synced)
        assert min(event.begun for event in events if event.name == "madvise") > synced[-1].ended
        assert m[: 3 * PAGE] == b"x" * (3 * PAGE)
    memory.close()


@pytest.mark.asyncio
async def test_a_sync_that_fails_is_told_and_nothing_is_split(path: Path, faults: Faults) -> None:
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        faults.fail("msync", errno.EIO)
        with pytest.raises(apmem2.PersistError):
            await m.split_folios()
        assert faults.calls("madvise") == 0
        with pytest.raises(apmem2.MapFailedError):
            await m.split_folios()
        with pytest.raises(apmem2.MapFailedError):
            await m.write_amplification()
    memory.close()


@pytest.mark.asyncio
async def test_measuring_changes_no_byte_and_leaves_nothing_dirty(path: Path, recorder: Recorder) -> None:
    content = content_of(path)
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        before = recorder.mark()
        measured = await m.write_amplification(samples=3)
        assert measured is None or measured >= 1
        events = [event for event in recorder.events() if event.begun > before]
        made_dirty = {event.offset - m.address for event in events if event.name == "madvise"}
        last = max(event.ended for event in events if event.name == "madvise")
        after = [event for event in events if event.begun > last]  # by msync, of addresses, or by ranges of the file
        synced = {event.offset - m.address for event in after if event.name == "msync"}
        synced |= {event.offset for event in after if event.name == "sync_file_range"}
        assert len(made_dirty) == 3
        assert made_dirty <= synced
        assert memory[:] == content == content_of(path)
    memory.close()


@pytest.mark.asyncio
async def test_beyond_the_end_of_a_truncated_file_is_an_error_and_no_signal(path: Path) -> None:
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        os.truncate(path, PAGE)
        with pytest.raises(apmem2.PersistError):
            await m.write_amplification()
    memory.close()


@pytest.mark.asyncio
async def test_a_raw_range_that_was_unmapped_is_said_to_be(path: Path) -> None:
    memory = mapping(path)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    m = await apmem2.map_from_existing(address, SIZE)
    memory.close()
    for name in CALLS:
        with pytest.raises(apmem2.NotMappedError):
            await CALLS[name](m)
    await m.aclose()


# ---- plain ways -----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("number", REFUSALS, ids=[errno.errorcode[number] for number in REFUSALS])
async def test_where_the_kernel_refuses_the_advice_nothing_is_known_and_nothing_split(
    path: Path, faults: Faults, number: int
) -> None:
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        faults.fail("madvise", number, count=ALWAYS)
        assert await m.write_amplification() is None
        assert await m.split_folios(random_access=True) == 0
        assert m.failed is None
    memory.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["open", "mmap", "mincore"])
async def test_splitting_does_without_what_it_looks_with(path: Path, faults: Faults, name: str) -> None:
    """/proc, a window of its own, the table of what is cached."""
    memory = mapping(path)
    bytes(memory)  # all of it is in the page tables
    async with apmem2.map_from_existing(memory) as m:
        faults.fail(name, errno.EACCES, count=ALWAYS)
        split = await m.split_folios()
        faults.clear()
        assert split == 0 or name != "open", "it said more than it can have seen"
        assert await m.write_amplification(samples=64) in (None, 1.0)
    memory.close()


def pieces_advised(recorder: Recorder, after: int) -> list[Event]:
    """WILLNEED, in order: what drops the cache asks for whole blocks."""
    events = [event for event in recorder.events() if event.begun > after and event.name == "fadvise"]
    return [event for event in events if event.size <= 128 << 10]


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["open", "mmap", "mincore"])
async def test_without_large_reads_single_pages_are_read_ahead(
    path: Path, faults: Faults, recorder: Recorder, name: str
) -> None:
    """Every byte is asked for once, in requests that no kernel cuts short, and blocks before the faults need them."""
    async with apmem2.open(path) as m:
        faults.fail(name, errno.EACCES, count=ALWAYS)
        before = recorder.mark()
        await m.populate()
        asked = sorted((event.offset, event.size) for event in pieces_advised(recorder, before))
        assert [offset for offset, _ in asked] == list(range(0, SIZE, 128 << 10))
        assert sum(size for _, size in asked) == -(-SIZE // PAGE) * PAGE
        faults.clear()
        assert await m.write_amplification(samples=64) in (None, 1.0)
        assert m.view.tobytes() == content_of(path)


@pytest.mark.asyncio
async def test_reading_ahead_goes_before_the_faults_and_is_bounded(
    directory: Path, faults: Faults, recorder: Recorder
) -> None:
    size, block = 3 * MIB, 2 * MIB  # short enough for one job
    (directory / "b").write_bytes(os.urandom(size))
    async with apmem2.open(directory / "b") as m:
        faults.fail("open", errno.EACCES, count=ALWAYS)
        before = recorder.mark()
        await m.populate()
        faults_in = [e for e in recorder.events() if e.begun > before and e.name == "madvise"]
        assert [(event.offset - m.address, event.size) for event in faults_in] == [(0, block), (block, MIB)]
        asked = pieces_advised(recorder, before)
        assert max(event.ended for event in asked) < faults_in[0].begun, "the second block was not asked for in time"


@pytest.mark.asyncio
async def test_populating_leaves_single_pages(path: Path) -> None:
    async with apmem2.open(path) as m:
        await m.populate()
        assert await m.write_amplification(samples=64) in (None, 1.0)
        assert m.view.tobytes() == content_of(path)


@pytest.mark.asyncio
@pytest.mark.parametrize(("offset", "size"), [(0, 5 * MIB), (MIB + 7, 5 * MIB), (PAGE, 4 * MIB), (5 * MIB, MIB + 1)])
async def test_any_range_is_in_memory_after_populating_it(path: Path, offset: int, size: int) -> None:
    memory = mapping(path)
    async with apmem2.map_from_existing(memory) as m:
        memory.madvise(mmap.MADV_DONTNEED)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        await m.populate(offset, size)
        assert all_present(m.address + offset, m.address + offset + size - 1)
    memory.close()


@pytest.mark.asyncio
async def test_a_map_without_write_protection_is_populated(path: Path) -> None:
    async with apmem2.map_new(
        Source.from_path(path), required_granularity=Granularity.PAGE, protection=Protection.READ
    ) as m:
        await m.populate()
        assert m.view.tobytes() == content_of(path)
