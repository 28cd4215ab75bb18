"""`open`: which file comes to be, which one is accepted, and what is left when it goes wrong."""

# ruff: noqa: ASYNC110, ASYNC240  (a test may look at a directory, and wait for what nobody announces)

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Faults, Program, Recorder

import apmem2

PAGE = mmap.PAGESIZE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, other users")


def descriptors(path: Path) -> list[int]:
    """The descriptors of this process that lead to the file."""
    about = path.stat()
    found: list[int] = []
    for word in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            other = os.stat(int(word))
            if (other.st_dev, other.st_ino) == (about.st_dev, about.st_ino):
                found.append(int(word))
    return found


def all_descriptors() -> set[tuple[int, str]]:
    """Every descriptor of this process and what it leads to."""
    found: set[tuple[int, str]] = set()
    for word in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((int(word), os.readlink(f"/proc/self/fd/{word}")))
    return {entry for entry in found if not entry[1].endswith(("/fd", "[eventfd]", "[eventpoll]"))}


def cached_pages(path: Path) -> int:
    """How many pages of the file the page cache has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        count = (len(memory) + PAGE - 1) // PAGE
        pages = (ctypes.c_ubyte * count)()
        anchor = ctypes.c_char.from_buffer(memory)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(memory)), pages) == 0
        del anchor
        return sum(page & 1 for page in pages)


def write_durably(path: Path, data: bytes) -> None:
    """A file whose cached pages are clean."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_mapped(inode: int) -> bool:
    """Does this process map the file? (By inode: a file made by O_TMPFILE has another name in that table.)"""
    return any(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens behind the scenes; the time only ends a test that fails."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def idle() -> None:
    """The pool has nothing left to do, for a cancelled waiter either."""
    await until(lambda: apmem2.statistics().in_flight == 0)


async def only(before: set[tuple[int, str]]) -> None:
    """The descriptors are those again: the file of a refused opening is closed in the pool."""
    await until(lambda: all_descriptors() == before)


# ---- a missing file ------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 2, PAGE - 1, PAGE, PAGE + 1, 12345, 3 << 20])
async def test_a_missing_file_is_made_with_any_size_and_reads_as_zeros(directory: Path, size: int) -> None:
    async with apmem2.open(directory / "a", size=size) as m:
        assert len(m) == m.size == size
        assert bytes(m.view) == bytes(size)
        m[size - 1] = 9
        await m.persist(size - 1, 1)
    assert (directory / "a").read_bytes() == bytes(size - 1) + b"\x09"


@pytest.mark.asyncio
async def test_a_missing_file_without_a_size_is_missing(directory: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await apmem2.open(directory / "a")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(directory / "a")
    assert list(directory.iterdir()) == []


@pytest.mark.asyncio
async def test_a_missing_file_is_not_made_where_create_is_false(directory: Path) -> None:
    with pytest.raises(apmem2.MissingFileError):
        await apmem2.open(directory / "a", size=5, create=False)
    assert list(directory.iterdir()) == []


@pytest.mark.asyncio
async def test_a_new_file_has_its_blocks_allocated(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=1 << 20):
        assert (directory / "a").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.asyncio
async def test_a_sparse_file_has_no_blocks(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=1 << 40, sparse=True) as m:
        assert len(m) == 1 << 40
        assert (directory / "a").stat().st_blocks == 0
        m[(1 << 40) - 1] = 1
        await m.persist((1 << 40) - 1, 1)
        assert 0 < (directory / "a").stat().st_blocks * 512 < 1 << 20


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "umask", "expected"), [(None, 0, 0o600), (0o666, 0o022, 0o644), (0o640, 0o077, 0o600), (0o644, 0, 0o644)]
)
async def test_a_new_file_has_the_permissions_that_mode_and_umask_leave(
    directory: Path, mode: int | None, umask: int, expected: int
) -> None:
    before = os.umask(umask)
    try:
        opening = apmem2.open(directory / "a", size=1) if mode is None else apmem2.open(directory / "a", 1, mode=mode)
        async with opening:
            assert stat.S_IMODE((directory / "a").stat().st_mode) == expected
    finally:
        os.umask(before)


