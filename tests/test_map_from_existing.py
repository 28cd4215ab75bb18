"""`map_from_existing`: whose memory is adopted, what is refused, and that the owner never notices."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, Generic, TypeVar

import cffi
import numpy as np
import pytest
import uvloop
from conftest import Faults, Program, Recorder

import apmem2
from apmem2 import Durability, DurabilityWarning, ErrorCode, Granularity, Source, map_from_existing

PAGE = mmap.PAGESIZE
T = TypeVar("T")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000


def raw_map(fd: int, size: int, *, offset: int = 0, at: int = 0, flags: int = mmap.MAP_SHARED, prot: int = 3) -> int:
    """A mapping that nothing in Python knows of."""
    address = libc.mmap(at or None, size, prot, flags | (MAP_FIXED if at else 0), fd, offset)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(address)


def raw_unmap(address: int, size: int) -> None:
    assert libc.munmap(address, size) == 0


@contextlib.contextmanager
def raw_mapped(path: Path, size: int, **how: int) -> Iterator[int]:
    """The same, gone at the end."""
    fd = os.open(path, os.O_RDWR)
    try:
        address = raw_map(fd, size, **how)
    finally:
        os.close(fd)
    try:
        yield address
    finally:
        raw_unmap(address, size)


def make_file(path: Path, pages: int = 4) -> Path:
    path.write_bytes(b"".join(bytes([65 + page]) * PAGE for page in range(pages)))
    return path


def shared(path: Path, pages: int = 4, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    """An mmap of a new file of its own."""
    if not path.exists():
        make_file(path, pages)
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, 0, access=access)
    finally:
        os.close(fd)


def address_of(buffer: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in the pool without anybody being told. The test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def warm_up(directory: Path) -> None:
    """The loop's bridge has a descriptor of its own from the first use on."""
    async with apmem2.open(directory / "warm", size=PAGE):
        pass


def _cancel_this_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


class CancelledAt(Generic[T]):
    """Awaits something, and cancels the task at its nth wait (from 1), as somebody else's `cancel()` would."""

    def __init__(self, awaited: Any, nth: int) -> None:
        self.awaited = awaited
        self.nth = nth
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, T]:
        inner = self.awaited.__await__()
        error: BaseException | None = None
        sent: Any = None
        while True:
            try:
                yielded = inner.send(sent) if error is None else inner.throw(error)
            except StopIteration as ended:
                return ended.value
            finally:
                error = None  # no circle through its traceback and this frame
            self.waits += 1
            if self.waits == self.nth:
                _cancel_this_task()
            try:
                sent = yield yielded
            except BaseException as raised:
                error = raised


# ---- what is accepted ----


def _mmap(path: Path) -> tuple[Any, int]:
    return shared(path), 4 * PAGE


def _mmap_slice(path: Path) -> tuple[Any, int]:
    return memoryview(shared(path))[100:5001], 4901


