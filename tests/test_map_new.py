"""`map_new` and `Source`: libpmem2's rules of what may be mapped, and how."""

# ruff: noqa: ASYNC240  (a test may look at a directory)

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Recorder

import apmem2
from apmem2 import Durability, ErrorCode, Granularity, Protection, Sharing, Source

PAGE = mmap.PAGESIZE
READ_WRITE = Protection.READ | Protection.WRITE

volatile = pytest.mark.filterwarnings("ignore::apmem2.DurabilityWarning")


@pytest.fixture
def file(directory: Path) -> Path:
    """Three pages and a bit: 'a…', 'b…', 'c…', 'd' * 10."""
    path = directory / "file"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE + b"c" * PAGE + b"d" * 10)
    return path


@contextlib.contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of the caller's own."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- offset and length -------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_without_a_length_all_of_it_is_mapped_to_its_very_end(file: Path) -> None:
    async with apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE) as m:
        assert len(m) == 3 * PAGE + 10
        assert bytes(m[3 * PAGE :]) == b"d" * 10


@pytest.mark.asyncio
async def test_an_offset_begins_there_and_without_a_length_goes_to_the_end(file: Path) -> None:
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=2 * PAGE) as m:
        assert bytes(m.view) == b"c" * PAGE + b"d" * 10
        await m.memcpy(PAGE + 3, b"XY")
    assert file.read_bytes()[3 * PAGE :] == b"dddXYddddd"


@pytest.mark.asyncio
async def test_a_length_takes_that_much(file: Path) -> None:
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=PAGE, length=PAGE) as m:
        assert bytes(m.view) == b"b" * PAGE


@pytest.mark.asyncio
async def test_a_persist_of_a_map_with_an_offset_writes_there(file: Path) -> None:
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=PAGE, length=PAGE) as m:
        m[5] = ord("!")
        await m.persist(5, 1)
        await m.memset(7, ord("?"), 2)
    assert file.read_bytes()[PAGE : PAGE + 10] == b"bbbbb!b??b"


@pytest.mark.parametrize("offset", [1, 512, PAGE - 1, PAGE + 1])
def test_an_unaligned_offset_is_refused_at_once(file: Path, offset: int) -> None:
    with pytest.raises(apmem2.OutOfRangeError, match="multiple of the page size") as caught:
        apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE, offset=offset)
    assert caught.value.code == ErrorCode.OFFSET_UNALIGNED


@pytest.mark.parametrize("length", [1, 512, PAGE - 1, PAGE + 1, 3 * PAGE + 10])
def test_an_unaligned_length_is_refused_at_once(file: Path, length: int) -> None:
    """libpmem2's rule, for the file's own uneven length too; None is the way to map that."""
    with pytest.raises(apmem2.OutOfRangeError, match="multiple of the page size") as caught:
        apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE, length=length)
    assert caught.value.code == ErrorCode.LENGTH_UNALIGNED


@pytest.mark.parametrize(("offset", "length"), [(-PAGE, None), (-1, None), (0, 0), (0, -PAGE)])
def test_a_negative_offset_and_a_length_that_is_not_positive_are_refused_at_once(
    file: Path, offset: int, length: int | None
) -> None:
    with pytest.raises(apmem2.OutOfRangeError):
        apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE, offset=offset, length=length)


@pytest.mark.asyncio
@pytest.mark.parametrize("offset", [4 * PAGE, 1 << 40, 1 << 63, 1 << 70])
async def test_an_offset_beyond_the_end_is_refused(file: Path, offset: int) -> None:
    with pytest.raises(apmem2.OutOfRangeError) as caught:
        await apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE, offset=offset)
    assert caught.value.code == ErrorCode.OFFSET_OUT_OF_RANGE


@pytest.mark.asyncio
@pytest.mark.parametrize(("offset", "length"), [(0, 4 * PAGE), (3 * PAGE, PAGE), (PAGE, 1 << 62), (0, 1 << 70)])
async def test_a_length_beyond_the_end_is_refused(file: Path, offset: int, length: int) -> None:
    source = Source.from_path(file)
    with pytest.raises(apmem2.OutOfRangeError) as caught:
        await apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=offset, length=length)
    assert caught.value.code == ErrorCode.MAP_RANGE