@pytest.mark.asyncio
async def test_a_new_name_is_durable_after_its_bytes_and_before_the_map_is_given_out(
    directory: Path, recorder: Recorder
) -> None:
    """Law 15, which ext4 and xfs would not let a crash show: the order of calls is what can be seen."""
    async with apmem2.open(directory / "a", size=1 << 20):
        opened = recorder.mark()
    events = [event for event in recorder.events() if event.result >= 0]
    (link,) = [event for event in events if event.name == "link"]
    inode = (directory / "a").stat().st_ino
    filled = max(event.ended for event in events if event.name.startswith("pwrite") and event.begun < opened)
    synced = [event for event in events if event.name in ("fsync", "fdatasync") and event.begun > filled]
    assert any(event.ended < link.begun for event in synced), inode
    names = [event for event in events if event.name == "fsync_directory" and event.begun > link.ended]
    assert any(event.ended < opened for event in names)


@pytest.mark.asyncio
async def test_an_existing_file_and_its_name_are_durable_before_the_map_is_given_out(
    directory: Path, recorder: Recorder
) -> None:
    """Whoever made it may never have asked (law 15)."""
    (directory / "a").write_bytes(b"12345")
    async with apmem2.open(directory / "a"):
        opened = recorder.mark()
    ended = [event.name for event in recorder.events() if event.ended < opened and event.result >= 0]
    assert "fsync" in ended
    assert "fsync_directory" in ended


@pytest.mark.asyncio
@pytest.mark.parametrize("plain", [False, True])
async def test_a_new_file_is_invisible_until_it_is_whole(directory: Path, faults: Faults, plain: bool) -> None:
    """Law 15; plain: where O_TMPFILE is unknown (law 16)."""
    if plain:
        faults.fail("tmpfile", errno.EOPNOTSUPP, count=100)
    faults.hold("link")
    task = asyncio.ensure_future(_open_and_close(directory / "a", 12345))
    await faults.held()
    assert not (directory / "a").exists()
    faults.release()
    await task
    assert [path.name for path in directory.iterdir()] == ["a"]
    assert (directory / "a").read_bytes() == bytes(12345)


async def _open_and_close(path: Path, size: int) -> int:
    async with apmem2.open(path, size=size) as m:
        return len(m)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("tmpfile", errno.EOPNOTSUPP),
        ("tmpfile", errno.EISDIR),
        ("tmpfile", errno.ENOSYS),
        ("fallocate", errno.EOPNOTSUPP),
        ("fallocate", errno.ENOSYS),
        ("fallocate", errno.EPERM),
        ("sync_file_range", errno.ENOSYS),
        ("fadvise", errno.ENOSYS),
        ("madvise", errno.EINVAL),
        ("mmap_sync", errno.EINVAL),
        ("query", errno.ENOTTY),
    ],
)
async def test_a_file_is_made_the_plain_way_where_a_trick_is_unknown(
    directory: Path, faults: Faults, call: str, number: int
) -> None:
    """Law 16."""
    faults.fail(call, number, count=1000)
    async with apmem2.open(directory / "a", size=12345) as m:
        await m.memcpy(5, b"hello")
    assert (directory / "a").read_bytes() == bytes(5) + b"hello" + bytes(12335)
    assert [path.name for path in directory.iterdir()] == ["a"]
    assert stat.S_IMODE((directory / "a").stat().st_mode) == 0o600


@pytest.mark.asyncio
async def test_two_openers_of_a_missing_file_get_the_same_file(directory: Path, faults: Faults) -> None:
    """Both find it missing and make one; the name goes to the first, the second finds EEXIST and takes that file."""
    faults.hold("link")
    tasks = [asyncio.ensure_future(_held_open(directory / "a", 5000)) for _ in range(2)]
    await faults.held(2)
    faults.release()
    first, second = await asyncio.gather(*tasks)
    try:
        first[0] = 7
        assert second[0] == 7
        assert len(descriptors(directory / "a")) == 1
        assert [path.name for path in directory.iterdir()] == ["a"]
    finally:
        await first.aclose()
        await second.aclose()


async def _held_open(path: Path, size: int) -> apmem2.Map:
    return await apmem2.open(path, size=size)


@pytest.mark.asyncio
async def test_the_slower_of_two_openers_is_told_of_another_size(directory: Path, faults: Faults) -> None:
    faults.hold("link")
    tasks = [asyncio.ensure_future(_open_and_close(directory / "a", size)) for size in (5000, 6000)]
    await faults.held(2)
    faults.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    (made,) = [result for result in results if isinstance(result, int)]
    (refused,) = [result for result in results if not isinstance(result, int)]
    assert isinstance(refused, apmem2.SizeMismatchError)
    assert refused.found == made == (directory / "a").stat().st_size