def _memoryview_cast(path: Path) -> tuple[Any, int]:
    return memoryview(shared(path))[PAGE : 3 * PAGE].cast("Q", (2, PAGE // 8)), 2 * PAGE


def _memmap(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype="f8", shape=(64, 32)), 64 * 32 * 8


def _memmap_fortran(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype="f8", shape=(64, 32), order="F"), 64 * 32 * 8


def _memmap_offset(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype="u1", offset=4321, shape=(1000,)), 1000


def _memmap_structured(path: Path) -> tuple[Any, int]:
    kind = np.dtype([("key", "<u8"), ("value", ">f4", (3,)), ("name", "S5")])
    return np.memmap(make_file(path), mode="r+", dtype=kind, shape=(100,)), 100 * kind.itemsize


def _memmap_big_endian(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype=">i4", shape=(500,)), 2000


def _memmap_slice(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype="u2", shape=(8, 1024))[3:5], 2 * 2048


def _memmap_scalar(path: Path) -> tuple[Any, int]:
    return np.memmap(make_file(path), mode="r+", dtype="u8", shape=()), 8


def _frombuffer(path: Path) -> tuple[Any, int]:
    return np.frombuffer(shared(path), dtype="u4", offset=8, count=100), 400


def _ctypes_array(path: Path) -> tuple[Any, int]:
    return (ctypes.c_uint32 * 100).from_buffer(shared(path), 12), 400


class Record(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint64), ("value", ctypes.c_double), ("flag", ctypes.c_uint8))


def _ctypes_structure(path: Path) -> tuple[Any, int]:
    return Record.from_buffer(shared(path), 4096), ctypes.sizeof(Record)


def _cffi(path: Path) -> tuple[Any, int]:
    ffi = cffi.FFI()
    return ffi.buffer(ffi.from_buffer("char[]", shared(path)), 777), 777


KINDS = [
    _mmap, _mmap_slice, _memoryview_cast, _memmap, _memmap_fortran, _memmap_offset, _memmap_structured,
    _memmap_big_endian, _memmap_slice, _memmap_scalar, _frombuffer, _ctypes_array, _ctypes_structure, _cffi,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[1:])
@pytest.mark.asyncio
async def test_any_contiguous_buffer_over_a_shared_file_is_adopted(
    kind: Callable[[Path], tuple[Any, int]], directory: Path
) -> None:
    path = directory / "a"
    buffer, size = kind(path)
    async with map_from_existing(buffer) as m:
        assert (m.size, len(m.view)) == (size, size)
        assert m.granularity is Granularity.PAGE
        assert m.durability is Durability.POWER_LOSS
        assert m.source.path == str(path)
        assert apmem2.find(m.address, 1) is m
        start = int(m.pointer.offset)
        m[0] = 200
        await m.persist(0, 1)
        await m.memcpy(size - 2, b"\x01\x02")
        await m.persist(buffer)
        content = path.read_bytes()[start : start + size]
        assert content[0] == 200
        assert content[-2:] == b"\x01\x02"
        assert bytes(m.view) == content


@pytest.mark.asyncio
async def test_a_raw_address_is_adopted(directory: Path) -> None:
    with raw_mapped(make_file(directory / "a"), 4 * PAGE) as address:
        async with map_from_existing(address + 10, 100) as m:
            assert (m.address, m.size, m.protection) == (address + 10, 100, apmem2.Protection(3 << 30))
            await m.memcpy(1, b"raw")
            await m.persist()
        assert ctypes.string_at(address + 11, 3) == b"raw"
        assert (directory / "a").read_bytes()[11:14] == b"raw"


@pytest.mark.parametrize("what", ["mmap", "memmap", "slice"])
@pytest.mark.asyncio
async def test_a_read_only_buffer_can_be_flushed_and_not_copied_into(what: str, directory: Path) -> None:
    path = make_file(directory / "a")
    buffers: dict[str, Callable[[], Any]] = {
        "mmap": lambda: shared(path, access=mmap.ACCESS_READ),
        "memmap": lambda: np.memmap(path, mode="r", dtype="u1"),
        "slice": lambda: memoryview(shared(path)).toreadonly()[7:99],
    }
    async with map_from_existing(buffers[what]()) as m:
        assert m.view.readonly
        await m.persist()
        await m.flush(0, 1)
        await m.drain()
        before = path.read_bytes()
        with pytest.raises(apmem2.AccessError):
            await m.memcpy(0, b"x")
        with pytest.raises(apmem2.AccessError):
            await m.memset(0, 1, 1)
        with pytest.raises(TypeError):
            m[0] = 1
        assert path.read_bytes() == before


@pytest.mark.asyncio
async def test_copies_into_a_read_only_mapping_by_raw_address_are_refused(directory: Path) -> None:
    with raw_mapped(make_file(directory / "a"), PAGE, prot=mmap.PROT_READ) as address:
        async with map_from_existing(address, PAGE) as m:
            await m.persist()
            with pytest.raises(apmem2.AccessError):
                await m.memcpy(0, b"x")
            with pytest.raises(TypeError):
                m[0] = 1


@pytest.mark.asyncio
async def test_memory_that_may_not_be_read_is_never_read(directory: Path) -> None:
    """A PROT_NONE mapping of a file can be synced, but a view of it would be a crash waiting for its reader."""
    with raw_mapped(make_file(directory / "a"), PAGE, prot=0) as address:
        async with map_from_existing(address, PAGE) as m:
            await m.persist()
            assert m.protection == apmem2.Protection.NONE
            with pytest.raises(apmem2.AccessError):
                _ = m.view


@pytest.mark.asyncio
async def test_offset_0_of_an_adopted_map_can_be_persisted(directory: Path, recorder: Recorder) -> None:
    """libpmem2 hangs here: its loop over the ranges of an adopted map begins with an empty one for ever."""
    mm = shared(directory / "a")
    async with map_from_existing(mm) as m:
        await m.persist(0, 1)
        await m.persist(0, PAGE)
        await m.persist()
        synced = [(event.offset, event.size) for event in recorder.events() if event.name == "msync"]
        assert synced == [(m.address, PAGE), (m.address, PAGE), (m.address, 4 * PAGE)]


@pytest.mark.asyncio
async def test_a_range_that_is_not_aligned_is_synced_in_the_pages_that_it_touches(
    directory: Path, recorder: Recorder
) -> None:
    mm = shared(directory / "a")
    base = address_of(mm)
    async with map_from_existing(memoryview(mm)[PAGE - 1 : PAGE + 1]) as m:
        await m.persist()
        await m.persist(1, 1)
    synced = [(event.offset - base, event.size) for event in recorder.events() if event.name == "msync"]
    assert synced == [(0, 2 * PAGE), (PAGE, PAGE)]


@pytest.mark.asyncio
async def test_two_maps_may_share_a_page(directory: Path) -> None:
    mm = shared(directory / "a")
    async with map_from_existing(memoryview(mm)[:100]) as low, map_from_existing(memoryview(mm)[100:PAGE]) as high:
        await asyncio.gather(low.memcpy(99, b"L"), high.memcpy(0, b"H"), low.persist(), high.persist())
        assert (directory / "a").read_bytes()[98:102] == b"ALHA"
        await low.aclose()
        await high.memcpy(1, b"h")
        await high.persist()


# ---- what a persist means there ----


@contextlib.contextmanager
def anonymous() -> Iterator[tuple[Any, Source | None]]:
    yield mmap.mmap(-1, 2 * PAGE), None


@contextlib.contextmanager
def anonymous_and_said_so() -> Iterator[tuple[Any, Source | None]]:
    yield mmap.mmap(-1, 2 * PAGE), Source.anonymous(2 * PAGE)


@contextlib.contextmanager
def memfd() -> Iterator[tuple[Any, Source | None]]:
    fd = os.memfd_create("apmem2-test")
    os.ftruncate(fd, 2 * PAGE)
    mm = mmap.mmap(fd, 2 * PAGE)
    os.close(fd)
    yield mm, None


@contextlib.contextmanager
def memfd_and_said_so() -> Iterator[tuple[Any, Source | None]]:
    fd = os.memfd_create("apmem2-test")
    os.ftruncate(fd, 2 * PAGE)
    yield mmap.mmap(fd, 2 * PAGE), Source.from_fd(fd)
    os.close(fd)


@contextlib.contextmanager
def shm() -> Iterator[tuple[Any, Source | None]]:
    block = shared_memory.SharedMemory(create=True, size=2 * PAGE)
    try:
        yield block.buf, None
    finally:
        gc.collect()
        block.close()
        block.unlink()


@contextlib.contextmanager
def tmpfs() -> Iterator[tuple[Any, Source | None]]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(2 * PAGE)
        yield mmap.mmap(file.fileno(), 2 * PAGE), None


@pytest.mark.parametrize(
    "memory", [anonymous, anonymous_and_said_so, memfd, memfd_and_said_so, shm, tmpfs], ids=lambda one: one.__name__
)
@pytest.mark.asyncio
async def test_shared_memory_without_a_disk_is_adopted_with_a_warning(
    memory: Callable[[], contextlib.AbstractContextManager[tuple[Any, Source | None]]],
) -> None:
    with memory() as (buffer, source):
        with pytest.warns(DurabilityWarning, match="does not survive") as warned:
            m = await map_from_existing(buffer, source=source)
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert m.durability is Durability.NONE
        if source is not None:
            assert m.source is source
        async with m:
            await m.memcpy(PAGE - 1, b"ab")
            await m.persist()
            assert bytes(memoryview(buffer)[PAGE - 1 : PAGE + 1]) == b"ab"
        del m, warned, buffer


@pytest.mark.asyncio
async def test_an_adoption_whose_warning_is_an_error_leaves_nothing() -> None:
    mm = mmap.mmap(-1, PAGE)
    with pytest.raises(DurabilityWarning) as refused:
        await map_from_existing(mm)
    assert apmem2.mappings() == []
    mm.close()
    del refused


@pytest.mark.asyncio
async def test_a_deleted_file_is_still_adopted(directory: Path) -> None:
    mm = shared(directory / "a")
    (directory / "a").unlink()
    with pytest.warns(DurabilityWarning, match="does not survive"):  # no name leads to it after a cut
        m = await map_from_existing(mm)
    async with m:
        assert m.durability is Durability.NONE
        assert not m.source.is_anonymous
        await m.memcpy(0, b"x")


@pytest.mark.asyncio
async def test_another_file_under_the_old_name_is_not_mistaken_for_it(directory: Path) -> None:
    mm = shared(directory / "a")
    (directory / "a").rename(directory / "b")
    make_file(directory / "a")
    async with map_from_existing(mm) as m:
        await m.memcpy(0, b"x")
    assert (directory / "a").read_bytes()[:1] == b"A"
    assert (directory / "b").read_bytes()[:1] == b"x"


# ---- whose file is it? ----


@pytest.mark.parametrize("how", ["path", "descriptor", "hard link"])
@pytest.mark.asyncio
async def test_the_source_may_be_given(how: str, directory: Path) -> None:
    path = make_file(directory / "a")
    os.link(path, directory / "link")
    mm = shared(path)
    with path.open("r+b") as file:
        given = {
            "path": Source.from_path(path),
            "descriptor": Source.from_fd(file.fileno()),
            "hard link": Source.from_path(directory / "link"),
        }
        async with map_from_existing(mm, source=given[how]) as m:
            assert m.source is given[how]
            await m.persist()


@pytest.mark.parametrize("how", ["path", "descriptor", "anonymous"])
@pytest.mark.asyncio
async def test_memory_of_another_file_than_the_source_is_refused(how: str, directory: Path) -> None:
    mm = shared(directory / "a")
    other = make_file(directory / "other")
    with other.open("r+b") as file:
        given = {
            "path": Source.from_path(other),
            "descriptor": Source.from_fd(file.fileno()),
            "anonymous": Source.anonymous(4 * PAGE),
        }
        with pytest.raises(apmem2.OtherFileError) as refused:
            await map_from_existing(mm, source=given[how])
    assert refused.value.code == ErrorCode.OTHER_FILE
    mm.close()  # although the exception, with its frames, is alive


@pytest.mark.asyncio
async def test_a_file_that_took_the_place_of_the_mapped_one_is_another_file(directory: Path) -> None:
    mm = shared(directory / "a")
    (directory / "a").rename(directory / "b")
    make_file(directory / "a")
    with pytest.raises(apmem2.OtherFileError):
        await map_from_existing(mm, source=Source.from_path(directory / "a"))


# ---- what is refused ----


@pytest.mark.parametrize(
    "make",
    [
        lambda path: b"x" * 8192,
        lambda path: bytearray(8192),
        lambda path: np.zeros(8192),
        lambda path: ctypes.create_string_buffer(8192),
        lambda path: mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        lambda path: shared(path, access=mmap.ACCESS_COPY),
        lambda path: np.memmap(make_file(path), mode="c"),
    ],
    ids=["bytes", "bytearray", "numpy.zeros", "ctypes", "private anonymous", "private mmap", "memmap mode c"],
)
@pytest.mark.asyncio
async def test_memory_that_never_reaches_a_file_is_refused(make: Callable[[Path], Any], directory: Path) -> None:
    with pytest.raises(apmem2.PrivateMemoryError) as refused:
        await map_from_existing(make(directory / "a"))
    assert refused.value.code == ErrorCode.PRIVATE_MEMORY
    assert "shared" in refused.value.hint


@pytest.mark.asyncio
async def test_memory_that_is_not_mapped_is_refused(directory: Path) -> None:
    with raw_mapped(make_file(directory / "a"), 4 * PAGE) as address:
        raw_unmap(address + PAGE, PAGE)
        for start, length in [(0, 2 * PAGE), (PAGE, PAGE), (PAGE + 7, 1), (0, 4 * PAGE), (PAGE - 1, 2)]:
            with pytest.raises(apmem2.NotMappedError) as refused:
                await map_from_existing(address + start, length)
            assert refused.value.code == ErrorCode.NOT_MAPPED
        async with map_from_existing(address, PAGE), map_from_existing(address + 2 * PAGE, 2 * PAGE):
            pass


@pytest.mark.asyncio
async def test_a_range_over_two_files_is_refused(directory: Path) -> None:
    with raw_mapped(make_file(directory / "a"), 4 * PAGE) as address:
        make_file(directory / "b")
        with (directory / "b").open("r+b") as file:
            raw_map(file.fileno(), 2 * PAGE, offset=2 * PAGE, at=address + 2 * PAGE)
        with pytest.raises(apmem2.OtherFileError) as refused:
            await map_from_existing(address + PAGE, 2 * PAGE)
        assert refused.value.code == ErrorCode.OTHER_FILE
        assert f"{address + 2 * PAGE:#x}" in str(refused.value)


@pytest.mark.asyncio
async def test_a_range_whose_second_half_is_private_is_refused(directory: Path) -> None:
    path = make_file(directory / "a")
    with raw_mapped(path, 4 * PAGE) as address, path.open("r+b") as file:
        raw_map(file.fileno(), 2 * PAGE, offset=2 * PAGE, at=address + 2 * PAGE, flags=mmap.MAP_PRIVATE)
        with pytest.raises(apmem2.PrivateMemoryError):
            await map_from_existing(address, 4 * PAGE)


@pytest.mark.parametrize("offset", [0, PAGE, 3 * PAGE])
@pytest.mark.asyncio
async def test_a_range_that_jumps_in_its_file_is_refused(offset: int, directory: Path) -> None:
    path = make_file(directory / "a")
    with raw_mapped(path, 4 * PAGE) as address, path.open("r+b") as file:
        raw_map(file.fileno(), PAGE, offset=offset, at=address + 2 * PAGE)
        with pytest.raises(apmem2.OtherFileError) as refused:
            await map_from_existing(address, 3 * PAGE)
        assert refused.value.code == ErrorCode.NOT_CONTIGUOUS


@pytest.mark.asyncio
async def test_a_range_over_two_mappings_that_continue_each_other_is_one_map(directory: Path) -> None:
    path = make_file(directory / "a")
    with raw_mapped(path, 4 * PAGE) as address, path.open("r+b") as file:
        raw_map(file.fileno(), 2 * PAGE, offset=2 * PAGE, at=address + 2 * PAGE)  # another description: no merging
        async with map_from_existing(address, 4 * PAGE) as m:
            m[2 * PAGE - 1 : 2 * PAGE + 1] = b"xy"
            await m.persist()
            assert path.read_bytes()[2 * PAGE - 1 : 2 * PAGE + 1] == b"xy"


@pytest.mark.parametrize(
    ("address", "length", "code"),
    [
        (0, PAGE, ErrorCode.ADDRESS_NULL),
        (-PAGE, PAGE, ErrorCode.LENGTH_OUT_OF_RANGE),
        (PAGE, 0, ErrorCode.LENGTH_OUT_OF_RANGE),
        (PAGE, -1, ErrorCode.LENGTH_OUT_OF_RANGE),
        ((1 << 64) - PAGE, 2 * PAGE, ErrorCode.LENGTH_OUT_OF_RANGE),
        ((1 << 64) - PAGE, PAGE, ErrorCode.LENGTH_OUT_OF_RANGE),
        (PAGE, 1 << 64, ErrorCode.LENGTH_OUT_OF_RANGE),
        (1 << 64, PAGE, ErrorCode.LENGTH_OUT_OF_RANGE),
        (1 << 80, 1 << 80, ErrorCode.LENGTH_OUT_OF_RANGE),
    ],
)
@pytest.mark.asyncio
async def test_what_is_no_range_of_memory_is_refused(address: int, length: int, code: ErrorCode) -> None:
    with pytest.raises(apmem2.OutOfRangeError) as refused:
        await map_from_existing(address, length)
    assert refused.value.code == code


@pytest.mark.asyncio
async def test_the_end_of_the_address_space_is_not_mapped() -> None:
    with pytest.raises(apmem2.NotMappedError):
        await map_from_existing((1 << 64) - 2 * PAGE, PAGE)


@pytest.mark.asyncio
async def test_an_empty_buffer_is_refused(directory: Path) -> None:
    with pytest.raises(apmem2.OutOfRangeError):
        map_from_existing(memoryview(shared(directory / "a"))[5:5])


@pytest.mark.asyncio
async def test_arguments_that_make_no_sense_are_told_at_the_call(directory: Path) -> None:
    mm = shared(directory / "a")
    with pytest.raises(TypeError, match="length"):
        map_from_existing(address_of(mm))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="slice"):
        map_from_existing(mm, 5)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="Source"):
        map_from_existing(mm, source=str(directory / "a"))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="contiguous"):
        map_from_existing(memoryview(mm)[::2])
    with pytest.raises(TypeError):
        map_from_existing("text")  # type: ignore[call-overload]
    mm.close()


