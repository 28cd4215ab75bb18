"""The rig itself: what ``FaultyDisk`` says about the disk is so, and the kernel behaves on it as it does on a bad disk.

The tests of failed write-back are the project's negative control: they show the kernel calling lost bytes durable,
which is the reason for the rule "after a failed sync the file is failed until it is opened anew, past the cache".
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .disk import MIB, BlockDisk, DiskControl, FaultyDisk, LoopDisk, requirements

REASON = requirements("ext4", "xfs", "btrfs")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

PAGE = 4096
EIO_TEXT = os.strerror(errno.EIO)
OLD, NEW = b"o" * PAGE, b"N" * PAGE
EVERY_KIND = ["ext4", "ext4-nojournal", "xfs", "btrfs"]


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    with FaultyDisk(keep_data=True) as disk:
        yield disk


def make_file(directory: Path, pages: int = 16, name: str = "file") -> Path:
    """A file full of OLD whose pages are in small folios, durable with its name, and closed."""
    path = directory / name
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    for page in range(pages):
        os.pwrite(fd, OLD, page * PAGE)
    os.fsync(fd)
    os.close(fd)
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return path


def sync_error(fd: int) -> int:
    """The errno of an fdatasync, 0 if it said ok."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error.errno or -1
    return 0


# -- the disk says what is so


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_was_synced_is_on_the_disk_at_its_extent(disk: FaultyDisk, kind: str) -> None:
    disk.mkfs(kind)
    path = make_file(disk.mount())
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), NEW, 5 * PAGE)
        if kind != "btrfs":  # which writes it elsewhere, so that its new place is known after the sync only
            assert disk.read_raw(disk.extent_of(path, 5 * PAGE), PAGE) == OLD
        os.fsync(file.fileno())
    assert disk.read_raw(disk.extent_of(path, 5 * PAGE), PAGE) == NEW
    assert disk.read_raw(disk.extent_of(path, 6 * PAGE), PAGE) == OLD
    assert disk.extent_of(path, 5 * PAGE + 7) == disk.extent_of(path, 5 * PAGE) + 7


def test_a_byte_that_was_never_written_back_has_no_extent(disk: FaultyDisk) -> None:
    disk.mkfs("ext4")
    path = disk.mount() / "file"
    path.write_bytes(b"not synced")
    with pytest.raises(ValueError, match="write and fsync it first"):
        disk.extent_of(path, 0)


def test_the_log_has_write_then_flush_then_the_promise(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, PAGE)
    start = disk.trim_log()
    before = disk.counters()
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), NEW, PAGE)
        os.fdatasync(file.fileno())
        number = disk.marker(b"promise 1")
    log = [entry for entry in disk.log(start) if entry.offset == where or entry.kind != "write"]
    assert [entry.kind for entry in log] == ["write", "flush", "marker"]
    assert (log[0].offset, log[0].length, log[0].data) == (where, PAGE, NEW)
    assert (log[2].number, log[2].data) == (number, b"promise 1")
    after = disk.counters()
    assert after.flushes - before.flushes == 1
    assert after.write_bytes - before.write_bytes == sum(e.length for e in disk.log() if e.kind == "write")


@pytest.mark.parametrize(("kind", "mib"), [("ext4", 32), ("ext4-nojournal", 32), ("xfs", 320), ("btrfs", 128)])
def test_the_log_replayed_is_the_disk(kind: str, mib: int) -> None:
    """Nothing changes the disk that is not in the log: crash images may be computed from it."""
    with FaultyDisk(mib * MIB, keep_data=True) as disk:
        disk.mkfs(kind)
        make_file(disk.mount(), pages=64).unlink()
        disk.umount()
        image = bytearray(disk.size)
        for entry in disk.log():
            if entry.kind in ("write", "zero"):
                data = entry.data if entry.kind == "write" else bytes(entry.length)
                image[entry.offset : entry.offset + entry.length] = data
        for start in range(0, disk.size, 16 * MIB):
            assert disk.read_raw(start, 16 * MIB) == image[start : start + 16 * MIB]


