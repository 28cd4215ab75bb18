"""`Map`: what it is, what its calls take, and what it refuses before anything is submitted."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import gc
import mmap
import os
import re
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Faults, Recorder

import apmem2
from apmem2 import Durability, ErrorCode, Granularity, MemFlags, Protection, Sharing, Source

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE


@contextlib.asynccontextmanager
async def opened(directory: Path, size: int = SIZE) -> AsyncIterator[apmem2.Map]:
    """A map of a new file "a", one number per page: 0 0 0 …, 1 1 1 …"""
    (directory / "a").write_bytes(bytes(page & 0xFF for page in range(size // PAGE) for _ in range(PAGE)))
    async with apmem2.open(directory / "a") as m:
        yield m


def persisted_pages(recorder: Recorder, mark: int, m: apmem2.Map) -> list[int]:
    """Page numbers of m that were given to msync since mark, or written back before one; with repetitions."""
    pages: list[int] = []
    for event in recorder.events():
        if event.begun > mark and event.name in ("msync", "range_written"):
            first = (event.offset - (m.address if event.name == "msync" else 0)) // PAGE
            pages.extend(range(first, first + (event.size + PAGE - 1) // PAGE))
    return pages


def synced(recorder: Recorder, mark: int) -> list[str]:
    """Sync calls since mark."""
    names = ("msync", "fdatasync", "fsync", "pwrite_dsync", "sync_file_range")
    return [event.name for event in recorder.events() if event.begun > mark and event.name in names]


@pytest.mark.asyncio
async def test_a_stored_and_persisted_byte_is_in_the_file(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=5000) as m:
        assert len(m) == 5000
        m[4999] = 7
        await m.persist(4999, 1)
        assert (directory / "a").read_bytes()[4999] == 7


# ---- what it is --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_map_says_what_it_is(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=5000) as m:
        assert len(m) == m.size == 5000
        assert m.address % PAGE == 0
        assert m.granularity is Granularity.PAGE
        assert m.durability is Durability.POWER_LOSS
        assert m.sharing is Sharing.SHARED
        assert m.protection == Protection.READ | Protection.WRITE
        assert m.source.path == str(directory / "a")
        assert m.failed is None
        assert not m.closed
        assert apmem2.find(m.address + 4999, 1) is m
        assert apmem2.mappings() == [m]
    assert apmem2.find(m.address, 5000) is None


@pytest.mark.asyncio
async def test_a_view_is_one_dimension_of_writable_bytes(directory: Path) -> None:
    async with opened(directory) as m:
        view = m.view
        assert isinstance(view, memoryview)
        assert (view.format, view.ndim, view.shape, view.readonly) == ("B", 1, (SIZE,), False)
        del view


@pytest.mark.asyncio
async def test_subscripts_are_those_of_a_memoryview(directory: Path) -> None:
    async with opened(directory) as m:
        assert m[PAGE] == m[PAGE - SIZE] == 1
        m[5], m[-1] = 200, 201
        m[10:15] = b"hello"
        m[20:24] = np.arange(4, dtype=np.uint8)
        part = m[10:15]
        assert isinstance(part, memoryview)
        assert bytes(part) == b"hello"
        part[0] = ord("J")  # a view, no copy
        assert bytes(m[10:15]) == b"Jello"
        assert (m[5], m[SIZE - 1], bytes(m[20:24])) == (200, 201, b"\0\1\2\3")
        assert bytes(m[10:15:2]) == b"Jlo"
        for wrong in (SIZE, -SIZE - 1):
            with pytest.raises(IndexError):
                _ = m[wrong]
            with pytest.raises(IndexError):
                m[wrong] = 0
        with pytest.raises(ValueError, match="invalid value"):
            m[0] = 256
        with pytest.raises(ValueError, match="structures"):
            m[0:4] = b"12345"
        del part


@pytest.mark.asyncio
async def test_a_store_through_a_subscript_persists_nothing(directory: Path, recorder: Recorder) -> None:
    async with opened(directory) as m:
        mark = recorder.mark()
        m[0] = 1
        m[PAGE : PAGE + 3] = b"abc"
        assert synced(recorder, mark) == []


@pytest.mark.asyncio
async def test_a_repr_tells_the_state_and_never_the_bytes(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=64) as m:
        await m.memcpy(0, b"secret-payload-" * 4)
        texts = [repr(m), str(m), repr(m.source), repr(m.view)]
        with pytest.raises(apmem2.OutOfRangeError) as caught:
            await m.memcpy(60, b"secret-payload")
        texts += [str(caught.value), repr(caught.value)]
        with pytest.raises(apmem2.OutOfRangeError) as caught:
            await m.persist(b"secret-payload")
        texts += [str(caught.value), repr(caught.value)]
        assert "open" in repr(m)
        assert "size=64" in repr(m)
    assert "closed" in repr(m)
    assert not any("secret" in text for text in [*texts, repr(m)])


# ---- persist, flush, populate: what they take --------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["persist", "flush", "populate"])
async def test_a_range_is_given_by_offset_and_size_in_any_way(directory: Path, name: str) -> None:
    async with opened(directory) as m:
        call: Callable[..., Awaitable[object]] = getattr(m, name)
        assert await call() is None
        assert await call(PAGE, 5) is None
        assert await call(offset=PAGE, size=5) is None
        assert await call(PAGE, size=5) is None
        assert await call(np.int64(PAGE), np.uint8(5)) is None
        assert await call(0, SIZE) is None
        assert await call(SIZE - 1, 1) is None
        await m.drain()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["persist", "flush", "populate"])
async def test_an_offset_alone_is_a_type_error(directory: Path, name: str) -> None:
    async with opened(directory) as m:
        call: Callable[..., Awaitable[None]] = getattr(m, name)
        for arguments, words in (((5,), {}), ((), {"offset": 5}), ((), {"size": 5}), ((0.0, 5), {}), ((0, "5"), {})):
            with pytest.raises(TypeError):
                await call(*arguments, **words)
        with pytest.raises(TypeError, match="needs a size"):
            await call(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["persist", "flush", "populate"])
@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, -1), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (-1, 0), (5, 1 << 64), (1 << 64, 0)]
)
async def test_a_range_outside_the_map_is_an_error_of_its_caller(
    directory: Path, name: str, offset: int, size: int
) -> None:
    async with opened(directory) as m:
        before = apmem2.statistics().submitted
        with pytest.raises(apmem2.OutOfRangeError, match=name) as caught:
            await getattr(m, name)(offset, size)
        assert caught.value.code == ErrorCode.LENGTH_OUT_OF_RANGE
        assert apmem2.statistics().submitted == before
        assert m.failed is None


@pytest.mark.asyncio
async def test_nothing_is_submitted_for_a_size_of_zero_inside_the_map(directory: Path) -> None:
    async with opened(directory) as m:
        before = apmem2.statistics().submitted
        for offset in (0, 5, SIZE):
            await m.persist(offset, 0)
            await m.flush(offset, 0)
            await m.populate(offset, 0)
            await m.memcpy(offset, b"")
            await m.memmove(offset, b"")
            await m.memset(offset, 1, 0)
        await m.persist(m[5:5])
        await m.persist(b"")
        await m.drain()
        assert apmem2.statistics().submitted == before


@pytest.mark.asyncio
async def test_a_persist_syncs_the_pages_of_its_range_and_no_others(directory: Path, recorder: Recorder) -> None:
    """Law 11: rounding to pages is ours, and that is all that is added."""
    async with opened(directory) as m:
        for offset, size, pages in (
            (0, 1, [0]),
            (PAGE - 1, 2, [0, 1]),
            (PAGE, PAGE, [1]),
            (3 * PAGE + 5, 2 * PAGE, [3, 4, 5]),
            (SIZE - 1, 1, [7]),
        ):
            mark = recorder.mark()
            m[offset] = 1
            await m.persist(offset, size)
            assert persisted_pages(recorder, mark, m) == pages


# ---- persist of buffers ------------------------------------------------------------------------


def _of(m: apmem2.Map, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.frombuffer(m.view, dtype=dtype)


ROWS = 4  # rows of a 2-D array, each of two pages


BUFFERS: dict[str, tuple[Callable[[apmem2.Map], Any], list[int]]] = {
    "view": (lambda m: m.view, list(range(8))),
    "slice": (lambda m: m[PAGE + 5 : PAGE + 9], [1]),
    "slice over a boundary": (lambda m: m[2 * PAGE - 1 : 2 * PAGE + 1], [1, 2]),
    "slice with a step": (lambda m: m[0 : 4 * PAGE : 2 * PAGE], [0, 2]),
    "slice backwards": (lambda m: m[5 * PAGE : PAGE : -2 * PAGE], [3, 5]),
    "array": (lambda m: _of(m)[PAGE : 2 * PAGE], [1]),
    "array of wide items": (lambda m: _of(m, np.float64)[PAGE // 8 - 1 : PAGE // 8 + 1], [0, 1]),
    "array of one item": (lambda m: _of(m, np.float64)[PAGE // 8 :][:1].reshape(()), [1]),
    "strided array": (lambda m: _of(m)[PAGE :: 3 * PAGE], [1, 4, 7]),
    "dense stride": (lambda m: _of(m)[PAGE : 3 * PAGE : 2], [1, 2]),
    "backwards array": (lambda m: _of(m)[:: -3 * PAGE], [1, 4, 7]),
    "2-D array": (lambda m: _of(m).reshape(ROWS, 2 * PAGE)[1:3], [2, 3, 4, 5]),
    "column": (lambda m: _of(m).reshape(ROWS, 2 * PAGE)[:, 5], [0, 2, 4, 6]),
    "column over a boundary": (lambda m: _of(m).reshape(ROWS, 2 * PAGE)[:2, PAGE - 1 : PAGE + 1], [0, 1, 2, 3]),
    "2-D backwards both ways": (lambda m: _of(m).reshape(ROWS, 2 * PAGE)[::-2, ::-PAGE], [2, 3, 6, 7]),
    "Fortran order": (lambda m: _of(m).reshape(2 * PAGE, ROWS, order="F")[:, 1], [2, 3]),
    "Fortran order, a row": (lambda m: _of(m).reshape(2 * PAGE, ROWS, order="F")[3], [0, 2, 4, 6]),
    "transposed": (lambda m: _of(m).reshape(ROWS, 2 * PAGE).T[7], [0, 2, 4, 6]),
    "cast": (lambda m: m[PAGE : 2 * PAGE].cast("I"), [1]),
    "empty": (lambda m: m[PAGE:PAGE], []),
    "empty strided": (lambda m: _of(m).reshape(ROWS, 2 * PAGE)[1:1, ::7], []),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("word", BUFFERS)
async def test_a_buffer_persists_the_pages_that_it_touches(directory: Path, recorder: Recorder, word: str) -> None:
    make, pages = BUFFERS[word]
    async with opened(directory) as m:
        _of(m)[:] = 9  # all of it is dirty
        buffer = make(m)
        mark = recorder.mark()
        await m.persist(buffer)
        assert sorted(set(persisted_pages(recorder, mark, m))) == pages
        await m.flush(buffer)
        await m.drain()
        del buffer


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "make",
    [
        lambda m: b"bytes",
        lambda m: bytearray(5),
        lambda m: array.array("i", [1, 2]),
        lambda m: np.zeros(3),
        lambda m: np.zeros((30, 30))[::2, ::3],
        lambda m: bytes(m[0:5]),
        lambda m: _of(m)[0:5].copy(),
    ],
)
@pytest.mark.parametrize("name", ["persist", "flush"])
async def test_a_buffer_outside_the_map_is_refused(
    directory: Path, make: Callable[[apmem2.Map], Any], name: str
) -> None:
    async with opened(directory) as m:
        with pytest.raises(apmem2.OutOfRangeError, match="buffer does not lie inside"):
            await getattr(m, name)(make(m))
        assert m.failed is None


@pytest.mark.asyncio
async def test_a_buffer_that_lies_only_partly_inside_is_refused(directory: Path) -> None:
    async with opened(directory) as whole:
        with mmap.mmap(os.open(directory / "a", os.O_RDWR), SIZE) as memory:
            half = np.frombuffer(memory, dtype=np.uint8)[: 4 * PAGE]
            async with apmem2.map_from_existing(half) as m:
                everything = np.frombuffer(memory, dtype=np.uint8)
                for outside in (everything, everything[:: SIZE - 1], everything[4 * PAGE - 1 : 4 * PAGE + 1]):
                    with pytest.raises(apmem2.OutOfRangeError):
                        await m.persist(outside)
                await m.persist(everything[: 4 * PAGE])
                with pytest.raises(apmem2.OutOfRangeError):
                    await whole.persist(everything)  # the same file, another mapping
            del half, everything, outside, m
            gc.collect()


@pytest.mark.asyncio
@pytest.mark.parametrize("thing", ["text", 1.5, [1, 2], object()])
async def test_what_is_no_buffer_is_a_type_error(directory: Path, thing: object) -> None:
    async with opened(directory) as m:
        with pytest.raises(TypeError):
            await m.persist(thing)  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            await m.memcpy(0, thing)  # type: ignore[arg-type]


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["memcpy", "memmove"])
@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        bytearray(b"hello"),
        memoryview(b"hello"),
        memoryview(b"h.e.l.l.o")[::2],
        array.array("B", b"hello"),
        np.frombuffer(b"hello", dtype=np.uint8),
        np.frombuffer(b"olleh", dtype=np.uint8)[::-1],
        np.frombuffer(b"hello", dtype="S5"),
    ],
    ids=lambda data: type(data).__name__,
)
async def test_a_copy_takes_any_buffer_and_shows_at_once(directory: Path, name: str, data: Any) -> None:
    async with opened(directory) as m:
        assert await getattr(m, name)(PAGE - 2, data) is None
        assert bytes(m[PAGE - 3 : PAGE + 4]) == b"\0hello\1"
        assert (directory / "a").read_bytes()[PAGE - 2 : PAGE + 3] == b"hello"


@pytest.mark.asyncio
async def test_copies_take_their_arguments_by_name(directory: Path) -> None:
    async with opened(directory) as m:
        await m.memcpy(offset=1, data=b"ab", flags=MemFlags.NODRAIN)
        await m.memmove(offset=3, data=b"cd", flags=MemFlags(0))
        await m.memset(offset=5, value=7, size=2, flags=MemFlags.NOFLUSH)
        await m.drain()
        assert bytes(m[:8]) == b"\0abcd\7\7\0"


@pytest.mark.asyncio
async def test_a_set_fills_its_range_and_no_more(directory: Path) -> None:
    async with opened(directory) as m:
        await m.memset(PAGE - 1, 255, 2)
        assert bytes(m[PAGE - 2 : PAGE + 2]) == b"\0\xff\xff\1"


@pytest.mark.asyncio
@pytest.mark.parametrize("value", [-1, 256, 1 << 40])
async def test_a_set_takes_one_byte(directory: Path, value: int) -> None:
    async with opened(directory) as m:
        with pytest.raises(ValueError, match="from 0 to 255"):
            await m.memset(0, value, 1)
        with pytest.raises(TypeError):
            await m.memset(0, b"x", 1)  # type: ignore[arg-type]


@pytest.mark.asyncio
@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (0, SIZE + 1)])
async def test_a_copy_outside_the_map_is_refused_and_changes_nothing(directory: Path, offset: int, size: int) -> None:
    async with opened(directory) as m:
        before = bytes(m.view)
        for flags in (MemFlags(0), MemFlags.NODRAIN, MemFlags.NOFLUSH):
            for refused in (
                m.memcpy(offset, b"x" * size, flags),
                m.memmove(offset, b"x" * size, flags),
                m.memset(offset, 120, size, flags),
            ):
                with pytest.raises(apmem2.OutOfRangeError):
                    await refused
        assert bytes(m.view) == before == (directory / "a").read_bytes()


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [lambda: np.ones(100), lambda: np.ones((20, 20))[::2, ::2]], ids=["plain", "strided"])
async def test_data_may_be_changed_as_soon_as_the_copy_was_asked_for(
    directory: Path, faults: Faults, make: Callable[[], np.ndarray[Any, Any]]
) -> None:
    """Law 6: up to copy_bytes_max it is read once, at the call."""
    data = make()
    expected = data.tobytes()
    async with opened(directory) as m:
        faults.hold("pwrite_dsync")
        task = asyncio.ensure_future(m.memcpy(0, data))
        await faults.held()
        data[:] = 7
        faults.release()
        await task
        assert bytes(m[: len(expected)]) == expected


# ---- flags -------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("flags", [64, 1 << 16, 1 << 31, -1, 1 << 70])
async def test_flags_that_are_none_are_refused(directory: Path, flags: int) -> None:
    async with opened(directory) as m:
        for refused in (m.memcpy(0, b"x", flags), m.memmove(0, b"x", flags), m.memset(0, 1, 1, flags)):
            with pytest.raises(ValueError, match="MemFlags"):
                await refused
        with pytest.raises(TypeError):
            await m.memcpy(0, b"x", "NODRAIN")  # type: ignore[arg-type]
        assert m[0] == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("word", ["PAGE", "CACHE_LINE", "BYTE"])
@pytest.mark.filterwarnings("ignore::apmem2.DurabilityWarning")
async def test_every_combination_of_flags_moves_the_bytes(
    directory: Path, forced: Callable[[str], None], word: str
) -> None:
    forced(word)
    async with opened(directory) as m:
        for flags in range(64):
            data = bytes((flags + i) & 0xFF for i in range(200))
            await m.memcpy(PAGE - 100, data, flags)
            await m.memset(PAGE + 200, flags + 1, 100, MemFlags(flags))
            await m.memmove(3 * PAGE, m[PAGE - 100 : PAGE + 100], flags)
            assert bytes(m[PAGE - 100 : PAGE + 100]) == bytes(m[3 * PAGE : 3 * PAGE + 200]) == data
            assert bytes(m[PAGE + 200 : PAGE + 300]) == bytes([flags + 1]) * 100
        await m.persist()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["memcpy", "memset"])
async def test_without_flags_a_copy_is_durable_on_return(directory: Path, recorder: Recorder, name: str) -> None:
    async with opened(directory) as m:
        mark = recorder.mark()
        await (m.memcpy(5, b"abc") if name == "memcpy" else m.memset(5, 1, 3))
        returned = recorder.mark()
        events = [event for event in recorder.events() if mark < event.begun]
        covering = [event for event in events if event.name in ("pwrite_dsync", "msync", "fdatasync")]
        assert covering
        assert all(event.ended < returned and event.result >= 0 for event in covering)


@pytest.mark.asyncio
@pytest.mark.parametrize("extra", [0, MemFlags.NODRAIN, MemFlags.NONTEMPORAL | MemFlags.WC])
async def test_noflush_leaves_the_syncing_to_a_later_persist(directory: Path, recorder: Recorder, extra: int) -> None:
    """And wins over NODRAIN: a drain has nothing to do with it."""
    async with opened(directory) as m:
        mark = recorder.mark()
        await m.memcpy(PAGE, b"abc", MemFlags.NOFLUSH | extra)
        await m.memset(3 * PAGE, 7, 3, MemFlags.NOFLUSH | extra)
        await m.drain()
        assert bytes(m[PAGE : PAGE + 3]) == b"abc"
        assert synced(recorder, mark) == []
        await m.persist(PAGE, 3)
        assert persisted_pages(recorder, mark, m) == [1]


@pytest.mark.asyncio
async def test_a_nodrain_copy_is_visible_on_return_and_durable_after_the_drain(
    directory: Path, recorder: Recorder, faults: Faults
) -> None:
    async with opened(directory) as m:
        faults.hold("msync")
        await m.memcpy(PAGE, b"abc", MemFlags.NODRAIN)
        assert bytes(m[PAGE : PAGE + 3]) == b"abc"
        drained = asyncio.ensure_future(m.drain())
        await faults.held()
        assert not drained.done()
        faults.release()
        await drained
        returned = recorder.mark()
        (sync,) = [event for event in recorder.events() if event.name == "msync"]
        assert (sync.offset, sync.result) == (m.address + PAGE, 0)
        assert sync.ended < returned


# ---- what may only be read ---------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("flags", [0, MemFlags.NODRAIN, MemFlags.NOFLUSH])
async def test_a_map_for_reading_refuses_copies_of_any_size(directory: Path, flags: int) -> None:
    (directory / "a").write_bytes(b"x" * 100)
    async with apmem2.map_new(
        Source.from_path(directory / "a"), required_granularity=Granularity.PAGE, protection=Protection.READ
    ) as m:
        for refused in (
            m.memcpy(0, b"y", flags),
            m.memcpy(0, b"", flags),
            m.memmove(0, b"y", flags),
            m.memset(0, 1, 1, flags),
            m.memset(0, 1, 0, flags),
        ):
            with pytest.raises(apmem2.AccessError, match="may only be read"):
                await refused
        await m.persist()
        await m.flush()
        await m.drain()
        assert m.failed is None
    assert (directory / "a").read_bytes() == b"x" * 100


# ---- populate ----------------------------------------------------------------------------------


def _smaps(address: int) -> dict[str, int]:
    found: dict[str, int] = {}
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        limits = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if limits:
            here = int(limits[1], 16) == address
        elif here and line.endswith(" kB"):
            name, number, _ = line.split()
            found[name.rstrip(":")] = int(number)
    return found


@pytest.mark.asyncio
async def test_populate_makes_pages_present_and_dirties_none(directory: Path) -> None:
    async with opened(directory) as m:
        assert _smaps(m.address)["Rss"] == 0
        await m.populate(PAGE, PAGE)
        some = _smaps(m.address)["Rss"]
        assert some > 0
        await m.populate()
        counts = _smaps(m.address)
        assert counts["Rss"] == SIZE // 1024
        assert bytes(m[-3:]) == b"\7\7\7"
        assert counts["Shared_Dirty"] + counts["Private_Dirty"] == 0
        m[0] = 1
        counts = _smaps(m.address)
        assert counts["Shared_Dirty"] + counts["Private_Dirty"] > 0


# ---- closed ------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[apmem2.Map], Awaitable[None]]] = {
    "persist": lambda m: m.persist(),
    "persist range": lambda m: m.persist(0, 1),
    "persist nothing": lambda m: m.persist(0, 0),
    "persist buffer": lambda m: m.persist(b"x"),
    "flush": lambda m: m.flush(0, 1),
    "flush buffer": lambda m: m.flush(b"x"),
    "drain": lambda m: m.drain(),
    "memcpy": lambda m: m.memcpy(0, b"x"),
    "memcpy nothing": lambda m: m.memcpy(0, b""),
    "memmove": lambda m: m.memmove(0, b"x"),
    "memset": lambda m: m.memset(0, 1, 1),
    "populate": lambda m: m.populate(0, 1),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("word", ["PAGE", "CACHE_LINE"])
@pytest.mark.filterwarnings("ignore::apmem2.DurabilityWarning")
async def test_a_closed_map_refuses_every_call(directory: Path, forced: Callable[[str], None], word: str) -> None:
    forced(word)
    async with opened(directory) as m:
        pass
    for call in CALLS.values():
        with pytest.raises(apmem2.ClosedError, match="closed") as caught:
            await call(m)
        assert caught.value.code == ErrorCode.CLOSED
    for use in (lambda: m.view, lambda: m[0], lambda: m[0:1], lambda: m.__setitem__(0, 1)):
        with pytest.raises(apmem2.ClosedError):
            use()
    with pytest.raises(apmem2.ClosedError):
        await m.__aenter__()


@pytest.mark.asyncio
async def test_a_closed_map_still_says_what_it_was(directory: Path) -> None:
    async with opened(directory) as m:
        address = m.address
    assert m.closed
    assert (m.address, m.size, len(m), m.granularity) == (address, SIZE, SIZE, Granularity.PAGE)
    assert m.failed is None
    assert m.source.path == str(directory / "a")
    assert m not in apmem2.mappings()


@pytest.mark.asyncio
async def test_closing_is_idempotent_one_after_the_other_and_at_the_same_time(directory: Path) -> None:
    async with opened(directory) as m:
        results = await asyncio.gather(*(m.aclose() for _ in range(5)), return_exceptions=True)
        assert results == [None] * 5
        await m.aclose()
        assert m.closed
    await m.aclose()


@pytest.mark.asyncio
async def test_a_second_close_waits_for_what_the_first_one_waits_for(directory: Path, faults: Faults) -> None:
    """Whoever returns from it may rely on the end of everything."""
    async with opened(directory) as m:
        m[0] = 1
        faults.hold("msync")
        work = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()
        closes = [asyncio.ensure_future(m.aclose()) for _ in range(2)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert m.closed
        assert not any(close.done() for close in closes)
        with pytest.raises(apmem2.ClosedError):
            await m.persist(0, 1)
        faults.release()
        await asyncio.gather(work, *closes)


@pytest.mark.asyncio
async def test_closing_persists_nothing_that_nobody_persisted(directory: Path, recorder: Recorder) -> None:
    async with opened(directory) as m:
        mark = recorder.mark()
        m[0] = 1
    assert synced(recorder, mark) == []


@pytest.mark.asyncio
async def test_closing_raises_the_error_of_accepted_work(directory: Path, faults: Faults) -> None:
    async with opened(directory) as m:
        m[0] = 1
        faults.fail("msync", errno.EIO)
        await m.flush(0, 1)
        with pytest.raises(apmem2.PersistError) as caught:
            await m.aclose()
        assert caught.value.errno == errno.EIO
        assert m.closed
        await m.aclose()  # told once
    assert isinstance(m.failed, apmem2.PersistError)


@pytest.mark.asyncio
async def test_a_view_that_outlives_its_map_stays_memory(directory: Path) -> None:
    """Law 5: the unmapping is left to the last view, with a warning."""
    m = await apmem2.open(directory / "a", size=100)
    await m.memcpy(0, b"hello")
    kept = m[:5]
    with pytest.warns(ResourceWarning, match="while views of it are alive"):
        await m.aclose()
    assert bytes(kept) == b"hello"
    kept[0] = ord("J")
    assert bytes(kept) == b"Jello"
    del kept


@pytest.mark.asyncio
async def test_a_map_that_is_forgotten_warns_and_is_unregistered(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=100)
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del m
        gc.collect()
    assert apmem2.mappings() == []


# ---- durability --------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs tmpfs at /dev/shm")
async def test_a_map_on_tmpfs_warns_once_and_says_that_nothing_survives() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        with pytest.warns(apmem2.DurabilityWarning, match="does not survive a power cut") as caught:
            m = await apmem2.open(f"{name}/a", size=100)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            async with m:
                assert m.durability is Durability.NONE
                m[0] = 1
                await m.persist()
                await m.memcpy(1, b"abc")


@pytest.mark.asyncio
@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs tmpfs at /dev/shm")
async def test_a_warning_made_an_error_leaves_no_map_behind() -> None:
    """As in a program that runs with -W error, or in these tests."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        with warnings.catch_warnings():
            warnings.simplefilter("error", apmem2.DurabilityWarning)
            with pytest.raises(apmem2.DurabilityWarning):
                await apmem2.open(f"{name}/a", size=100)
        gc.collect()
        assert apmem2.mappings() == []