# ---- granularity ----


@pytest.mark.parametrize("claim", [Granularity.BYTE, Granularity.CACHE_LINE])
@pytest.mark.asyncio
async def test_a_claim_finer_than_the_kernel_grants_is_refused(claim: Granularity, directory: Path) -> None:
    mm = shared(directory / "a")
    with pytest.raises(apmem2.GranularityNotSupportedError, match=f"{claim.name} was claimed and only PAGE") as refused:
        await map_from_existing(mm, granularity=claim)
    assert refused.value.code == ErrorCode.GRANULARITY_NOT_SUPPORTED
    assert apmem2.mappings() == []
    mm.close()


@pytest.mark.asyncio
async def test_a_claim_of_pages_is_always_granted(directory: Path) -> None:
    async with map_from_existing(shared(directory / "a"), granularity=Granularity.PAGE) as m:
        assert m.granularity is Granularity.PAGE


@pytest.mark.parametrize("claim", [None, Granularity.CACHE_LINE])
@pytest.mark.asyncio
async def test_a_forced_granularity_is_granted_and_its_durability_is_not_known(
    claim: Granularity | None, directory: Path, forced: Callable[[str], None]
) -> None:
    forced("CACHE_LINE")
    with pytest.warns(DurabilityWarning, match="is not known to survive"):
        m = await map_from_existing(shared(directory / "a"), granularity=claim)
    async with m:
        assert m.granularity is Granularity.CACHE_LINE
        assert m.durability is Durability.UNKNOWN
        await m.memcpy(3, b"line")
        await m.persist(3, 4)