def test_the_kernel_counts_the_flushes_that_the_disk_counts(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    before, before_kernel = disk.counters(), disk.stat()
    with open(path, "r+b", buffering=0) as file:
        for page in range(16):
            os.pwrite(file.fileno(), NEW, page * PAGE)
            os.fdatasync(file.fileno())
    after, after_kernel = disk.counters(), disk.stat()
    assert after.flushes - before.flushes == 16
    assert after_kernel.flushes - before_kernel.flushes == 16
    kernel_bytes = (after_kernel.sectors_written - before_kernel.sectors_written) * 512
    assert kernel_bytes == after.write_bytes - before.write_bytes


@pytest.mark.parametrize("request_number", [0x1277, 0x127F], ids=["BLKDISCARD", "BLKZEROOUT"])
def test_what_is_discarded_or_zeroed_is_zero_and_in_the_log(request_number: int) -> None:
    with FaultyDisk(MIB) as disk, open(disk.device, "r+b", buffering=0) as device:
        device.write(NEW * 4)
        os.fsync(device.fileno())
        start = disk.trim_log()
        fcntl.ioctl(device, request_number, struct.pack("=QQ", PAGE, 2 * PAGE))
        assert disk.read_raw(0, 4 * PAGE) == NEW + bytes(2 * PAGE) + NEW
        assert [(e.kind, e.offset, e.length) for e in disk.log(start)] == [("zero", PAGE, 2 * PAGE)]
        disk.fail_writes()
        with pytest.raises(OSError, match=EIO_TEXT):
            fcntl.ioctl(device, request_number, struct.pack("=QQ", 0, PAGE))
        assert disk.read_raw(0, PAGE) == NEW


# -- a failed write-back: the kernel tells it once, and then lies


@pytest.mark.parametrize("kind", ["ext4", "ext4-nojournal", "xfs"])
def test_after_a_failed_write_back_the_second_flush_says_ok_and_the_disk_is_old(disk: FaultyDisk, kind: str) -> None:
    disk.mkfs(kind)
    path = make_file(disk.mount())
    where = disk.extent_of(path, 3 * PAGE)
    disk.fail_writes(where, where + PAGE - 1)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[3 * PAGE : 4 * PAGE] = NEW
        with pytest.raises(OSError, match=EIO_TEXT) as caught:
            mapped.flush()
        assert caught.value.errno == errno.EIO
        assert disk.counters().failed_writes == 1
        mapped.flush()  # says ok, and has not even tried:
        assert disk.counters().failed_writes == 1
        assert mapped[3 * PAGE : 4 * PAGE] == NEW
        assert disk.read_raw(where, PAGE) == OLD
    assert disk.read_raw(where, PAGE) == OLD


@pytest.mark.parametrize("kind", ["ext4", "ext4-nojournal", "xfs"])
def test_a_file_opened_anew_shows_bytes_that_the_disk_has_not(disk: FaultyDisk, kind: str) -> None:
    disk.mkfs(kind)
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    disk.fail_writes(where, where + PAGE - 1, count=1)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:PAGE] = NEW
        with pytest.raises(OSError, match=EIO_TEXT):
            mapped.flush()
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pread(fd, PAGE, 0) == NEW
        assert sync_error(fd) == 0
        assert disk.read_raw(where, PAGE) == OLD
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, PAGE, 0) == OLD
    finally:
        os.close(fd)


def test_a_full_disk_says_so(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    disk.fail_writes(where, where, errno=errno.ENOSPC)
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), NEW, 0)
        assert sync_error(file.fileno()) == errno.ENOSPC
        assert sync_error(file.fileno()) == 0


def test_a_rule_lets_some_pass_and_is_used_up(disk: FaultyDisk) -> None:
    """This is how "every outside call fails once, n = 1, 2, …" is done."""
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    disk.fail_writes(where, where + PAGE - 1, skip=1, count=1)
    outcomes = []
    with open(path, "r+b", buffering=0) as file:
        for _ in range(4):
            os.pwrite(file.fileno(), NEW, 0)
            outcomes.append(sync_error(file.fileno()))
    assert outcomes == [0, errno.EIO, 0, 0]


