"""What reaches the device for a page, by the counters of a device that nobody else uses, on real file systems.

A store makes the whole folio of the page cache dirty. So a persisted page must cost one page whatever brought the file
to the cache: our own creation, another process that read all of it, our own reading; and where it cannot, in a mapping
that somebody else made, it can be measured and cured.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import apmem2

from .disk import MIB, LoopDisk, requirements

PAGE = mmap.PAGESIZE
SIZE = 16 * MIB
PAGES = 50
KINDS = ["ext4", "xfs"]
REASON = requirements(*KINDS, fuse=False)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

READ_WHOLE = "import sys\nwith open(sys.argv[1], 'rb', buffering=0) as f:\n    while f.read(1 << 20): pass"
Act = Callable[[apmem2.Map, int], Awaitable[None]]


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest) -> Iterator[LoopDisk]:
    with LoopDisk(kind=request.param) as disk:
        yield disk


async def store_and_persist(m: apmem2.Map, offset: int) -> None:
    m[offset] = (m[offset] + 1) % 256
    await m.persist(offset, 1)


async def copy(m: apmem2.Map, offset: int) -> None:
    await m.memcpy(offset, random.randbytes(PAGE))


async def bytes_per_page(disk: LoopDisk, m: apmem2.Map, act: Act) -> float:
    """Mean of what the device was given for one page, over pages all over the file."""
    offsets = [page * PAGE for page in random.sample(range(len(m) // PAGE), PAGES)]
    before = disk.stat()
    for offset in offsets:
        await act(m, offset)
    written = disk.stat() - before
    assert written.sectors_written * 512 >= PAGES * PAGE, "not even the pages themselves"
    assert written.flushes >= PAGES
    return written.sectors_written * 512 / PAGES


def read_by_another_process(path: Path) -> None:
    subprocess.run([sys.executable, "-S", "-c", READ_WHOLE, str(path)], check=True)


def written_in_large_pieces(path: Path) -> Path:
    with path.open("xb", buffering=0) as file:
        for _ in range(0, SIZE, MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    return path


@asynccontextmanager
async def fresh(path: Path) -> AsyncIterator[apmem2.Map]:
    async with apmem2.open(path, SIZE) as m:
        yield m


@asynccontextmanager
async def opened_anew(path: Path) -> AsyncIterator[apmem2.Map]:
    written_in_large_pieces(path)
    async with apmem2.open(path) as m:
        yield m


@asynccontextmanager
async def after_another_process_has_read_it(path: Path) -> AsyncIterator[apmem2.Map]:
    async with apmem2.open(path, SIZE):
        pass
    read_by_another_process(path)
    async with apmem2.open(path) as m:
        yield m


@asynccontextmanager
async def after_our_own_scan(path: Path) -> AsyncIterator[apmem2.Map]:
    async with opened_anew(path) as m:
        for at in range(0, SIZE, 3 * MIB):  # whole blocks and parts of some
            await m.populate(at, min(3 * MIB, SIZE - at))
            m.view[at : at + 3 * MIB : PAGE].tobytes()
        yield m


@asynccontextmanager
async def populated_at_once(path: Path) -> AsyncIterator[apmem2.Map]:
    async with opened_anew(path) as m:
        await m.populate()
        yield m


@asynccontextmanager
async def after_reading_it_through_the_view(path: Path) -> AsyncIterator[apmem2.Map]:
    async with opened_anew(path) as m:
        m.view[::PAGE].tobytes()
        yield m


CASES = [
    fresh, opened_anew, after_another_process_has_read_it, after_our_own_scan, populated_at_once,
    after_reading_it_through_the_view,
]  # fmt: skip


@pytest.mark.asyncio
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_a_persisted_page_is_one_page_to_the_device(disk: LoopDisk, case: Callable[..., object]) -> None:
    async with case(disk.mount_point / "a") as m:  # type: ignore[attr-defined]
        assert await bytes_per_page(disk, m, store_and_persist) <= 1.2 * PAGE
        assert await bytes_per_page(disk, m, copy) <= 1.2 * PAGE


# ---- mappings that somebody else made ------------------------------------------------------------------------------


@asynccontextmanager
async def adopted(path: Path, disk: LoopDisk) -> AsyncIterator[tuple[apmem2.Map, mmap.mmap]]:
    """A plain mapping of a file that lies in large folios, which the kernel must have for this."""
    fd = os.open(written_in_large_pieces(path), os.O_RDWR)
    memory = mmap.mmap(fd, 0)
    os.close(fd)
    async with apmem2.map_from_existing(memory) as m:
        if await bytes_per_page(disk, m, store_and_persist) < 8 * PAGE:
            pytest.skip(f"no large folios in the page cache of {disk.kind} on this kernel")
        yield m, memory
    memory.close()


@pytest.mark.asyncio
async def test_what_a_persist_will_write_can_be_measured(disk: LoopDisk) -> None:
    async with adopted(disk.mount_point / "a", disk) as (m, memory):
        content = memory[:]
        expected = await bytes_per_page(disk, m, store_and_persist) / PAGE
        m[:] = content
        await m.persist()
        before = disk.stat()
        measured = await m.write_amplification(samples=4)
        assert measured is not None
        assert expected / 2 <= measured <= expected * 2  # folios differ in size
        assert (disk.stat() - before).sectors_written * 512 <= 4 * 2 * MIB + PAGES * PAGE  # each sample's, once
        assert memory[:] == content
        assert (await m.write_amplification(PAGE + 5, 10, samples=1) or 0) > 8


@pytest.mark.asyncio
async def test_split_folios_makes_a_page_one_page_again(disk: LoopDisk) -> None:
    async with adopted(disk.mount_point / "a", disk) as (m, memory):
        m[5 * PAGE : 9 * PAGE] = b"dirty" * (4 * PAGE // 5) + b"dirt"
        content = memory[:]
        read = disk.stat().sectors_read
        assert await m.split_folios() == SIZE
        assert memory[:] == content
        assert disk.stat().sectors_read == read, "it was split in memory"
        assert await bytes_per_page(disk, m, store_and_persist) <= 1.2 * PAGE
        assert await m.write_amplification() == 1.0
        assert await m.split_folios() == 0


@pytest.mark.asyncio
async def test_a_part_can_be_split_by_itself(disk: LoopDisk) -> None:
    async with adopted(disk.mount_point / "a", disk) as (m, _):
        assert MIB <= await m.split_folios(8 * MIB, MIB) <= 4 * MIB
        assert await m.write_amplification(8 * MIB, MIB) == 1.0
        assert (await m.write_amplification(0, MIB) or 0) > 8


@pytest.mark.asyncio
@pytest.mark.parametrize("random_access", [False, True])
async def test_only_random_access_keeps_later_faults_from_bringing_large_folios(
    disk: LoopDisk, random_access: bool
) -> None:
    path = disk.mount_point / "a"
    async with adopted(path, disk) as (m, memory):
        await m.split_folios(random_access=random_access)
        memory.madvise(mmap.MADV_DONTNEED)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memoryview(memory)[::PAGE].tobytes()
        await m.persist()
        measured = await m.write_amplification(samples=64)
        assert measured is not None
        assert (measured == 1.0) is random_access


@pytest.mark.asyncio
async def test_what_was_read_while_it_was_mapped_is_split_too(disk: LoopDisk) -> None:
    """A map of our own, whose file another process read in the meantime."""
    path = disk.mount_point / "a"
    async with apmem2.open(path, SIZE) as m:
        read_by_another_process(path)
        if (await m.write_amplification(samples=32) or 1) < 2:
            pytest.skip(f"no large folios in the page cache of {disk.kind} on this kernel")
        assert await m.split_folios() > SIZE // 2
        assert await bytes_per_page(disk, m, store_and_persist) <= 1.2 * PAGE