@pytest.mark.asyncio
async def test_a_claim_finer_than_the_forced_one_is_refused(directory: Path, forced: Callable[[str], None]) -> None:
    forced("CACHE_LINE")
    with pytest.raises(apmem2.GranularityNotSupportedError):
        await map_from_existing(shared(directory / "a"), granularity=Granularity.BYTE)


@pytest.mark.asyncio
async def test_pages_may_be_claimed_where_lines_are_forced(directory: Path, forced: Callable[[str], None]) -> None:
    """Then the kernel is asked, as without forcing: its durability is known."""
    forced("CACHE_LINE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)
        m = await map_from_existing(shared(directory / "a"), granularity=Granularity.PAGE)
    async with m:
        assert m.granularity is Granularity.PAGE
        await m.persist()


# ---- the hold on the owner's buffer ----


@pytest.mark.asyncio
async def test_an_adopted_mmap_cannot_be_closed_before_aclose(directory: Path) -> None:
    mm = shared(directory / "a")
    m = await map_from_existing(mm)
    with pytest.raises(BufferError):
        mm.close()
    await m.aclose()
    mm.close()


@pytest.mark.parametrize("kind", ["memmap", "slice of a memmap", "Fortran", "ndarray", "memoryview of an ndarray"])
@pytest.mark.asyncio
async def test_the_mmap_below_an_array_cannot_be_closed_before_aclose(kind: str, directory: Path) -> None:
    """numpy keeps the mmap below an array alive, but lets go of its buffer: closing it unmapped the array's memory."""
    mm = shared(directory / "a")
    array: Any = np.ndarray((64, 32), dtype="u2", buffer=mm, order="F" if kind == "Fortran" else "C")
    if "memmap" in kind:
        array = np.memmap(directory / "a", dtype="u2", mode="r+", shape=(64, 32))
        mm = array._mmap
    buffer = array[3:9] if "slice" in kind else memoryview(array) if "memoryview" in kind else array
    m = await map_from_existing(buffer)
    with pytest.raises(BufferError):
        mm.close()
    await m.persist()
    assert m[0] == ord("A")
    await m.aclose()
    del array, buffer
    mm.close()


@pytest.mark.asyncio
async def test_a_view_of_the_map_holds_the_owners_buffer_by_itself(directory: Path) -> None:
    mm = shared(directory / "a")
    m = await map_from_existing(mm)
    view = m[5:10]
    await m.aclose()
    with pytest.raises(BufferError):
        mm.close()
    assert bytes(view) == b"AAAAA"
    del view
    mm.close()


@pytest.mark.asyncio
async def test_the_owner_goes_on_using_the_mapping_after_aclose(directory: Path) -> None:
    mm = shared(directory / "a")
    async with map_from_existing(mm) as m:
        await m.memcpy(0, b"ours")
    assert mm[:5] == b"oursA"
    mm[:6] = b"theirs"
    mm.flush()
    assert (directory / "a").read_bytes()[:6] == b"theirs"
    mm.close()


@pytest.mark.asyncio
async def test_a_buffer_may_be_adopted_again_after_aclose(directory: Path) -> None:
    mm = shared(directory / "a")
    for _ in range(3):
        m = await map_from_existing(mm)
        await m.aclose()
        await m.aclose()
        with pytest.raises(apmem2.ClosedError):
            await m.persist()
    mm.close()


@pytest.mark.asyncio
async def test_a_map_that_was_forgotten_lets_go_of_everything(directory: Path) -> None:
    mm = shared(directory / "a")
    m = await map_from_existing(mm)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del m
    assert apmem2.mappings() == []
    mm.close()


@pytest.mark.asyncio
async def test_a_refused_adoption_lets_go_of_the_buffer_while_its_error_is_kept(directory: Path) -> None:
    """An exception keeps the frames that it went through, and gather(return_exceptions=True) keeps exceptions."""
    mm = shared(directory / "a")
    m = await map_from_existing(memoryview(mm)[:10])
    kept = await asyncio.gather(map_from_existing(mm).__aenter__(), return_exceptions=True)
    assert isinstance(kept[0], apmem2.MappingExistsError)
    assert kept[0].__traceback__ is not None
    await m.aclose()
    del m
    kept[0].existing = None
    mm.close()


@pytest.mark.asyncio
async def test_nothing_is_held_or_registered_before_it_is_awaited(directory: Path) -> None:
    mm = shared(directory / "a")
    opening = map_from_existing(mm)
    assert apmem2.mappings() == []
    with pytest.warns(RuntimeWarning, match="never awaited"):
        del opening
    mm.close()


# ---- overlap ----

LOW, HIGH = 5000, 9000  # the range that is there first

ALLEN = {
    "before": (1000, LOW - 1, True),
    "meets": (1000, LOW, True),
    "overlaps": (1000, LOW + 1, False),
    "starts": (LOW, HIGH - 1, False),
    "during": (LOW + 1, HIGH - 1, False),
    "finishes": (LOW + 1, HIGH, False),
    "equals": (LOW, HIGH, False),
    "is finished by": (LOW - 1, HIGH, False),
    "contains": (LOW - 1, HIGH + 1, False),
    "is started by": (LOW, HIGH + 1, False),
    "is overlapped by": (HIGH - 1, HIGH + 1000, False),
    "is met by": (HIGH, HIGH + 1000, True),
    "after": (HIGH + 1, HIGH + 1000, True),
}


@pytest.mark.parametrize("relation", ALLEN)
@pytest.mark.asyncio
async def test_an_adopted_range_conflicts_with_another_by_bytes(relation: str, directory: Path) -> None:
    mm = memoryview(shared(directory / "a"))
    begin, end, allowed = ALLEN[relation]
    async with map_from_existing(mm[LOW:HIGH]) as first:
        if allowed:
            async with map_from_existing(mm[begin:end]) as second:
                assert apmem2.mappings() == sorted([first, second], key=lambda one: one.address)
        else:
            with pytest.raises(apmem2.MappingExistsError) as refused:
                await map_from_existing(mm[begin:end])
            assert refused.value.existing is first
            assert refused.value.code == ErrorCode.MAPPING_EXISTS
            assert isinstance(refused.value, FileExistsError)
            assert refused.value.errno == errno.EEXIST
        assert apmem2.mappings() == [first]
        await first.persist()


PAD = 16 * PAGE
SIZE = 1 << 30
GAP = SIZE + (4 << 20)  # the kernel may want to align a large mapping to 2 MiB


@contextlib.contextmanager
def gap() -> Iterator[int]:
    """A gap between other mappings, so large that a new mapping of SIZE goes nowhere else: its address."""
    size = GAP + 2 * PAD
    reserved = raw_map(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, prot=0)
    raw_unmap(reserved + PAD, GAP)
    try:
        yield reserved + PAD
    finally:
        raw_unmap(reserved, size)


def is_inside(m: apmem2.Map, address: int) -> bool:
    return address <= m.address and m.address + m.size <= address + GAP


@pytest.mark.parametrize("relation", ALLEN)
@pytest.mark.asyncio
async def test_an_adopted_range_conflicts_with_a_new_map_by_bytes(relation: str, directory: Path) -> None:
    def place(number: int) -> int:
        """LOW and HIGH are the ends of the new map; what lies around them is mapped by somebody else."""
        return number - LOW if number < (LOW + HIGH) // 2 else number - HIGH + SIZE

    begin, end, allowed = ALLEN[relation]
    path = directory / "a"
    path.touch()
    os.truncate(path, SIZE + 2 * PAD)
    with gap() as address:
        whole = apmem2.map_new(Source.from_path(path), required_granularity=Granularity.PAGE, offset=PAD, length=SIZE)
        async with whole as first:
            assert is_inside(first, address), "the kernel found another gap of 1 GiB"
            with path.open("r+b") as file:
                raw_map(file.fileno(), PAD, at=first.address - PAD)
                raw_map(file.fileno(), PAD, offset=PAD + SIZE, at=first.address + SIZE)
            start, stop = first.address + place(begin), first.address + place(end)
            if allowed:
                async with map_from_existing(start, stop - start) as second:
                    assert apmem2.mappings() == sorted([first, second], key=lambda one: one.address)
            else:
                with pytest.raises(apmem2.MappingExistsError) as refused:
                    await map_from_existing(start, stop - start)
                assert refused.value.existing is first
            assert apmem2.mappings() == [first]


@pytest.mark.asyncio
async def test_the_rest_of_the_last_page_of_an_opened_file_is_free(directory: Path) -> None:
    """A map of 5,000 bytes is registered with 5,000 bytes, although two pages are mapped."""
    async with apmem2.open(directory / "a", size=5000) as m:
        with pytest.raises(apmem2.OutOfRangeError, match="after the file does"):
            await map_from_existing(m.address + 5000, 3192)
        os.truncate(directory / "a", 2 * PAGE)
        with pytest.raises(apmem2.MappingExistsError) as refused:
            await map_from_existing(m.address + 4999, 2)
        assert refused.value.existing is m
        with pytest.raises(apmem2.MappingExistsError):
            await map_from_existing(m[10:20])
        async with map_from_existing(m.address + 5000, 3192) as rest:
            assert apmem2.mappings() == [m, rest]


@pytest.mark.asyncio
async def test_the_lowest_of_several_is_the_existing_one(directory: Path) -> None:
    mm = memoryview(shared(directory / "a"))
    async with map_from_existing(mm[900:1000]), map_from_existing(mm[100:200]) as lowest, map_from_existing(mm[:50]):
        with pytest.raises(apmem2.MappingExistsError) as refused:
            await map_from_existing(mm[60:])
        assert refused.value.existing is lowest
        assert apmem2.find(lowest.address - 10, 5000) is lowest
        assert apmem2.find(lowest.address + 100, 700) is None
    del refused


@pytest.mark.asyncio
async def test_a_map_whose_aclose_is_waiting_is_still_there(directory: Path, faults: Faults) -> None:
    """A closing map was neither reported nor waited for: asking for its range span for ever and stopped the loop."""
    async with apmem2.open(directory / "a", size=PAGE) as m:
        address = m.address
        faults.hold("msync")
        persisting = asyncio.ensure_future(m.persist())
        await faults.held()
        closing = asyncio.ensure_future(m.aclose())
        await until(lambda: m.closed)
        with pytest.raises(apmem2.MappingExistsError) as refused:
            await map_from_existing(address, PAGE)
        assert refused.value.existing is m
        faults.release()
        await asyncio.gather(persisting, closing)


@pytest.mark.asyncio
async def test_an_adopted_map_whose_aclose_is_waiting_is_still_there(directory: Path, faults: Faults) -> None:
    mm = shared(directory / "a")
    m = await map_from_existing(mm)
    faults.hold("msync")
    persisting = asyncio.ensure_future(m.persist())
    await faults.held()
    closing = asyncio.ensure_future(m.aclose())
    await until(lambda: m.closed)
    with pytest.raises(apmem2.MappingExistsError) as refused:
        await map_from_existing(mm)
    assert refused.value.existing is m
    faults.release()
    await asyncio.gather(persisting, closing)
    async with map_from_existing(mm):
        pass


# ---- cancellation ----


@pytest.mark.parametrize("source", ["found", "path", "descriptor"])
@pytest.mark.asyncio
async def test_an_adoption_cancelled_at_any_wait_leaves_nothing(source: str, directory: Path) -> None:
    path = make_file(directory / "a")
    with path.open("r+b") as file:
        sources = {
            "found": lambda: None,
            "path": lambda: Source.from_path(path),
            "descriptor": lambda: Source.from_fd(file.fileno()),
        }
        await warm_up(directory)
        fds = descriptors()
        for nth in range(1, 1000):
            mm = shared(path)
            attempt: CancelledAt[apmem2.Map] = CancelledAt(map_from_existing(mm, source=sources[source]()), nth)

            async def call(attempt: CancelledAt[apmem2.Map] = attempt) -> apmem2.Map:
                return await attempt

            outcome = (await asyncio.gather(call(), return_exceptions=True))[0]
            if attempt.waits < nth:
                assert isinstance(outcome, apmem2.Map)
                await outcome.aclose()
                mm.close()
                break
            assert isinstance(outcome, asyncio.CancelledError)
            assert apmem2.mappings() == []
            mm.close()  # at once, and although the cancellation is still in our hands
        del outcome, attempt, call  # a source that was made of a descriptor holds the file as long as it lives
        await until(lambda: descriptors() <= fds)
        assert nth - 1 >= (1 if source == "found" else 2)


@pytest.mark.asyncio
async def test_an_adoption_cancelled_while_it_waits_for_its_turn_leaves_nothing(directory: Path) -> None:
    """The lock is held by one whose check stands at a gate; the waiter's turn goes to the one behind it."""
    from apmem2.core.mapping import registry

    mm = shared(directory / "a")
    second, third = shared(directory / "b"), shared(directory / "c")
    async with registry.lock:
        cancelled = asyncio.ensure_future(_await(map_from_existing(second)))
        await until(lambda: len(registry.lock._queue) == 1)
        behind = asyncio.ensure_future(_await(map_from_existing(third)))
        await until(lambda: len(registry.lock._queue) == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert apmem2.mappings() == []
        second.close()
    m = await behind
    assert apmem2.mappings() == [m]
    await m.aclose()
    async with map_from_existing(mm):
        pass


async def _await(opening: Any) -> Any:
    return await opening


@pytest.mark.asyncio
async def test_an_adoption_cancelled_while_it_looks_at_the_existing_one_leaves_that_alone(
    directory: Path, faults: Faults
) -> None:
    mm = shared(directory / "a")
    async with map_from_existing(memoryview(mm)[:10]) as first:
        for nth in range(1, 1000):
            attempt: CancelledAt[apmem2.Map] = CancelledAt(map_from_existing(mm), nth)

            async def call(attempt: CancelledAt[apmem2.Map] = attempt) -> apmem2.Map:
                return await attempt

            outcome = (await asyncio.gather(call(), return_exceptions=True))[0]
            assert apmem2.mappings() == [first]
            await first.persist()
            if attempt.waits < nth:
                assert isinstance(outcome, apmem2.MappingExistsError)
                break
            assert isinstance(outcome, asyncio.CancelledError)
        assert nth - 1 >= 2
    del outcome, first, attempt
    mm.close()


@pytest.mark.asyncio
async def test_a_cancelled_adoption_ends_when_its_look_at_the_memory_has_ended(directory: Path, faults: Faults) -> None:
    """Else the caller would unmap what a thread of ours is looking at."""
    mm = shared(directory / "a")
    faults.hold("query")
    adopting = asyncio.ensure_future(_await(map_from_existing(mm)))
    await faults.held()
    adopting.cancel()
    for _ in range(100):
        await asyncio.sleep(0)
    assert not adopting.done()
    with pytest.raises(BufferError):
        mm.close()
    adopting.cancel()  # again: the same
    await asyncio.sleep(0)
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await adopting
    assert apmem2.mappings() == []
    mm.close()


# ---- races ----


@pytest.mark.asyncio
async def test_of_64_tasks_that_adopt_one_range_exactly_one_wins(directory: Path) -> None:
    mm = shared(directory / "a")
    outcomes = await asyncio.gather(*(_await(map_from_existing(mm)) for _ in range(64)), return_exceptions=True)
    winners = [one for one in outcomes if isinstance(one, apmem2.Map)]
    losers = [one for one in outcomes if isinstance(one, apmem2.MappingExistsError)]
    assert (len(winners), len(losers)) == (1, 63)
    assert all(one.existing is winners[0] for one in losers)
    assert apmem2.mappings() == winners
    await winners[0].aclose()
    losers.clear()
    winners.clear()
    outcomes.clear()
    mm.close()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def _race(run: Callable[[int], Any], count: int, loop: str) -> list[BaseException]:
    """run(number) in a thread with a loop of its own, all at once; what they raised."""
    start, errors = threading.Barrier(count), []

    def thread(number: int) -> None:
        try:
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                start.wait()
                runner.run(run(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return errors


@pytest.mark.parametrize("loop", LOOPS)
def test_of_8_threads_with_a_loop_each_exactly_one_wins(loop: str, directory: Path) -> None:
    mm = shared(directory / "a")
    rounds = 20
    barrier = threading.Barrier(8)
    won: list[list[apmem2.Map]] = [[] for _ in range(rounds)]
    lost: list[list[apmem2.MappingExistsError]] = [[] for _ in range(rounds)]

    async def run(number: int) -> None:
        for turn in range(rounds):
            try:
                m = await map_from_existing(memoryview(mm)[number : PAGE + number])
            except apmem2.MappingExistsError as error:
                lost[turn].append(error)
                barrier.wait()
            else:
                won[turn].append(m)
                barrier.wait()
                assert len(won[turn]) == 1, "two maps of one range"
                await m.aclose()
            barrier.wait()

    assert _race(run, 8, loop) == []
    for turn in range(rounds):
        assert (len(won[turn]), len(lost[turn])) == (1, 7)
        assert all(error.existing is won[turn][0] for error in lost[turn])
    assert apmem2.mappings() == []
    won.clear()
    lost.clear()
    mm.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_threads_whose_adoptions_are_cancelled_at_random_lose_nothing(loop: str, directory: Path) -> None:
    """Whatever is cancelled, never are two maps of one range registered, and the next one gets its turn."""
    mm = shared(directory / "a")
    seed = random.randrange(1 << 32)
    inside = [0]
    guard = threading.Lock()
    adopted: list[int] = []

    async def one(generator: random.Random) -> None:
        attempt: CancelledAt[apmem2.Map] = CancelledAt(map_from_existing(mm), generator.randrange(1, 8))
        try:
            m = await attempt
        except apmem2.MappingExistsError:
            return
        with guard:
            inside[0] += 1
            assert inside[0] == 1, f"two maps of one range, seed {seed}"
        adopted.append(1)
        with guard:
            inside[0] -= 1
        await m.aclose()

    async def run(number: int) -> None:
        generator = random.Random(seed + number)
        for _ in range(25):
            tasks = [asyncio.ensure_future(one(generator)) for _ in range(4)]
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error

    errors = _race(run, 8, loop)
    assert errors == [], f"seed {seed}"
    assert adopted, f"seed {seed}"
    assert apmem2.mappings() == []
    mm.close()


# ---- stale entries ----


def raw_file_map(path: Path, size: int, at: int = 0) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        return raw_map(fd, size, at=at)
    finally:
        os.close(fd)


@pytest.mark.asyncio
async def test_a_map_whose_memory_became_another_files_gives_way(directory: Path) -> None:
    make_file(directory / "a")
    make_file(directory / "b")
    address = raw_file_map(directory / "a", 4 * PAGE)
    stale = await map_from_existing(address, 4 * PAGE)
    raw_unmap(address, 4 * PAGE)
    raw_file_map(directory / "b", 4 * PAGE, at=address)

    m = await map_from_existing(address, 4 * PAGE)
    assert m.source.path == str(directory / "b")
    assert apmem2.mappings() == [m]
    assert stale.closed
    for call in (stale.persist(), stale.flush(0, 1), stale.memcpy(0, b"x"), stale.memset(0, 1, 1), stale.drain()):
        with pytest.raises(apmem2.ClosedError, match="unmapped"):
            await call
    with pytest.raises(apmem2.ClosedError):
        _ = stale.view

    await stale.aclose()
    del stale
    gc.collect()
    assert apmem2.mappings() == [m]  # its late end is nobody else's
    assert apmem2.find(address, 1) is m
    await m.memcpy(0, b"B")
    await m.persist()
    assert (directory / "b").read_bytes()[:1] == b"B"
    assert (directory / "a").read_bytes()[:1] == b"A"
    await m.aclose()
    raw_unmap(address, 4 * PAGE)


@pytest.mark.parametrize("change", ["shorter", "moved in the file", "private"])
@pytest.mark.asyncio
async def test_a_map_whose_memory_is_not_what_it_was_gives_way(change: str, directory: Path) -> None:
    path = make_file(directory / "a")
    address = raw_file_map(path, 4 * PAGE)
    stale = await map_from_existing(address, 4 * PAGE)
    if change == "shorter":
        raw_unmap(address + 2 * PAGE, 2 * PAGE)
    else:
        with path.open("r+b") as file:
            flags = mmap.MAP_PRIVATE if change == "private" else mmap.MAP_SHARED
            raw_map(file.fileno(), 2 * PAGE, offset=0, at=address + 2 * PAGE, flags=flags)
    async with map_from_existing(address, 2 * PAGE) as m:
        assert stale.closed
        assert apmem2.mappings() == [m]
        await stale.aclose()
        assert apmem2.mappings() == [m]
    raw_unmap(address, 4 * PAGE)


@pytest.mark.asyncio
async def test_several_stale_maps_below_one_range_all_give_way_and_a_living_one_does_not(directory: Path) -> None:
    make_file(directory / "a")
    make_file(directory / "b")
    address = raw_file_map(directory / "a", 4 * PAGE)
    stale = [await map_from_existing(address + page * PAGE, 100) for page in range(3)]
    raw_unmap(address, 4 * PAGE)
    raw_file_map(directory / "b", 4 * PAGE, at=address)
    async with map_from_existing(address + 3 * PAGE, 100) as living:
        with pytest.raises(apmem2.MappingExistsError) as refused:
            await map_from_existing(address, 4 * PAGE)
        assert refused.value.existing is living
        async with map_from_existing(address, 3 * PAGE) as m:
            assert apmem2.mappings() == [m, living]
            assert all(one.closed for one in stale)
            for one in stale:
                await one.aclose()
            assert apmem2.mappings() == [m, living]
    raw_unmap(address, 4 * PAGE)


@pytest.mark.asyncio
async def test_a_map_of_memory_that_is_gone_does_not_stand_in_the_way_of_a_new_map(directory: Path) -> None:
    for name in "ab":
        (directory / name).touch()
        os.truncate(directory / name, GAP)
    os.truncate(directory / "b", SIZE)
    with gap() as address:
        raw_file_map(directory / "a", GAP, at=address)
        stale = await map_from_existing(address + 12345, GAP - 12345)
        raw_unmap(address, GAP)
        async with apmem2.open(directory / "b") as m:
            assert is_inside(m, address), "the kernel found another gap of 1 GiB"
            assert apmem2.mappings() == [m]
            assert stale.closed
            with pytest.raises(apmem2.ClosedError):
                await stale.persist()
            await stale.aclose()
            del stale
            gc.collect()
            assert apmem2.mappings() == [m]
            await m.memcpy(0, b"x")


@pytest.mark.asyncio
async def test_a_persist_of_memory_that_is_gone_fails_alone(directory: Path) -> None:
    """The caller's mistake says nothing about the file: other maps of it go on."""
    path = make_file(directory / "a")
    address = raw_file_map(path, 4 * PAGE)
    async with map_from_existing(shared(path)) as other:
        stale = await map_from_existing(address, 4 * PAGE)
        raw_unmap(address, 4 * PAGE)
        with pytest.raises(apmem2.NotMappedError):
            await stale.persist()
        assert stale.failed is None
        await other.memcpy(0, b"x")
        await other.persist()
        await stale.aclose()


@pytest.mark.asyncio
async def test_a_stale_map_is_dropped_while_its_jobs_are_under_way(directory: Path, faults: Faults) -> None:
    make_file(directory / "a")
    make_file(directory / "b")
    address = raw_file_map(directory / "a", 4 * PAGE)
    stale = await map_from_existing(address, 4 * PAGE)
    faults.hold("msync")
    persisting = asyncio.ensure_future(stale.persist())
    await faults.held()
    raw_unmap(address, 4 * PAGE)
    raw_file_map(directory / "b", 4 * PAGE, at=address)
    async with map_from_existing(address, 4 * PAGE) as m:
        assert stale.closed
        await stale.aclose()
        faults.release()
        await asyncio.gather(persisting, return_exceptions=True)
        await m.persist()
        assert apmem2.mappings() == [m]
    raw_unmap(address, 4 * PAGE)


# ---- nothing of the owner's is changed ----


def flags_of(address: int) -> str:
    """VmFlags of the mapping at address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and ":" not in head:
            begin, end = (int(one, 16) for one in head.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError("not mapped")


@pytest.mark.parametrize("advice", [None, mmap.MADV_SEQUENTIAL, mmap.MADV_RANDOM])
@pytest.mark.asyncio
async def test_the_advice_of_the_mapping_is_the_owners(advice: int | None, directory: Path, recorder: Recorder) -> None:
    mm = shared(directory / "a")
    if advice is not None:
        mm.madvise(advice)
    before = flags_of(address_of(mm))
    async with map_from_existing(mm) as m:
        m[0] = 1
        await m.memcpy(PAGE, b"x")
        await m.persist()
        assert flags_of(m.address) == before
    assert flags_of(address_of(mm)) == before
    calls = set(recorder.calls())
    assert not calls & {"madvise", "fadvise"}  # its cached pages are the owner's as well
    assert address_of(mm) not in [event.offset for event in recorder.events() if event.name == "munmap"]


LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except BlockingIOError:
        print("locked")
"""


@pytest.mark.parametrize("way", ["found", "path", "descriptor", "refused", "other", "cancelled"])
@pytest.mark.asyncio
async def test_the_owners_fcntl_lock_survives(way: str, directory: Path, run_program: Program) -> None:
    """SQLite and LMDB hold such locks; closing any descriptor of the file drops them all."""
    path = make_file(directory / "a")
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        mm = mmap.mmap(file.fileno(), 0)
        if way in ("found", "path", "descriptor"):
            sources = {"found": None, "path": Source.from_path(path), "descriptor": Source.from_fd(file.fileno())}
            async with map_from_existing(mm, source=sources[way]) as m:
                await m.memcpy(0, b"x")
                await m.persist()
        elif way == "refused":
            with pytest.raises(apmem2.GranularityNotSupportedError):
                await map_from_existing(mm, granularity=Granularity.BYTE)
        elif way == "other":
            with pytest.raises(apmem2.OtherFileError):
                await map_from_existing(shared(directory / "b"), source=Source.from_path(path))
        else:
            with pytest.raises(asyncio.CancelledError):
                await asyncio.ensure_future(_await(CancelledAt(map_from_existing(mm), 1)))
        gc.collect()
        async with apmem2.open(directory / "c", size=PAGE):
            pass  # what the pool had to close is closed after this one
        await asyncio.to_thread(lambda: None)
        done = await asyncio.to_thread(run_program, LOCK, str(path))
        assert done.stdout == "locked\n"
        fcntl.lockf(file, fcntl.LOCK_UN)
    done = await asyncio.to_thread(run_program, LOCK, str(path))
    assert done.stdout == "free\n"


@pytest.mark.asyncio
async def test_a_thousand_adoptions_leak_no_descriptor(directory: Path) -> None:
    await warm_up(directory)
    mm = shared(directory / "a")
    fds = descriptors()
    for number in range(250):
        async with map_from_existing(memoryview(mm)[number:]):
            pass
        with pytest.raises(apmem2.PrivateMemoryError):
            await map_from_existing(bytes(100))
        with pytest.raises(apmem2.OtherFileError):
            await map_from_existing(mm, source=Source.from_path(directory / "warm"))
        with pytest.raises(apmem2.GranularityNotSupportedError):
            await map_from_existing(mm, granularity=Granularity.BYTE)
    gc.collect()
    await until(lambda: descriptors() <= fds)


# ---- without privileges: no /proc/self/map_files, no names of others ----

UNPRIVILEGED = """
import asyncio, ctypes, mmap, os, sys, warnings
import apmem2
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
PR_SET_DUMPABLE = 4
assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0  # else /proc/self is root's
warnings.simplefilter("ignore", apmem2.DurabilityWarning)
try:
    os.listdir("/proc/self/map_files")
    os.open(f"/proc/self/map_files/{os.listdir('/proc/self/map_files')[0]}", os.O_PATH)
    sys.exit("these links can be opened: not what is tested here")
except PermissionError:
    pass
async def adopt(mm, durability, source):
    async with apmem2.map_from_existing(mm) as m:
        assert m.durability is durability, m
        assert m.source.path == source, m
        await m.memcpy(1, b"yes")
        await m.persist()
    assert mm[:4] == b"\\0yes"
    mm.close()
def file(name):
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.ftruncate(fd, 8192)
    return fd
async def main():
    known, unknown = apmem2.Durability.POWER_LOSS, apmem2.Durability.UNKNOWN
    fd = file("named")
    mm = mmap.mmap(fd, 0)
    os.close(fd)
    await adopt(mm, known, os.path.abspath("named"))
    fd = file("deleted but open")
    mm = mmap.mmap(fd, 0)
    os.unlink("deleted but open")
    await adopt(mm, apmem2.Durability.NONE, os.path.abspath("deleted but open") + " (deleted)")
    os.close(fd)
    fd = file("deleted")
    mm = mmap.mmap(fd, 0)  # with a descriptor of its own
    os.unlink("deleted")
    os.close(fd)
    await adopt(mm, apmem2.Durability.NONE, os.path.abspath("deleted") + " (deleted)")
    await adopt(mmap.mmap(-1, 8192), apmem2.Durability.NONE, None)
asyncio.run(main())
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_adopts_as_well() -> None:
    """Root is shown every file through /proc/self/map_files; others find theirs by name or by descriptor."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "done\n"
