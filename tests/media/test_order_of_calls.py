"""Law 15: a name is durable before the first promise under it. Seen in the order of calls, because ext4 and xfs hide
the absence of a sync at creation: no crash test on them would miss it.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import apmem2
from apmem2.native import lib

if TYPE_CHECKING:
    from conftest import Event, Faults, Recorder

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE
LARGE = 20 << 20  # more than two pieces of writing
BY_PAGE = apmem2.Granularity.PAGE


def in_order(recorder: Recorder, since: int, *names: str) -> list[Event]:
    """The successful calls of these kinds that began after a mark, by when they began."""
    events = sorted(recorder.events(), key=lambda event: event.begun)
    return [event for event in events if event.name in names and event.begun > since and event.result >= 0]


def one(events: list[Event], name: str) -> Event:
    (found,) = [event for event in events if event.name == name]
    return found


def status_flags(fd: int) -> int:
    """Of an open file description, which descriptors that were dup'ed share: O_APPEND and the like."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def make(path: Path, size: int = SIZE) -> None:
    path.write_bytes(b"o" * size)


def open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [SIZE, LARGE])
async def test_a_new_file_is_whole_and_synced_before_it_has_a_name_and_that_is_synced_before_open_returns(
    directory: Path, recorder: Recorder, size: int
) -> None:
    before = recorder.mark()
    async with apmem2.open(directory / "a", size=size):
        opened = recorder.mark()
    names = ("tmpfile", "fallocate", "pwrite", "fsync", "link", "fsync_directory")
    events = in_order(recorder, before, *names)
    unnamed, allocated = one(events, "tmpfile"), one(events, "fallocate")
    synced, counted = [event for event in events if event.name == "fsync"]  # the second one for its link count
    linked, remembered = one(events, "link"), one(events, "fsync_directory")
    writes = [event for event in events if event.name == "pwrite"]
    fd = unnamed.result
    assert {event.object for event in (allocated, synced, linked, counted, *writes)} == {fd}
    assert remembered.object == unnamed.object, "another directory"
    assert sum(event.result for event in writes) == size
    assert unnamed.ended < allocated.begun
    assert allocated.ended < min(event.begun for event in writes)
    assert max(event.ended for event in writes) < synced.begun
    assert synced.ended < linked.begun
    assert linked.ended < counted.begun
    assert counted.ended < remembered.begun
    assert remembered.ended < opened


@pytest.mark.asyncio
async def test_a_sparse_file_is_synced_before_it_has_a_name_as_well(directory: Path, recorder: Recorder) -> None:
    before = recorder.mark()
    async with apmem2.open(directory / "a", size=SIZE, sparse=True):
        opened = recorder.mark()
    events = in_order(recorder, before, "ftruncate", "fallocate", "pwrite", "fsync", "link", "fsync_directory")
    assert [event.name for event in events] == ["ftruncate", "fsync", "link", "fsync", "fsync_directory"]
    assert all(first.ended < second.begun for first, second in itertools.pairwise(events))
    assert events[-1].ended < opened


@pytest.mark.asyncio
async def test_growth_is_written_and_synced_before_open_returns(directory: Path, recorder: Recorder) -> None:
    path = directory / "a"
    async with apmem2.open(path, size=SIZE) as m:
        before = recorder.mark()
        async with apmem2.open(path, size=2 * SIZE, grow=True):
            opened = recorder.mark()
        events = in_order(recorder, before, "fallocate", "pwrite", "fsync")
        allocated, synced = one(events, "fallocate"), one(events, "fsync")
        writes = [event for event in events if event.name == "pwrite"]
        assert {event.object for event in events if event.name != "fsync"} == {m.pointer.file.fd}
        assert sum(event.result for event in writes) == SIZE
        assert min(event.offset for event in writes) == SIZE, "old bytes were overwritten"
        assert allocated.ended < min(event.begun for event in writes)
        assert max(event.ended for event in writes) < synced.begun
        assert synced.ended < opened


@pytest.mark.asyncio
@pytest.mark.parametrize("by_map_new", [False, True], ids=["open", "map_new"])
async def test_an_existing_file_and_its_directory_are_synced_before_the_first_promise(
    directory: Path, recorder: Recorder, by_map_new: bool
) -> None:
    """Who made it may have died before it had synced either."""
    path = directory / "a"
    make(path)
    before = recorder.mark()
    source = apmem2.Source.from_path(path)
    opening = apmem2.map_new(source, required_granularity=BY_PAGE) if by_map_new else apmem2.open(path)
    async with opening as m:
        opened = recorder.mark()
        events = in_order(recorder, before, "fsync", "fsync_directory")
        synced, remembered = one(events, "fsync"), one(events, "fsync_directory")
        assert synced.object != m.pointer.file.fd, "the error mark of the rounds' description would be taken"
        assert synced.ended < remembered.begun
        assert remembered.ended < opened
        before = recorder.mark()
        async with apmem2.open(path):  # the file is known to be durable; this name of it may be another one
            assert in_order(recorder, before, "fsync") == []