@pytest.mark.asyncio
async def test_an_empty_file_is_refused(directory: Path) -> None:
    (directory / "empty").touch()
    with pytest.raises(apmem2.OutOfRangeError) as caught:
        await apmem2.map_new(Source.from_path(directory / "empty"), required_granularity=Granularity.PAGE)
    assert caught.value.code == ErrorCode.SOURCE_EMPTY


@pytest.mark.asyncio
async def test_two_maps_of_one_file_may_overlap_in_it(file: Path) -> None:
    source = Source.from_path(file)
    async with (
        apmem2.map_new(source, required_granularity=Granularity.PAGE) as all_of_it,
        apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=PAGE, length=PAGE) as middle,
    ):
        middle[0] = ord("!")
        assert all_of_it[PAGE] == ord("!")
        await asyncio.gather(all_of_it.persist(), middle.persist())


# ---- the other arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, -1, "PAGE", None])
def test_the_required_granularity_is_one_of_three(file: Path, value: object) -> None:
    with pytest.raises(ValueError, match="Granularity"):
        apmem2.map_new(Source.from_path(file), required_granularity=value)  # type: ignore[arg-type]


def test_the_required_granularity_must_be_said(file: Path) -> None:
    with pytest.raises(TypeError):
        apmem2.map_new(Source.from_path(file))  # type: ignore[call-arg]


def test_sharing_and_protection_are_of_their_kinds(file: Path) -> None:
    source = Source.from_path(file)
    with pytest.raises(ValueError, match="Sharing"):
        apmem2.map_new(source, required_granularity=Granularity.PAGE, sharing=2)  # type: ignore[arg-type]
    with pytest.raises(apmem2.InvalidSourceError) as caught:
        apmem2.map_new(source, required_granularity=Granularity.PAGE, protection=Protection(1 << 5))
    assert caught.value.code == ErrorCode.INVALID_PROT_FLAG


@pytest.mark.parametrize("value", [None, "file", 5])
def test_a_source_is_a_source(value: object) -> None:
    with pytest.raises(TypeError, match="Source"):
        apmem2.map_new(value, required_granularity=Granularity.PAGE)  # type: ignore[arg-type]


def test_a_mapping_that_is_never_awaited_warns(file: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"apmem2\.map_new\(\.\.\.\) was never awaited"):
        apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE)


# ---- granularity -------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("required", [Granularity.BYTE, Granularity.CACHE_LINE])
async def test_a_disk_does_not_grant_less_than_a_page(file: Path, required: Granularity) -> None:
    with pytest.raises(apmem2.GranularityNotSupportedError, match=rf"{required.name} was required.*PAGE is granted"):
        await apmem2.map_new(Source.from_path(file), required_granularity=required)


@pytest.mark.asyncio
@pytest.mark.parametrize("word", ["BYTE", "CACHE_LINE", "PAGE"])
@pytest.mark.parametrize("required", list(Granularity), ids=lambda required: required.name)
async def test_the_required_granularity_is_the_coarsest_that_is_accepted(
    file: Path, forced: Callable[[str], None], word: str, required: Granularity
) -> None:
    forced(word)
    given = Granularity[word]
    opening = apmem2.map_new(Source.from_path(file), required_granularity=required)
    if given > required:
        with pytest.raises(apmem2.GranularityNotSupportedError):
            await opening
        return
    with contextlib.ExitStack() as expected:
        if given is not Granularity.PAGE:
            expected.enter_context(pytest.warns(apmem2.DurabilityWarning, match="not known to survive"))
        m = await opening
    assert m.granularity is given
    assert m.durability is (Durability.POWER_LOSS if given is Granularity.PAGE else Durability.UNKNOWN)
    m[1] = 1
    await m.persist(1, 1)
    await m.aclose()


# ---- sharing and protection --------------------------------------------------------------------