# ---- an existing file ----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [None, 5000])
async def test_an_existing_file_is_taken_as_it_is(directory: Path, size: int | None) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    async with apmem2.open(directory / "a", size) as m:
        assert len(m) == 5000
        assert bytes(m.view) == b"x" * 5000


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [4999, 5001])
async def test_another_size_than_the_files_is_refused(directory: Path, size: int) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    before = all_descriptors()
    with pytest.raises(apmem2.SizeMismatchError) as caught:
        await apmem2.open(directory / "a", size=size)
    assert (caught.value.expected, caught.value.found) == (size, 5000)
    assert caught.value.code == apmem2.ErrorCode.SIZE_MISMATCH
    assert (directory / "a").read_bytes() == b"x" * 5000
    await only(before)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [5001, PAGE * 3, 100_000])
@pytest.mark.parametrize("sparse", [False, True])
async def test_a_file_grows_when_it_may_and_keeps_its_bytes(directory: Path, size: int, sparse: bool) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    async with apmem2.open(directory / "a", size=size, grow=True, sparse=sparse) as m:
        assert len(m) == size
        assert bytes(m.view) == b"x" * 5000 + bytes(size - 5000)
    assert (directory / "a").read_bytes() == b"x" * 5000 + bytes(size - 5000)


@pytest.mark.asyncio
async def test_a_file_is_never_cut(directory: Path) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    with pytest.raises(apmem2.SizeMismatchError, match="never cut"):
        await apmem2.open(directory / "a", size=4000, grow=True)
    assert (directory / "a").read_bytes() == b"x" * 5000


@pytest.mark.asyncio
async def test_an_empty_file_is_opened_only_by_growing_it(directory: Path) -> None:
    (directory / "a").touch()
    with pytest.raises(apmem2.OutOfRangeError, match="empty"):
        await apmem2.open(directory / "a")
    with pytest.raises(apmem2.SizeMismatchError):
        await apmem2.open(directory / "a", size=10)
    async with apmem2.open(directory / "a", size=10, grow=True) as m:
        assert bytes(m.view) == bytes(10)


@pytest.mark.asyncio
async def test_a_grown_size_is_durable_before_the_map_is_given_out(directory: Path, recorder: Recorder) -> None:
    """Law 15: growth, then fsync."""
    (directory / "a").write_bytes(b"x" * 5000)
    async with apmem2.open(directory / "a", size=1 << 20, grow=True):
        opened = recorder.mark()
    events = [event for event in recorder.events() if event.ended < opened]
    grown = max(event.ended for event in events if event.name in ("fallocate", "pwrite", "ftruncate"))
    assert any(event.name in ("fsync", "fdatasync") and event.begun > grown for event in events)


@pytest.mark.asyncio
async def test_clean_cached_pages_are_dropped_unless_they_are_to_be_kept(directory: Path) -> None:
    """They may be large folios, which turn a one-page persist into a megabyte of writing."""
    write_durably(directory / "a", b"x" * (64 * PAGE))
    assert cached_pages(directory / "a") == 64
    async with apmem2.open(directory / "a", keep_cache=True):
        assert cached_pages(directory / "a") == 64
    async with apmem2.open(directory / "a"):
        assert cached_pages(directory / "a") == 0


@pytest.mark.asyncio
async def test_populate_reads_the_file_in(directory: Path) -> None:
    write_durably(directory / "a", b"x" * (64 * PAGE))
    async with apmem2.open(directory / "a", populate=True):
        assert cached_pages(directory / "a") == 64


# ---- the arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 1 << 63, 1 << 64])
def test_a_size_that_no_file_has_is_refused_at_once(directory: Path, size: int) -> None:
    with pytest.raises(apmem2.OutOfRangeError):
        apmem2.open(directory / "a", size=size)


@pytest.mark.parametrize("size", [1.0, "5", b"5"])
def test_a_size_that_is_no_number_is_a_type_error(directory: Path, size: object) -> None:
    with pytest.raises(TypeError):
        apmem2.open(directory / "a", size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [b"a", 5, None])
def test_a_path_is_a_string_or_path_like(path: object) -> None:
    with pytest.raises(TypeError):
        apmem2.open(path, size=1)  # type: ignore[arg-type]