@pytest.mark.asyncio
async def test_a_file_that_was_closed_and_is_opened_again_is_synced_again(directory: Path, recorder: Recorder) -> None:
    path = directory / "a"
    await (await apmem2.open(path, size=SIZE)).aclose()
    before = recorder.mark()
    async with apmem2.open(path):
        assert [event.name for event in in_order(recorder, before, "fsync", "fsync_directory")] == [
            "fsync",
            "fsync_directory",
        ]


@pytest.mark.asyncio
async def test_nothing_is_visible_under_the_name_before_the_file_is_whole(directory: Path, faults: Faults) -> None:
    for call in ("fallocate", "pwrite", "fsync", "link"):
        faults.hold(call)
        opening = asyncio.ensure_future(apmem2.open(directory / call, size=SIZE).__aenter__())
        await faults.held()
        assert call not in listing(directory), f"visible at {call}"
        faults.release()
        async with await opening:
            assert call in listing(directory)
            assert os.stat(directory / call).st_size == SIZE


@pytest.mark.asyncio
async def test_open_has_not_returned_before_the_directory_is_synced(directory: Path, faults: Faults) -> None:
    faults.hold("fsync_directory")
    opening = asyncio.ensure_future(apmem2.open(directory / "a", size=SIZE).__aenter__())
    await faults.held()
    assert listing(directory) == ["a"]
    assert not opening.done()
    faults.release()
    await (await opening).aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["from_fd", "adopted", "adopted from_fd"])
async def test_a_file_is_opened_again_and_its_descriptor_never_duplicated(
    directory: Path, recorder: Recorder, how: str
) -> None:
    """A dup shares the owner's memory of write-back errors (law 13): what the owner was told, we would never be."""
    path = directory / "a"
    make(path)
    fd = open_file(path)
    memory = mmap.mmap(fd, SIZE)
    source = apmem2.Source.from_fd(fd)
    opening = {
        "from_fd": lambda: apmem2.map_new(source, required_granularity=BY_PAGE),
        "adopted": lambda: apmem2.map_from_existing(memory),
        "adopted from_fd": lambda: apmem2.map_from_existing(memory, source=source),
    }[how]
    async with opening() as m:
        ours = int(m.pointer.file.fd)
        assert not m.pointer.file.is_dup
        fcntl.fcntl(fd, fcntl.F_SETFL, status_flags(fd) | os.O_APPEND)
        assert not status_flags(ours) & os.O_APPEND, "the description is the caller's"
        fcntl.fcntl(fd, fcntl.F_SETFL, status_flags(fd) & ~os.O_APPEND)
        os.close(fd)  # and not needed any more
        await m.memcpy(0, b"x")
        await m.persist()
        again = open_file(path)  # takes the number of the caller's descriptor
        os.close(again)
    memory.close()


@pytest.mark.asyncio
async def test_all_maps_of_a_file_share_one_description(directory: Path) -> None:
    path = directory / "a"
    make(path)
    fd = open_file(path)
    memory = mmap.mmap(fd, SIZE)
    async with (
        apmem2.open(path) as first,
        apmem2.map_new(apmem2.Source.from_fd(fd), required_granularity=BY_PAGE) as second,
        apmem2.map_from_existing(memory) as third,
    ):
        assert first.pointer.file == second.pointer.file == third.pointer.file
    os.close(fd)
    memory.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["adopted", "from_fd"])
async def test_a_file_first_known_without_its_name_is_synced_with_it_when_it_is_opened_by_it(
    directory: Path, recorder: Recorder, how: str
) -> None:
    """Being known is not being durable: an adoption or a descriptor says nothing of a directory."""
    path = directory / "a"
    make(path)
    fd = open_file(path)
    memory = mmap.mmap(fd, SIZE)
    source = apmem2.Source.from_fd(fd)
    first = (
        apmem2.map_from_existing(memory) if how == "adopted" else apmem2.map_new(source, required_granularity=BY_PAGE)
    )
    async with first:
        before = recorder.mark()
        async with apmem2.open(path):
            assert [event.name for event in in_order(recorder, before, "fsync_directory")] == ["fsync_directory"]
    memory.close()
    os.close(fd)


@pytest.mark.asyncio
async def test_a_second_opener_makes_no_promise_while_the_first_is_still_syncing(
    directory: Path, faults: Faults
) -> None:
    path = directory / "a"
    make(path)
    faults.hold("fsync")
    first = asyncio.ensure_future(apmem2.open(path).__aenter__())
    await faults.held()
    second = asyncio.ensure_future(apmem2.open(path).__aenter__())
    while not second.done() and lib.apm_observe_held() < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    early = second.done()
    faults.release()
    for opening in (first, second):
        await (await opening).aclose()
    assert not early, "open returned before the file and its name were durable"
