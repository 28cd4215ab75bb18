"""File systems for tests: on a disk that can fail (``FaultyDisk``), or on a plain loop device (``LoopDisk``).

Why: a promise about durability is about what the *disk* holds, and a file system answers from its page cache. Here a
test can make the disk fail, stall or tell what it holds, below a real ext4, xfs or btrfs of the host's kernel.

    with FaultyDisk() as disk:
        disk.mkfs("ext4")
        path = disk.mount() / "file"
        ...                                     # write and fsync it
        where = disk.extent_of(path, 8192)
        disk.fail_writes(where, where + 4095)   # from now on this page of the file cannot be written back
        ...
        assert disk.read_raw(where, 4096) == old

What holds here:

* Everything is undone at the end of the ``with`` block, whatever happened in it; a step that fails does not stop the
  later ones. What a killed test process leaves behind (a mount, a loop device) is removed by the next disk's start.
* A file that the test still holds open is no reason to fail: its file system is then detached lazily.
* Only processes that were started here are ended, by their own handle.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EBUSY, EIO, ENOSYS
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MIB = 1 << 20
SIZE_DEFAULT = 320 * MIB  # what mkfs.xfs asks for at least is 300 MiB; unwritten bytes cost nothing
_CALL_TIMEOUT_S = 30
_PREFIX = "apmem2-disk-"
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

# Nothing may be written behind the test's back: no lazy initialisation, no discarding of what is zero already.
_MKFS = {
    "ext4": "mkfs.ext4 -q -F -b 4096 -N 1024 -J size=4 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0",
    "ext4-nojournal": "mkfs.ext4 -q -F -b 4096 -N 1024 -O ^has_journal -E nodiscard,lazy_itable_init=0",
    "xfs": "mkfs.xfs -q -f -K",
    "btrfs": "mkfs.btrfs -q -f -K -d single -m single",
}
_MOUNT_OPTIONS = {"xfs": "nouuid"}  # copies of one image may be mounted side by side


def requirements(*kinds: str, fuse: bool = True) -> str | None:
    """None if these disks can be had here, else the reason why a test is skipped.

    ``kinds`` are the file systems that the test makes; ``fuse=False`` where ``LoopDisk`` is enough.
    """
    wanted = ["/dev/loop-control"] + (["/dev/fuse"] if fuse else [])
    tools = ["losetup", "mount", "umount"] + [_MKFS[kind].split()[0] for kind in kinds]
    missing = [name for name in wanted if not os.access(name, os.R_OK | os.W_OK)]
    missing += [tool for tool in tools if shutil.which(tool, path=_PATH) is None]
    if os.geteuid() != 0 or not _may_mount():
        missing.insert(0, "root")
    if not missing:
        return None
    devices = "/dev/fuse and losetup" if fuse else "losetup"
    return f"needs root, {devices}: run as root, see .ci/run (missing: {', '.join(missing)})"


def _may_mount() -> bool:
    """Whether we have CAP_SYS_ADMIN: root inside a container mostly has not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 21 & 1)
    return False