@pytest.mark.asyncio
@volatile
async def test_stores_into_a_private_map_never_reach_the_file(file: Path) -> None:
    before = file.read_bytes()
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, sharing=Sharing.PRIVATE) as m:
        assert m.sharing is Sharing.PRIVATE
        assert m.durability is Durability.NONE
        m[0] = ord("!")
        await m.persist()
        await m.memcpy(1, b"!!")
        await m.memset(PAGE, ord("!"), PAGE)
        await m.flush(PAGE, 1)
        await m.drain()
        assert bytes(m[:4]) == b"!!!a"
        assert bytes(m[PAGE : 2 * PAGE]) == b"!" * PAGE
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE) as other:
            assert bytes(other.view) == before
        assert file.read_bytes() == before
    assert file.read_bytes() == before


@pytest.mark.asyncio
async def test_a_private_map_says_that_nothing_survives(file: Path) -> None:
    with pytest.warns(apmem2.DurabilityWarning, match="does not survive"):
        m = await apmem2.map_new(Source.from_path(file), required_granularity=Granularity.PAGE, sharing=Sharing.PRIVATE)
    await m.aclose()


@pytest.mark.asyncio
async def test_a_map_for_reading_can_be_read_and_not_written(file: Path) -> None:
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, protection=Protection.READ) as m:
        assert m.protection is Protection.READ
        assert m.view.readonly
        assert m[0] == ord("a")
        with pytest.raises(TypeError):
            m[0] = 1
        for refused in (m.memcpy(0, b"x"), m.memmove(0, b"x"), m.memset(0, 1, 1)):
            with pytest.raises(apmem2.AccessError):
                await refused
        await m.persist()
    assert file.read_bytes()[:1] == b"a"


@pytest.mark.asyncio
async def test_a_map_without_reading_has_no_view(file: Path) -> None:
    source = Source.from_path(file)
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, protection=Protection.NONE) as m:
        with pytest.raises(apmem2.AccessError, match=r"Protection\.READ"):
            _ = m.view
        with pytest.raises(apmem2.AccessError):
            m[0] = 1


@pytest.mark.asyncio
async def test_the_mapping_has_the_protection_that_was_asked_for(file: Path) -> None:
    for protection, letters in (
        (Protection.READ, "r--s"),
        (READ_WRITE, "rw-s"),
        (Protection.READ | Protection.EXEC, "r-xs"),
    ):
        source = Source.from_path(file)
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE, protection=protection) as m:
            assert _permissions(m.address) == letters


def _permissions(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        limits, letters = line.split()[:2]
        begin, end = (int(word, 16) for word in limits.split("-"))
        if begin <= address < end:
            return letters
    raise AssertionError("not mapped")


@pytest.mark.asyncio
async def test_cached_pages_are_dropped_for_writing_only_and_only_those_of_the_map(
    file: Path, recorder: Recorder
) -> None:
    """Nobody dirties a folio through a map for reading, so a warm cache is only good."""
    source = Source.from_path(file)
    for protection, keep_cache in ((Protection.READ, False), (READ_WRITE, True)):
        async with apmem2.map_new(
            source, required_granularity=Granularity.PAGE, protection=protection, keep_cache=keep_cache
        ):
            assert "fadvise" not in recorder.calls()
    async with apmem2.map_new(source, required_granularity=Granularity.PAGE, offset=PAGE, length=PAGE):
        (advice,) = [event for event in recorder.events() if event.name == "fadvise"]
        assert (advice.object, advice.offset, advice.size) == (file.stat().st_ino, PAGE, PAGE)


# ---- descriptors -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_read_only_descriptor_allows_no_shared_writing(file: Path) -> None:
    """Although we, by its path, could write: what the descriptor may is what the source may."""
    with descriptor(file, os.O_RDONLY) as fd:
        source = Source.from_fd(fd)
        for _ in range(2):  # also when it is our own description that is used
            with pytest.raises(apmem2.AccessError) as caught:
                await apmem2.map_new(source, required_granularity=Granularity.PAGE)
            assert caught.value.code == ErrorCode.NO_ACCESS
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE, protection=Protection.READ) as m:
            assert m[0] == ord("a")