# ---- a file that shrank ------------------------------------------------------------------------


SHRUNK: dict[str, Callable[[apmem2.Map], Awaitable[None]]] = {
    "persist": lambda m: m.persist(2 * PAGE, PAGE),
    "memcpy": lambda m: m.memcpy(2 * PAGE, b"x"),
    "memset": lambda m: m.memset(2 * PAGE, 1, 1),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("word", SHRUNK)
async def test_a_file_that_was_truncated_is_an_error_and_the_end_of_its_maps(directory: Path, word: str) -> None:
    """msync says "ok" of pages that a truncation took away, and a write would make the file longer again."""
    async with opened(directory) as m, apmem2.open(directory / "a") as other:
        os.truncate(directory / "a", PAGE)
        with pytest.raises(apmem2.PersistError, match="truncated") as caught:
            await SHRUNK[word](m)
        assert caught.value.code == ErrorCode.FILE_SHRANK
        assert caught.value.errno == errno.ENXIO
        assert caught.value.filename == str(directory / "a")
        assert (directory / "a").stat().st_size == PAGE
        assert str(m.failed) == str(caught.value)
        for failed in (m, other):
            with pytest.raises(apmem2.MapFailedError) as later:
                await failed.persist(0, 1)
            assert str(later.value.__cause__) == str(caught.value)
            assert "failed" in repr(failed)


@pytest.mark.asyncio
async def test_populate_beyond_the_end_of_a_truncated_file_is_an_error_of_its_caller(directory: Path) -> None:
    async with opened(directory) as m:
        os.truncate(directory / "a", PAGE)
        with pytest.raises(apmem2.PersistError, match="truncated") as caught:
            await m.populate(2 * PAGE, PAGE)
        assert caught.value.errno == errno.ENXIO
        await m.populate(0, PAGE)
        assert m.failed is None  # nothing was written


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_statistics_count_what_a_map_did(directory: Path) -> None:
    async with opened(directory) as m:
        before = apmem2.statistics()
        m[0] = 1
        await m.persist(0, 100)
        await m.memcpy(PAGE, b"12345")
        after = apmem2.statistics()
    assert after.bytes_persisted - before.bytes_persisted >= 100
    assert after.bytes_copied - before.bytes_copied == 5
    assert after.submitted - before.submitted == after.completed - before.completed == 2
    assert after.rounds - before.rounds == 2
    assert after.sync_calls > before.sync_calls
    assert after.failed == before.failed
    assert after.latency_max_s >= after.latency_mean_s > 0