def _run(*command: str) -> str:
    """Run a tool; a failure carries what the tool said."""
    done = subprocess.run(command, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(EIO, f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass(frozen=True)
class DeviceStat:
    """What the kernel counts for a block device, in /sys/block/.../stat: subtract one from another. Sectors are of 512
    bytes."""

    reads: int
    sectors_read: int
    writes: int
    sectors_written: int
    flushes: int

    @classmethod
    def of(cls, device: Path) -> DeviceStat:
        """Fields 1, 3, 5, 7 and 16 of Documentation/block/stat.rst; `device` is its directory below /sys."""
        fields = [int(one) for one in (device / "stat").read_text().split()]
        return cls(fields[0], fields[2], fields[4], fields[6], fields[15] if len(fields) > 15 else 0)

    def __sub__(self, other: DeviceStat) -> DeviceStat:
        return DeviceStat(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


@contextmanager
def _owner_lock(directory: Path) -> Iterator[None]:
    """Hold a lock that says: the owner of this directory is alive. Under its name it is never unlocked before."""
    path = directory / "lock"
    with open(directory / "lock.new", "x") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, path)
        try:
            yield
        finally:
            path.unlink()


def _detach_mounts(directory: Path) -> None:
    """Detach what is still mounted below a directory, found without touching it: it may be on a dead disk."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([one for one in mounts if one.startswith(f"{directory}/")]):
        _run("umount", "-l", mount)


def _remove_leftovers() -> None:
    """Take down the disks of owners that were killed. Their servers end with them, so nothing here hangs for long."""
    for path in Path(tempfile.gettempdir()).glob(_PREFIX + "*/lock"):
        with suppress(OSError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            directory = path.parent
            files = Path("/sys/block").glob("loop*/loop/backing_file")  # their paths end with the mount: ask first
            devices = [f"/dev/{file.parts[3]}" for file in files if file.read_text().startswith(f"{directory}/")]
            _detach_mounts(directory)
            for device in devices:
                _run("losetup", "-d", device)
            for name in ("image", "control"):
                (directory / name).unlink(missing_ok=True)
            for name in ("mount", "fuse"):
                with suppress(FileNotFoundError):
                    (directory / name).rmdir()
            path.unlink()  # last but one: what fails before is tried again by the next disk
            directory.rmdir()


class BlockDisk:
    """A file as a loop device, with one file system on it: what both kinds of disk have in common."""

    def __init__(self, size: int, *, direct_io: bool = True) -> None:
        self.size = size
        self.kind: str | None = None
        self._direct_io = direct_io
        self._device: str | None = None
        self._mounted = False
        self._undo = ExitStack()
        self._directory = Path()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> None:
        _remove_leftovers()
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._undo.callback(os.rmdir, self._directory)
        self._undo.enter_context(_owner_lock(self._directory))
        self.mount_point.mkdir()
        self._undo.callback(os.rmdir, self.mount_point)

    def _close(self) -> None:
        self._undo.close()

    def _unstick(self) -> None:
        """Make hanging I/O of the device fail, because an umount waits for it."""

    @property
    def mount_point(self) -> Path:
        """Where ``mount`` mounts the file system."""
        return self._directory / "mount"

    @property
    def image(self) -> Path:
        """The file below the loop device."""
        return self._directory / "image"

    @property
    def device(self) -> str:
        """The loop device's path; attached at the first use."""
        if self._device is None:
            self._device = self._attach()
            self._undo.callback(_run, "losetup", "-d", self._device)
        return self._device

    def _attach(self) -> str:
        mode = "--direct-io=" + ("on" if self._direct_io else "off")
        for attempt in range(16):  # "find a free one, then take it" is a race with everyone else
            try:
                return _run("losetup", "--find", "--show", mode, str(self.image))
            except OSError as error:
                if attempt == 15 or os.strerror(EBUSY) not in str(error):
                    raise
        raise AssertionError("not reached")

    def mkfs(self, kind: str) -> None:
        """Make an "ext4" (with a journal), "ext4-nojournal", "xfs" or "btrfs" on the device."""
        _run(*_MKFS[kind].split(), self.device)
        self.kind = kind

    def mount(self, options: str = "") -> Path:
        """Mount the file system that ``mkfs`` made, and return where."""
        if self.kind is None:
            raise ValueError("no file system yet: call mkfs first")
        options = ",".join(filter(None, [_MOUNT_OPTIONS.get(self.kind), options]))
        kind = self.kind.partition("-")[0]
        _run("mount", "-t", kind, *(["-o", options] if options else []), self.device, str(self.mount_point))
        self._mounted = True
        self._undo.callback(self._detach)
        return self.mount_point

    def umount(self) -> None:
        """Unmount it: OSError while a file on it is open or mapped."""
        _run("umount", str(self.mount_point))
        self._mounted = False

    def _detach(self) -> None:
        """Unmount at the end: by force where it must be."""
        if not self._mounted:
            return
        command = ["umount", str(self.mount_point)]
        with subprocess.Popen(command, env={**os.environ, "PATH": _PATH}, stderr=subprocess.DEVNULL) as umount:
            try:
                umount.wait(_CALL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._unstick()
        if umount.returncode:
            _run("umount", "-l", str(self.mount_point))
        self._mounted = False

    def stat(self) -> DeviceStat:
        """The loop device's own counters; subtract two of them.

        Of /sys/block/loopN/stat (counted from 1): 1 reads, 3 sectors read, 5 writes, 7 sectors written (of 512
        bytes), 16 flushes. Loop devices do count flushes: field 16 grows by one for each flush that the driver was
        sent (seen equal to the flushes that ``FaultyDisk`` got below it); those that the block layer merged count as
        one. A write with FUA is one too: a loop device has no FUA, so a flush follows the write. Field 5 counts a
        flush that somebody asked for as a write of no bytes as well: 200 times write + fdatasync are 400 writes.
        """
        return DeviceStat.of(Path("/sys/block", Path(self.device).name))

    def extent_of(self, path: str | os.PathLike[str], offset: int = 0) -> int:
        """Where on the disk the byte ``offset`` of a file lies. The file must have been synced.

        It stays there while the file is only overwritten; but btrfs, unless mounted with ``nodatacow``, writes
        every new version elsewhere.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            where = _physical(fd, offset)
            return _btrfs_device_offset(fd, where) if self.kind == "btrfs" else where
        finally:
            os.close(fd)


def _physical(fd: int, offset: int) -> int:
    """FIEMAP (linux/fiemap.h) of one byte. It never writes back by itself: a test may have planted faults."""
    head, extent = struct.Struct("=QQIIII"), struct.Struct("=QQQ16xI12x")
    buffer = bytearray(head.pack(offset, 1, 0, 0, 1, 0) + bytes(extent.size))
    fcntl.ioctl(fd, 0xC020660B, buffer)
    found = head.unpack_from(buffer)[3]
    logical, physical, length, flags = extent.unpack_from(buffer, head.size)
    placeless = 0x2 | 0x4 | 0x8 | 0x200  # unknown, delayed allocation, encoded, inline
    if not found or flags & placeless or not logical <= offset < logical + length:
        raise ValueError(f"byte {offset} has no place on the disk: write and fsync it first (flags {flags:#x})")
    return int(physical) + offset - int(logical)


def _btrfs_device_offset(fd: int, where: int) -> int:
    """btrfs numbers its bytes by an address of its own; its chunk tree knows where on the device they are."""
    key = struct.pack("=7Q4I32x", 3, 256, 256, 0, 2**64 - 1, 0, 2**64 - 1, 228, 228, 4096, 0)
    buffer = bytearray(key.ljust(4096, b"\0"))
    fcntl.ioctl(fd, 0xD0009411, buffer)  # BTRFS_IOC_TREE_SEARCH: chunk items of the chunk tree
    (found,) = struct.unpack_from("=I", buffer, 64)
    position = len(key)
    for _ in range(found):
        _, _, start, _, item_bytes = struct.unpack_from("=QQQII", buffer, position)
        (length,) = struct.unpack_from("=Q", buffer, position + 32)
        (stripe,) = struct.unpack_from("=Q", buffer, position + 32 + 48 + 8)
        if start <= where < start + length:
            return int(stripe) + where - int(start)
        position += 32 + item_bytes
    raise ValueError(f"no chunk of this btrfs holds the address {where}")


class LoopDisk(BlockDisk):
    """A mounted file system on a loop device over a sparse file: no FUSE, full speed, for tests and benchmarks.

    ``stat()`` counts what reached the device; see there which field counts flushes. With ``direct_io`` (the default)
    the host's page cache is not a second cache below the file system. ``preallocate`` writes the whole file first,
    so that no benchmark pays for allocation in the file system below.
    """

    def __init__(
        self,
        size: int = SIZE_DEFAULT,
        kind: str = "ext4",
        *,
        options: str = "",
        direct_io: bool = True,
        preallocate: bool = False,
    ) -> None:
        super().__init__(size, direct_io=direct_io)
        self._wanted = kind
        self._options = options
        self._preallocate = preallocate

    def _open(self) -> None:
        super()._open()
        with open(self.image, "xb") as image:
            self._undo.callback(os.unlink, self.image)
            image.truncate(self.size)
            if self._preallocate:
                image.writelines(bytes(MIB) for _ in range(0, self.size, MIB))
                os.fsync(image.fileno())
        self.mkfs(self._wanted)
        self.mount(self._options)


@dataclass(frozen=True)
class Counters:
    """What a faulty disk did so far. Failed requests count as failed only; ``held`` is how many wait right now."""

    writes: int
    write_bytes: int
    zeros: int
    flushes: int
    reads: int
    read_bytes: int
    failed_writes: int
    failed_flushes: int
    failed_reads: int
    held: int


@dataclass(frozen=True)
class LogEntry:
    """One act of a faulty disk. ``errno`` is not 0 where it failed (and nothing was changed).

    ``kind`` is "write", "zero" (a discard or zeroing: the range reads as zeros from now on), "flush" or "marker".
    ``data`` is what was written, if the disk keeps data, or the marker's text.
    """

    number: int
    kind: str
    offset: int
    length: int
    errno: int
    data: bytes


class DiskControl:
    """The remote control of a faulty disk, for any thread and process: all it needs is the socket's path.

    Every call is a connection of its own, so that a call which waits stops no other and a fork shares nothing.
    Nothing here touches the file systems on the disk: all of it works while they hang.

    Rules are asked in the order in which they were made, and the first that takes a request decides. A rule takes
    the requests that overlap the bytes ``first`` to ``last`` (both included; None: to the end of the disk), lets the
    first ``skip`` of them pass, and is used up after ``count`` (None: never). The kernel merges neighbouring pages
    into one request of up to 1 MiB: it fails, or hangs, as a whole.
    """

    def __init__(self, control_path: str | os.PathLike[str]) -> None:
        self.control_path = Path(control_path)

    def fail_writes(
        self, first: int = 0, last: int | None = None, errno: int = EIO, count: int | None = None, skip: int = 0
    ) -> int:
        """Fail writes (and zeroing) with this errno; returns the rule's number for ``clear``."""
        return self._rule("write", "fail", first, last, count, skip, errno=errno)

    def fail_reads(
        self, first: int = 0, last: int | None = None, errno: int = EIO, count: int | None = None, skip: int = 0
    ) -> int:
        """Fail reads that overlap the range."""
        return self._rule("read", "fail", first, last, count, skip, errno=errno)

    def fail_flushes(self, errno: int = EIO, count: int | None = None, skip: int = 0) -> int:
        """Fail flushes of the disk. The loop driver turns any errno of a flush into EIO.

        The writes before it stay done: what a real disk would have lost has to be computed from the log.
        """
        if errno == ENOSYS:
            raise ValueError("the kernel would take ENOSYS for 'needs no flush' and never send one again")
        return self._rule("flush", "fail", 0, None, count, skip, errno=errno)

    def hold(
        self, kind: str = "write", first: int = 0, last: int | None = None, count: int | None = None, skip: int = 0
    ) -> int:
        """Let requests ("write", "flush" or "read") hang until ``release``; ``wait_for("held")`` sees them come."""
        return self._rule(kind, "hold", first, last, count, skip)

    def delay(
        self,
        kind: str,
        delay_s: float,
        first: int = 0,
        last: int | None = None,
        count: int | None = None,
        skip: int = 0,
    ) -> int:
        """Let requests take this much longer, each for itself."""
        return self._rule(kind, "delay", first, last, count, skip, delay_s=delay_s)

    def _rule(
        self,
        kind: str,
        action: str,
        first: int,
        last: int | None,
        count: int | None,
        skip: int,
        *,
        errno: int = 0,
        delay_s: float = 0.0,
    ) -> int:
        if kind not in ("write", "flush", "read"):
            raise ValueError(f"no such kind of request: {kind!r}")
        rule = {"kind": kind, "action": action, "first": first, "last": last, "count": count, "skip": skip}
        return int(self._call("add_rule", **rule, errno=errno, delay_s=delay_s)["rule"])

    def clear(self, rule: int | None = None) -> None:
        """Forget one rule, or all of them. What is held already stays held."""
        self._call("clear_rules", rule=rule)

    def release(self, errno: int = 0) -> int:
        """End all holding; what was held goes on (or fails with ``errno``), in its order. Returns how many it was."""
        return int(self._call("release", errno=errno)["released"])

    def counters(self) -> Counters:
        """What the disk did so far, mkfs included: subtract."""
        return Counters(**self._call("counters"))

    def wait_for(self, counter: str, at_least: int = 1) -> Counters:
        """Block until a counter ("held", "flushes" …) has reached a value; TimeoutError after 30 s."""
        return Counters(**self._call("wait_for", counter=counter, at_least=at_least))

    def marker(self, data: bytes) -> int:
        """Put a marker into the log, behind all that the disk has done until now; returns its number there."""
        return int(self._call("marker", data=base64.b64encode(data).decode())["number"])

    def log(self, start: int = 0) -> list[LogEntry]:
        """The log from entry ``start`` on. It begins with mkfs, if it was not trimmed since."""
        answer, payload = self._exchange("log", start=start)
        entries, position = [], 0
        for number, (kind, offset, length, error, data_bytes) in enumerate(answer["entries"], answer["start"]):
            data = payload[position : position + data_bytes]
            position += data_bytes
            entries.append(LogEntry(number, kind, offset, length, error, data))
        return entries

    def trim_log(self) -> int:
        """Forget the log until now; returns the number that the next entry will have."""
        return int(self._call("trim_log")["start"])

    def keep_data(self, on: bool = True) -> None:
        """Whether the log keeps the data of writes from now on, in the server's memory."""
        self._call("keep_data", on=on)

    def read_raw(self, offset: int, size: int) -> bytes:
        """What the disk really holds, past all caches. Not counted, and no rule applies."""
        return self._exchange("read_raw", offset=offset, size=size)[1]

    def _call(self, what: str, **arguments: Any) -> dict[str, Any]:
        return self._exchange(what, **arguments)[0]

    def _exchange(self, what: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_CALL_TIMEOUT_S)
            connection.connect(str(self.control_path))
            connection.sendall(json.dumps({"do": what, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as reader:
                line = reader.readline()
                if not line:
                    raise ConnectionError("the disk's server has ended")
                answer: dict[str, Any] = json.loads(line)
                payload_bytes = answer.pop("payload")
                payload = reader.read(payload_bytes)
        if "error" in answer:
            raise RuntimeError(f"{what}: {answer['error']}")
        if len(payload) != payload_bytes:
            raise ConnectionError("the disk's server ended in the middle of an answer")
        return answer, payload


class FaultyDisk(DiskControl, BlockDisk):
    """A disk that fails, hangs, counts and remembers on request, with a real file system on it.

    ``keep_data`` makes the log hold what was written, for computing crash images. ``backing`` is a file for the
    disk's bytes (default: memory, which is freed at the end). ``cached`` lets the kernel cache the file below the
    loop device: only then can ``image`` itself be mapped, for tests that want no file system between; a file system
    above wants it off, because then every write and flush comes to the disk as it is sent.
    """

    def __init__(
        self,
        size: int = SIZE_DEFAULT,
        *,
        keep_data: bool = False,
        backing: str | os.PathLike[str] | None = None,
        cached: bool = False,
    ) -> None:
        BlockDisk.__init__(self, size)
        self._backing = backing
        self._flags = ["--keep-data"] * keep_data + ["--cached"] * cached
        self._server: subprocess.Popen[bytes] | None = None
        self._unplugged = False

    @property
    def image(self) -> Path:
        """The file below the loop device, served by FUSE."""
        return self._directory / "fuse" / "disk"

    def _open(self) -> None:
        super()._open()
        DiskControl.__init__(self, self._directory / "control")
        self.image.parent.mkdir()
        self._undo.callback(os.rmdir, self.image.parent)
        self._undo.callback(self.control_path.unlink, missing_ok=True)
        self._undo.callback(self._stop)
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fuse_disk.py"))]
        program += ["--mount", str(self.image.parent), "--control", str(self.control_path), "--size", str(self.size)]
        if self._backing is not None:
            program += ["--backing", os.fspath(self._backing)]
        pipe = subprocess.PIPE  # its standard input is its life line: it ends when we do, however we do
        self._server = subprocess.Popen(program + self._flags, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b"ready\n":
            _, said = self._server.communicate()
            raise OSError(EIO, f"the disk's server did not start: {said.decode(errors='replace')}")

    def _close(self) -> None:
        try:
            if self._server is not None and self._server.poll() is None:
                self.clear()
                self.release()
        finally:
            super()._close()

    def unplug(self) -> None:
        """Take the disk away for good: all I/O fails from now on, and so does this remote control."""
        if self._server is not None:
            self._unplugged = True
            self._server.kill()
            self._server.wait()

    def _stop(self) -> None:
        if self._server is None:
            return
        try:
            _, said = self._server.communicate(timeout=_CALL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            _, said = self._server.communicate()
        _detach_mounts(self._directory)  # after the server's end: what still waited for the disk has got an error
        if self._server.returncode and not self._unplugged:
            raise OSError(EIO, f"the disk's server failed: {said.decode(errors='replace')}")

    def _unstick(self) -> None:
        self.unplug()