@pytest.mark.asyncio
@volatile
async def test_a_read_only_descriptor_allows_private_writing(file: Path) -> None:
    with descriptor(file, os.O_RDONLY) as fd:
        source = Source.from_fd(fd)
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE, sharing=Sharing.PRIVATE) as m:
            m[0] = ord("!")
            await m.memcpy(1, b"!")
            assert bytes(m[:3]) == b"!!a"
    assert file.read_bytes()[:3] == b"aaa"


@pytest.mark.asyncio
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH], ids=["O_WRONLY", "O_PATH"])
async def test_a_descriptor_that_cannot_be_read_is_refused(file: Path, flags: int) -> None:
    with descriptor(file, flags) as fd, pytest.raises(apmem2.InvalidSourceError) as caught:
        await apmem2.map_new(Source.from_fd(fd), required_granularity=Granularity.PAGE)
    assert caught.value.code == ErrorCode.INVALID_FILE_HANDLE


@pytest.mark.asyncio
async def test_a_directory_and_a_pipe_are_refused(directory: Path) -> None:
    with descriptor(directory, os.O_RDONLY) as fd, pytest.raises(apmem2.InvalidSourceError) as caught:
        await apmem2.map_new(Source.from_fd(fd), required_granularity=Granularity.PAGE)
    assert caught.value.code == ErrorCode.INVALID_FILE_TYPE
    ends = os.pipe()
    try:
        for end in ends:
            with pytest.raises(apmem2.InvalidSourceError):
                await apmem2.map_new(Source.from_fd(end), required_granularity=Granularity.PAGE)
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.asyncio
async def test_a_closed_descriptor_is_refused(file: Path) -> None:
    with descriptor(file, os.O_RDWR) as fd:
        pass
    with pytest.raises(apmem2.OpenError) as caught:
        await apmem2.map_new(Source.from_fd(fd), required_granularity=Granularity.PAGE)
    assert caught.value.errno == errno.EBADF


@pytest.mark.asyncio
async def test_the_callers_descriptor_is_not_closed_and_not_needed_after_the_first_use(file: Path) -> None:
    with descriptor(file, os.O_RDWR) as fd:
        source = Source.from_fd(fd)
        assert await source.size() == 3 * PAGE + 10
        assert os.fstat(fd).st_size == 3 * PAGE + 10
    other = os.open(os.devnull, os.O_RDWR)  # has the number now
    try:
        assert other == fd
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE) as m:
            await m.memcpy(0, b"!")
        assert await source.size() == 3 * PAGE + 10
        async with apmem2.map_new(source, required_granularity=Granularity.PAGE) as m:
            assert m[0] == ord("!")
    finally:
        os.close(other)


@pytest.mark.asyncio
async def test_a_descriptor_of_a_file_without_a_name_can_be_mapped(directory: Path) -> None:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.truncate(fd, PAGE)
        with pytest.warns(apmem2.DurabilityWarning, match="does not survive"):  # no name leads to it after a cut
            m = await apmem2.map_new(Source.from_fd(fd), required_granularity=Granularity.PAGE)
        async with m:
            await m.memcpy(3, b"hello")
        assert os.pread(fd, 5, 3) == b"hello"
    finally:
        os.close(fd)


# ---- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fd", [-1, -100])
def test_a_negative_descriptor_is_refused_at_once(fd: int) -> None:
    with pytest.raises(ValueError, match="descriptor"):
        Source.from_fd(fd)


@pytest.mark.parametrize("fd", ["3", 3.0, None])
def test_a_descriptor_is_a_number(fd: object) -> None:
    with pytest.raises(TypeError):
        Source.from_fd(fd)  # type: ignore[arg-type]


def test_making_a_source_touches_nothing() -> None:
    assert Source.from_path("/nowhere/at/all").path == "/nowhere/at/all"
    assert Source.from_fd(987654).path is None
    assert "987654" in repr(Source.from_fd(987654))
    assert Source.anonymous(5).is_anonymous