def test_a_path_with_a_null_byte_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="null"):
        apmem2.open("a\0b", size=1)


@pytest.mark.asyncio
async def test_a_size_beyond_what_the_file_system_can_hold_leaves_nothing(directory: Path) -> None:
    with pytest.raises(apmem2.OpenError) as caught:
        await apmem2.open(directory / "a", size=(1 << 63) - 1)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert list(directory.iterdir()) == []


@pytest.mark.asyncio
async def test_a_path_may_be_relative_a_string_or_surrogates(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    for name in ("plain", "ünï", os.fsdecode(b"\xff\xfe")):
        async with apmem2.open(name, size=3) as m:
            await m.memcpy(0, b"abc")
        assert Path(name).read_bytes() == b"abc"


@pytest.mark.asyncio
@pytest.mark.parametrize("granularity", [apmem2.Granularity.BYTE, apmem2.Granularity.CACHE_LINE])
async def test_a_finer_granularity_than_a_disk_grants_is_refused(
    directory: Path, granularity: apmem2.Granularity
) -> None:
    (directory / "a").write_bytes(b"x")
    before = all_descriptors()
    with pytest.raises(apmem2.GranularityNotSupportedError, match="PAGE is granted"):
        await apmem2.open(directory / "a", required_granularity=granularity)
    await only(before)


# ---- awaited or entered, once --------------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_opening_is_awaited_once(directory: Path) -> None:
    opening = apmem2.open(directory / "a", size=1)
    m = await opening
    with pytest.raises(RuntimeError, match="awaited or entered already"):
        await opening
    with pytest.raises(RuntimeError, match="awaited or entered already"):
        async with opening:
            raise AssertionError
    assert not m.closed
    await m.aclose()


@pytest.mark.asyncio
async def test_an_opening_is_entered_once(directory: Path) -> None:
    opening = apmem2.open(directory / "a", size=1)
    async with opening as m:
        with pytest.raises(RuntimeError):
            await opening
        assert not m.closed
    with pytest.raises(RuntimeError):
        async with opening:
            raise AssertionError


@pytest.mark.asyncio
async def test_leaving_the_block_closes_the_map_and_lets_the_error_through(directory: Path) -> None:
    with pytest.raises(LookupError):
        async with apmem2.open(directory / "a", size=1) as m:
            raise LookupError
    assert m.closed


@pytest.mark.asyncio
async def test_an_opened_map_is_closed_by_its_own_block(directory: Path) -> None:
    m = await apmem2.open(directory / "a", size=1)
    async with m as same:
        assert same is m
    assert m.closed
    with pytest.raises(apmem2.ClosedError):
        async with m:
            raise AssertionError


def test_an_opening_that_is_never_awaited_warns_and_does_nothing(directory: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"apmem2\.open\(\.\.\.\) was never awaited"):
        apmem2.open(directory / "a", size=1)
    assert list(directory.iterdir()) == []


# ---- what stands there instead of a file ---------------------------------------------------------


@pytest.mark.asyncio
async def test_a_missing_directory_is_a_missing_file(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await apmem2.open(directory / "b" / "a", size=5)
    assert list(directory.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("tail", ["", "/", "/.", "/.."])
async def test_a_directory_is_refused(directory: Path, size: int | None, tail: str) -> None:
    (directory / "b").mkdir()
    with pytest.raises(IsADirectoryError):
        await apmem2.open(f"{directory}/b{tail}", size)


@pytest.mark.asyncio
async def test_a_path_through_a_file_is_refused(directory: Path) -> None:
    (directory / "b").write_bytes(b"x")
    with pytest.raises(NotADirectoryError):
        await apmem2.open(directory / "b" / "a", size=5)


@pytest.mark.asyncio
async def test_an_empty_path_is_missing() -> None:
    with pytest.raises(FileNotFoundError):
        await apmem2.open("", size=5)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [None, 5])
async def test_a_pipe_is_refused_without_waiting_for_its_other_end(directory: Path, size: int | None) -> None:
    os.mkfifo(directory / "a")
    with pytest.raises(apmem2.InvalidSourceError) as caught:
        await apmem2.open(directory / "a", size)
    assert caught.value.code == apmem2.ErrorCode.INVALID_FILE_TYPE


@pytest.mark.asyncio
async def test_a_socket_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a")
        with pytest.raises(apmem2.InvalidSourceError):
            await apmem2.open("a", size=5)


@pytest.mark.asyncio
async def test_a_device_is_refused() -> None:
    with pytest.raises(apmem2.InvalidSourceError):
        await apmem2.open("/dev/zero", size=PAGE, allow_foreign_owner=True)


@pytest.mark.asyncio
@pytest.mark.parametrize("dangling", [False, True])
async def test_a_symbolic_link_is_not_followed(directory: Path, dangling: bool) -> None:
    if not dangling:
        (directory / "b").write_bytes(b"x")
    (directory / "a").symlink_to("b")
    with pytest.raises(apmem2.OpenError, match="not followed") as caught:
        await apmem2.open(directory / "a", size=1)
    assert caught.value.errno == errno.ELOOP
    assert (directory / "b").exists() != dangling


@pytest.mark.asyncio
@needs_root
async def test_another_users_file_is_refused_unless_it_is_meant(directory: Path) -> None:
    (directory / "a").write_bytes(b"x")
    os.chown(directory / "a", 65534, 65534)
    with pytest.raises(apmem2.AccessError) as caught:
        await apmem2.open(directory / "a")
    assert caught.value.code == apmem2.ErrorCode.FOREIGN_OWNER
    assert "allow_foreign_owner" in caught.value.hint
    async with apmem2.open(directory / "a", allow_foreign_owner=True) as m:
        assert m[0] == ord("x")


@needs_root
def test_a_file_that_may_only_be_read_is_refused_but_can_be_mapped_for_reading(
    directory: Path, run_program: Program
) -> None:
    directory.chmod(0o777)
    run_program(
        """
import asyncio, os
import apmem2
from apmem2 import Granularity, Protection, Source

os.setgid(65534)
os.setuid(65534)

async def main():
    with open("a", "wb") as file:
        file.write(b"hello")
    os.chmod("a", 0o400)
    try:
        await apmem2.open("a")
        raise AssertionError("opened")
    except PermissionError as error:
        assert isinstance(error, apmem2.FileAccessError), error
        assert "Protection.READ" in str(error), error
    async with apmem2.map_new(
        Source.from_path("a"), required_granularity=Granularity.PAGE, protection=Protection.READ
    ) as m:
        assert bytes(m.view) == b"hello"
    os.mkdir("closed", 0o500)
    try:
        await apmem2.open("closed/b", size=5)
        raise AssertionError("made")
    except apmem2.FileAccessError:
        pass

asyncio.run(main())
""",
    )


# ---- a full disk, and calls that fail ------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(where)], check=False)
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.asyncio
@needs_root
@pytest.mark.parametrize("plain", [False, True])
async def test_a_full_disk_at_creation_is_an_error_and_leaves_nothing(
    small_disk: Path, faults: Faults, plain: bool
) -> None:
    """Here, and not as SIGBUS at the first store. plain: neither fallocate nor O_TMPFILE."""
    if plain:
        faults.fail("fallocate", errno.EOPNOTSUPP, count=100)
        faults.fail("tmpfile", errno.EOPNOTSUPP, count=100)
    before, free = all_descriptors(), os.statvfs(small_disk).f_bfree
    with pytest.raises(apmem2.OpenError) as caught:
        await apmem2.open(small_disk / "a", size=1 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "a")
    assert list(small_disk.iterdir()) == []
    assert os.statvfs(small_disk).f_bfree == free
    await only(before)


@pytest.mark.asyncio
@needs_root
async def test_a_full_disk_at_growth_is_an_error_and_leaves_the_file_as_it_was(small_disk: Path) -> None:
    (small_disk / "a").write_bytes(b"x" * 5000)
    with pytest.raises(apmem2.OpenError) as caught:
        await apmem2.open(small_disk / "a", size=1 << 20, grow=True)
    assert caught.value.errno == errno.ENOSPC
    assert (small_disk / "a").read_bytes() == b"x" * 5000


_CREATING = [
    *("malloc", "open", "fstat", "fallocate", "ftruncate", "mmap", "fsync", "fdatasync", "sync_file_range", "pwrite"),
    *("pwrite_dsync", "link", "unlink", "tmpfile", "fadvise", "madvise", "query", "fsync_directory", "mmap_sync"),
    "mincore",
]


@pytest.mark.asyncio
@pytest.mark.parametrize("call", _CREATING)
async def test_a_file_is_whole_or_absent_whichever_call_of_its_creation_fails(
    directory: Path, faults: Faults, call: str
) -> None:
    """The nth call of this kind fails, n = 1, 2, … until none is left to fail."""
    async with apmem2.open(directory / "warm", size=1):
        pass  # the runtime is up: what is open now stays open
    before = all_descriptors()
    for nth in range(1, 50):
        path = directory / f"file-{nth}"
        faults.clear()
        faults.fail(call, errno.EIO, nth=nth)
        try:
            async with apmem2.open(path, size=12345) as m:
                assert bytes(m.view) == bytes(12345)
        except (apmem2.PmemError, MemoryError):
            pass
        made = faults.calls(call)
        faults.clear()
        await idle()
        if path.exists():
            assert path.stat().st_size == 12345
        assert {found.name for found in directory.iterdir()} <= {f"file-{n}" for n in range(1, nth + 1)} | {"warm"}
        assert apmem2.mappings() == []
        await only(before)
        async with apmem2.open(path, size=12345) as m:
            assert bytes(m.view) == bytes(12345)
        if made < nth:
            return
    raise AssertionError("creation makes more calls of this kind than were tried")


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["fallocate", "pwrite", "fsync", "sync_file_range"])
async def test_a_file_that_could_not_grow_is_what_it_was(directory: Path, faults: Faults, call: str) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    # Open elsewhere all the while, but not for a failed sync: that fails the file until all of it is closed (law 4).
    async with contextlib.nullcontext() if call == "fsync" else apmem2.open(directory / "a"):
        for nth in range(1, 50):
            faults.clear()
            faults.fail(call, errno.EIO, nth=nth)
            refused = False
            try:
                await _grow(directory / "a", 100_000)
            except apmem2.PmemError:
                refused = True
            made = faults.calls(call)
            faults.clear()
            if made < nth:
                break
            if refused and call == "fallocate":
                assert (directory / "a").read_bytes() == b"x" * 5000
            elif refused:  # it may be longer, and stays so: another process may have mapped the new bytes by now
                found = (directory / "a").read_bytes()
                assert found[:5000] == b"x" * 5000
                assert not any(found[5000:])
                if call != "fsync":
                    os.truncate(directory / "a", 5000)
            else:
                os.truncate(directory / "a", 5000)
    assert (directory / "a").read_bytes() == b"x" * 5000 + bytes(95_000)


async def _grow(path: Path, size: int) -> None:
    async with apmem2.open(path, size=size, grow=True):
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize("plain", [False, True])
async def test_an_opening_that_is_cancelled_while_it_allocates_leaves_nothing(
    directory: Path, faults: Faults, plain: bool
) -> None:
    """The waiter gets its cancellation at once; the work stops at its next piece."""
    if plain:
        faults.fail("tmpfile", errno.EOPNOTSUPP, count=100)
    before = all_descriptors()
    faults.hold("fallocate")
    task = asyncio.ensure_future(_open_and_close(directory / "a", 1 << 20))
    await faults.held()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    faults.release()
    await idle()
    assert list(directory.iterdir()) == []
    await only(before)


@pytest.mark.asyncio
async def test_growth_that_is_cancelled_leaves_the_file_as_it_was(directory: Path, faults: Faults) -> None:
    (directory / "a").write_bytes(b"x" * 5000)
    faults.hold("fallocate")
    task = asyncio.ensure_future(_grow(directory / "a", 1 << 20))
    await faults.held()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    faults.release()
    await idle()
    assert (directory / "a").read_bytes() == b"x" * 5000


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["open", "tmpfile", "fsync", "link", "fsync_directory", "mmap", "fadvise", "madvise"])
async def test_an_opening_that_is_cancelled_anywhere_leaves_a_whole_file_or_none(
    directory: Path, faults: Faults, call: str
) -> None:
    """And no map, no mapping, no descriptor: what was made for a waiter who has gone is taken back."""
    async with apmem2.open(directory / "warm", size=1):
        pass
    before = all_descriptors()
    faults.hold(call)
    task = asyncio.ensure_future(_open_and_close(directory / "a", 12345))
    await faults.held()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    faults.release()
    await idle()
    assert {path.name for path in directory.iterdir()} <= {"warm", "a"}
    if (directory / "a").exists():
        assert (directory / "a").stat().st_size == 12345
    await only(before)
    if (directory / "a").exists():
        inode = (directory / "a").stat().st_ino
        await until(lambda: not is_mapped(inode))