def test_a_failed_read_is_an_error_until_it_is_cleared(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        rule = disk.fail_reads(where, where + PAGE - 1)
        with pytest.raises(OSError, match=EIO_TEXT) as caught:
            os.pread(fd, PAGE, 0)
        assert caught.value.errno == errno.EIO
        disk.clear(rule)
        assert os.pread(fd, PAGE, 0) == OLD
    finally:
        os.close(fd)


# -- flushes


@pytest.mark.parametrize("kind", ["ext4-nojournal", "xfs"])
def test_a_failed_flush_of_the_disk_is_told_once(disk: FaultyDisk, kind: str) -> None:
    disk.mkfs(kind)
    path = make_file(disk.mount())
    disk.fail_flushes(count=1)
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), NEW, 0)
        assert sync_error(file.fileno()) == errno.EIO
        assert disk.counters().failed_flushes == 1
        assert sync_error(file.fileno()) == 0


def test_enosys_for_a_flush_is_refused(disk: FaultyDisk) -> None:
    with pytest.raises(ValueError, match="never send one again"):
        disk.fail_flushes(errno=errno.ENOSYS)


# -- a disk that hangs


def test_a_sync_waits_for_the_flush_that_is_held(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        os.pwrite(file.fileno(), NEW, 0)
        disk.hold("flush")
        before = disk.counters().flushes
        outcome = pool.submit(sync_error, file.fileno())
        disk.wait_for("held")
        assert not outcome.done()
        assert disk.counters().flushes == before
        assert disk.release() == 1
        assert outcome.result(10) == 0
        assert disk.counters().held == 0


def test_what_is_held_can_be_failed(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        os.pwrite(file.fileno(), NEW, 0)
        disk.hold("write", where, where)
        outcome = pool.submit(sync_error, file.fileno())
        disk.wait_for("held")
        disk.release(errno.EIO)
        assert outcome.result(10) == errno.EIO
        assert disk.read_raw(where, PAGE) == OLD


def test_a_held_write_stops_nobody_else_and_arrives_as_it_was(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    other = make_file(path.parent, name="other")
    where = disk.extent_of(path, 0)
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        os.pwrite(file.fileno(), NEW, 0)
        disk.hold("write", where, where)
        outcome = pool.submit(sync_error, file.fileno())
        disk.wait_for("held")
        with open(other, "r+b", buffering=0) as another:
            os.pwrite(another.fileno(), b"?" * PAGE, 0)
            assert sync_error(another.fileno()) == 0
        assert disk.read_raw(disk.extent_of(other), PAGE) == b"?" * PAGE
        assert not outcome.done()
        assert disk.read_raw(where, PAGE) == OLD
        disk.release()
        assert outcome.result(10) == 0
    assert disk.read_raw(where, PAGE) == NEW


def test_a_slow_write_is_slow_and_arrives(disk: FaultyDisk) -> None:
    disk.mkfs("ext4-nojournal")
    path = make_file(disk.mount())
    where = disk.extent_of(path, 0)
    disk.delay("write", 0.05, where, where, count=1)
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), NEW, 0)
        assert sync_error(file.fileno()) == 0
    assert disk.read_raw(where, PAGE) == NEW


# -- other ways to use it


def test_the_image_itself_can_be_mapped_without_a_file_system() -> None:
    with (
        FaultyDisk(MIB, cached=True) as disk,
        open(disk.image, "r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
    ):
        mapped[PAGE : 2 * PAGE] = NEW
        mapped.flush(PAGE, PAGE)
        assert disk.read_raw(PAGE, PAGE) == NEW
        assert disk.counters().flushes == 1
        disk.fail_writes(0, 0)
        mapped[:PAGE] = NEW
        with pytest.raises(OSError, match=EIO_TEXT):
            mapped.flush()
        assert disk.read_raw(0, PAGE) == bytes(PAGE)


def test_the_image_below_a_file_system_is_not_cached(disk: FaultyDisk) -> None:
    """Else a write to the loop device might wait in a second cache and never come to the disk."""
    with open(disk.image, "r+b") as file, pytest.raises(OSError, match="No such device"):
        mmap.mmap(file.fileno(), 0)


def test_another_process_can_write_markers(disk: FaultyDisk) -> None:
    child = os.fork()
    if child == 0:
        try:
            DiskControl(disk.control_path).marker(b"from the child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert [entry.data for entry in disk.log() if entry.kind == "marker"] == [b"from the child"]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_plain_loop_disk_counts_sectors_and_flushes(kind: str) -> None:
    with LoopDisk(kind=kind) as disk:
        path = make_file(disk.mount_point)
        with open(path, "r+b", buffering=0) as file:
            before = disk.stat()
            for _ in range(8):
                os.pwrite(file.fileno(), NEW, 0)
                os.fdatasync(file.fileno())
            after = disk.stat()
    assert after.flushes - before.flushes >= 8
    assert after.sectors_written - before.sectors_written >= 8 * PAGE // 512


def test_a_preallocated_loop_disk_has_all_its_blocks() -> None:
    with LoopDisk(32 * MIB, "ext4-nojournal", preallocate=True) as disk:
        assert disk.image.stat().st_blocks * 512 >= 32 * MIB


def test_without_root_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reason = requirements("ext4")
    assert reason is not None
    assert reason.startswith("needs root, /dev/fuse and losetup: run as root, see .ci/run")


# -- the rig cleans up


def nothing_is_left_of(disk: BlockDisk) -> bool:
    directory = disk.mount_point.parent
    return not directory.exists() and f" {directory}/" not in Path("/proc/self/mounts").read_text()


def test_an_exception_inside_takes_everything_down() -> None:
    disk = FaultyDisk()

    def use_it() -> None:
        with disk:
            disk.mkfs("ext4")
            make_file(disk.mount())
            disk.fail_writes()
            disk.fail_flushes()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_it()
    assert nothing_is_left_of(disk)


def test_a_disk_that_hangs_and_is_in_use_is_taken_down() -> None:
    with ThreadPoolExecutor(1) as pool:
        with FaultyDisk() as disk:
            disk.mkfs("ext4-nojournal")
            left_open = os.open(make_file(disk.mount()), os.O_RDWR)
            os.pwrite(left_open, NEW, 0)
            disk.hold("write")
            outcome = pool.submit(sync_error, left_open)
            disk.wait_for("held")
        assert nothing_is_left_of(disk)
        assert outcome.result(10) == 0  # it was released, not failed
        os.close(left_open)


def test_an_unplugged_disk_fails_and_is_taken_down() -> None:
    with FaultyDisk() as disk:
        disk.mkfs("ext4-nojournal")
        path = make_file(disk.mount())
        disk.unplug()
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), NEW, 0)
            assert sync_error(file.fileno()) == errno.EIO
        with pytest.raises(ConnectionError):
            disk.counters()
    assert nothing_is_left_of(disk)


KILLED_OWNER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from media.disk import FaultyDisk, LoopDisk
faulty, plain = FaultyDisk().__enter__(), LoopDisk().__enter__()
faulty.mkfs("ext4")
faulty.mount()
print(faulty.mount_point.parent, plain.mount_point.parent, faulty.device, plain.device, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_owner_left_is_removed_by_the_next_disk() -> None:
    here = str(Path(__file__).parent.parent)
    owner = subprocess.run([sys.executable, "-c", KILLED_OWNER, here], capture_output=True, text=True, check=False)
    left = owner.stdout.split()
    assert len(left) == 4, owner.stderr
    with LoopDisk():
        pass
    mounts = Path("/proc/self/mounts").read_text()
    for directory in left[:2]:
        assert not Path(directory).exists()
        assert directory not in mounts
    for device in left[2:]:  # free, or taken by someone else: a file whose mount is gone is called just /disk
        backing = Path("/sys/block", Path(device).name, "loop", "backing_file")
        used = backing.read_text().strip() if backing.exists() else ""
        assert used != "/disk"
        assert not used.startswith(tuple(left[:2]))