@pytest.mark.asyncio
async def test_the_size_of_a_source_is_that_of_the_file_now(file: Path) -> None:
    by_path = Source.from_path(file)
    with descriptor(file, os.O_RDWR) as fd:
        by_fd = Source.from_fd(fd)
        assert (await by_path.size(), await by_fd.size()) == (3 * PAGE + 10, 3 * PAGE + 10)
        os.truncate(fd, 5)
        assert (await by_path.size(), await by_fd.size()) == (5, 5)
    assert await Source.anonymous(77).size() == 77


@pytest.mark.asyncio
async def test_the_alignment_of_a_source_is_the_page_size(file: Path) -> None:
    assert await Source.from_path(file).alignment() == PAGE
    assert await Source.anonymous(77).alignment() == PAGE


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", ["size", "alignment"])
async def test_a_source_that_is_not_there_says_so_when_asked(directory: Path, ask: str) -> None:
    with pytest.raises(FileNotFoundError):
        await getattr(Source.from_path(directory / "nothing"), ask)()
    with pytest.raises(IsADirectoryError):
        await getattr(Source.from_path(directory), ask)()


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, -1])
async def test_anonymous_memory_has_a_size(size: int) -> None:
    with pytest.raises(apmem2.OutOfRangeError):
        Source.anonymous(size)


@pytest.mark.asyncio
@pytest.mark.parametrize("sharing", list(Sharing), ids=lambda sharing: sharing.name)
@pytest.mark.parametrize("size", [1, PAGE + 1, 1 << 20])
async def test_anonymous_memory_is_memory_and_lasts_nowhere(sharing: Sharing, size: int) -> None:
    source = Source.anonymous(size)
    with pytest.warns(apmem2.DurabilityWarning, match="does not survive"):
        m = await apmem2.map_new(source, required_granularity=Granularity.PAGE, sharing=sharing)
    async with m:
        assert m.source is source
        assert len(m) == size
        assert m.durability is Durability.NONE
        assert bytes(m.view) == bytes(size)
        await m.memset(0, 7, size)
        await m.persist()
        await m.populate()
        assert bytes(m.view) == b"\x07" * size


@pytest.mark.asyncio
async def test_a_source_serves_many_maps_at_once(file: Path) -> None:
    with descriptor(file, os.O_RDWR) as fd:
        for source in (Source.from_path(file), Source.from_fd(fd)):
            maps = await asyncio.gather(*(_map(source) for _ in range(8)))
            assert len({m.address for m in maps}) == 8
            assert all(m.source is source for m in maps)
            maps[0][0] = ord("!")
            assert all(m[0] == ord("!") for m in maps)
            await asyncio.gather(*(m.aclose() for m in maps))


async def _map(source: Source) -> apmem2.Map:
    return await apmem2.map_new(source, required_granularity=Granularity.PAGE)


@pytest.mark.asyncio
async def test_a_source_serves_every_loop_and_thread(file: Path) -> None:
    with descriptor(file, os.O_RDWR) as fd:
        for source in (Source.from_path(file), Source.from_fd(fd)):
            errors: list[BaseException] = []

            def use(source: Source = source, errors: list[BaseException] = errors) -> None:
                async def body() -> None:
                    async with await _map(source) as m:
                        await m.memcpy(threading.get_ident() % PAGE, b"!")
                        assert await source.size() == 3 * PAGE + 10

                try:
                    asyncio.run(body())
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=use) for _ in range(4)]
            for thread in threads:
                thread.start()
            async with await _map(source) as m:
                await m.memcpy(0, b"!")
            for thread in threads:
                await asyncio.to_thread(thread.join)
            assert errors == []


@pytest.mark.asyncio
async def test_a_path_is_looked_up_anew_at_each_use(file: Path) -> None:
    source = Source.from_path(file)
    assert await source.size() == 3 * PAGE + 10
    file.rename(file.with_name("old"))
    with pytest.raises(FileNotFoundError):
        await source.size()
    file.write_bytes(b"new")
    async with await _map(source) as m:
        assert bytes(m.view) == b"new"