@pytest.mark.asyncio
async def test_an_opening_that_is_cancelled_before_it_began_does_nothing(directory: Path, recorder: Recorder) -> None:
    """Promise 4: nothing is submitted for work that has not begun; its tick has not ended yet here."""
    async with apmem2.open(directory / "warm", size=1):
        pass
    submitted, mark = apmem2.statistics().submitted, recorder.mark()
    task = asyncio.ensure_future(_open_and_close(directory / "a", 5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle()
    assert [event for event in recorder.events() if event.begun > mark and event.name != "close"] == []
    assert apmem2.statistics().submitted == submitted
    assert [path.name for path in directory.iterdir()] == ["warm"]


@pytest.mark.asyncio
async def test_an_opening_that_is_cancelled_while_it_populates_closes_the_map(directory: Path, faults: Faults) -> None:
    write_durably(directory / "a", b"x" * (64 * PAGE))

    async def use() -> None:
        async with apmem2.open(directory / "a", populate=True, keep_cache=True):
            raise AssertionError("opened")

    faults.hold("fadvise")  # with keep_cache the only advice about the file is the reading in
    task = asyncio.ensure_future(use())
    await faults.held()
    task.cancel()
    await until(lambda: apmem2.mappings()[0].closed)
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert apmem2.mappings() == []
    assert descriptors(directory / "a") == []


# ---- descriptors and locks -----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_all_maps_of_a_file_share_one_description_whatever_its_name(directory: Path) -> None:
    """Law 13: a failed write-back is told once for each description."""
    async with apmem2.open(directory / "a", size=5) as first:
        assert len(descriptors(directory / "a")) == 1
        os.link(directory / "a", directory / "b")
        async with apmem2.open(directory / "b") as second:
            assert len(descriptors(directory / "a")) == 1
            first[0] = 1
            assert second[0] == 1
        assert len(descriptors(directory / "a")) == 1
        await first.persist()
    assert descriptors(directory / "a") == []


@pytest.mark.asyncio
async def test_a_closed_map_leaves_no_descriptor_and_no_mapping(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=5):
        assert is_mapped((directory / "a").stat().st_ino)
    assert descriptors(directory / "a") == []
    assert not is_mapped((directory / "a").stat().st_ino)


@pytest.mark.asyncio
async def test_no_descriptor_of_ours_survives_an_exec(directory: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with apmem2.open(directory / "a", size=5) as m:
        await m.persist()
        ours = set(os.listdir("/proc/self/fd")) - before
        checked = 0
        for word in ours:
            with contextlib.suppress(OSError):
                assert fcntl.fcntl(int(word), fcntl.F_GETFD) & fcntl.FD_CLOEXEC, os.readlink(f"/proc/self/fd/{word}")
                checked += 1
        assert checked >= 1
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in descriptors(directory / "a"))


_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except BlockingIOError:
        print("held")
"""


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["closed", "refused", "taken while open", "by descriptor", "adopted"])
async def test_a_fcntl_lock_of_this_process_outlives_our_use_of_the_file(
    directory: Path, run_program: Program, how: str
) -> None:
    """Law 13: closing any descriptor of a file drops all fcntl locks held on it, SQLite's and LMDB's among them."""
    path = directory / "a"
    path.write_bytes(b"x" * 5000)
    with path.open("r+b") as owner, mmap.mmap(owner.fileno(), 0) as memory:
        if how != "taken while open":
            fcntl.lockf(owner, fcntl.LOCK_EX)
        if how == "refused":
            with pytest.raises(apmem2.SizeMismatchError):
                await apmem2.open(path, size=1)
        elif how == "by descriptor":
            source = apmem2.Source.from_fd(owner.fileno())
            async with apmem2.map_new(source, required_granularity=apmem2.Granularity.PAGE):
                pass
            del source
        elif how == "adopted":
            async with apmem2.map_from_existing(memory) as m:
                await m.persist()
            del m
        else:
            async with apmem2.open(path) as m:
                if how == "taken while open":
                    fcntl.lockf(owner, fcntl.LOCK_EX)
                await m.persist()
            del m
        await idle()
        assert run_program(_TRY_LOCK, str(path)).stdout.strip() == "held"
        async with apmem2.open(path):
            pass  # and again, now that a description was left open
        assert run_program(_TRY_LOCK, str(path)).stdout.strip() == "held"
    assert run_program(_TRY_LOCK, str(path)).stdout.strip() == "free"
