"""A disk that can fail: one FUSE server, one regular file named ``disk``.

Why: what a program does after a failed write can only be tested on a disk that fails on request. Under a loop
device this file is such a disk, with the host's own kernel and file systems above it, and without device-mapper.
It speaks the kernel's protocol (linux/fuse.h) on /dev/fuse by itself and needs the standard library only.

What holds here:

* One thread, no locks: the order of the log is the order in which the disk acted. A request that is held or
  delayed is put aside unanswered, so all others are still served.
* An entry is in the log before its request is answered. A marker that is written after a sync has returned
  therefore stands behind every write and flush which that sync waited for.
* A write that fails changes nothing on the disk.
* The server never opens a path at run time: it may not wait for a file system that waits for it.

It is started by ``disk.FaultyDisk`` and ends when its standard input does (that is: with its owner), or when it is
unmounted; the mount is the owner's to remove, and gives errors until then.

The commands of the control socket are the ``_do_*`` methods of ``Server``: one JSON object per line with the method's
name under "do" and its arguments beside it; the answer is one line, followed by as many raw bytes as its "payload"
says.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import errno
import heapq
import json
import os
import selectors
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | memoryview

# linux/fuse.h, protocol 7.31: old enough for every kernel since 5.4, new enough for writes of 1 MiB.
MINOR = 31
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, SYNCFS = 36, 38, 42, 43, 50
UNANSWERED = {FORGET, BATCH_FORGET, INTERRUPT}
EMPTY_ANSWER = {RELEASE, RELEASEDIR, FLUSH, READDIR, DESTROY, SYNCFS}
INIT_FLAGS = (1 << 0) | (1 << 5) | (1 << 15) | (1 << 22)  # ASYNC_READ, BIG_WRITES, ASYNC_DIO, MAX_PAGES
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1, 2
FATTR_SIZE = 1 << 3
PUNCH_HOLE, ZERO_RANGE = 2, 16

REQUEST_BYTES_MAX = 1 << 20
IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
INIT_IN = struct.Struct("<IIII")  # major, minor, read-ahead, flags
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
IO_IN = struct.Struct("<QQI")  # handle, offset, size
WRITE_IN_BYTES = 40
FALLOCATE_IN = struct.Struct("<QQQI")  # handle, offset, length, mode

ROOT_NODE, DISK_NODE = 1, 2
VALID_S = 3600
PR_SET_IO_FLUSHER = 57

libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Rule:
    """One planned fault: what it hits, and what then happens."""

    id: int
    kind: str  # "write" (zeroing too), "flush" or "read"
    action: str  # "fail", "hold" or "delay"
    first: int
    last: int | None
    count: int | None
    skip: int
    errno: int
    delay_s: float

    def takes(self, request: Request) -> bool:
        """Whether this rule applies to the request; one that does uses up one of ``skip``, then of ``count``."""
        kind = "write" if request.kind == "zero" else request.kind
        if kind != self.kind or self.count == 0:
            return False
        if kind != "flush":
            end = request.offset + request.length
            if end <= self.first or (self.last is not None and request.offset > self.last):
                return False
        if self.skip:
            self.skip -= 1
            return False
        if self.count is not None:
            self.count -= 1
        return True


@dataclass
class Request:
    """One request to the disk: "read", "write", "zero" or "flush"."""

    unique: int
    kind: str
    offset: int = 0
    length: int = 0
    data: Buffer = b""


@dataclass
class Counters:
    """What the disk did. Failed requests count as failed only; ``held`` is how many wait at this moment."""

    writes: int = 0
    write_bytes: int = 0
    zeros: int = 0
    flushes: int = 0
    reads: int = 0
    read_bytes: int = 0
    failed_writes: int = 0
    failed_flushes: int = 0
    failed_reads: int = 0
    held: int = 0


@dataclass
class Entry:
    """One line of the log: "write", "zero", "flush" or "marker", in the order of the disk's acts."""

    kind: str
    offset: int
    length: int
    errno: int
    data: bytes


@dataclass
class Disk:
    """The disk without its plugs: bytes, log, counters and rules."""

    fd: int
    size: int
    keep_data: bool
    log: list[Entry] = field(default_factory=list)
    first_entry: int = 0  # number of the oldest entry that is still kept
    counters: Counters = field(default_factory=Counters)
    rules: list[Rule] = field(default_factory=list)

    def rule_for(self, request: Request) -> Rule | None:
        """The first rule that takes this request; a rule that is used up is forgotten."""
        for rule in self.rules:
            if rule.takes(request):
                if rule.count == 0:
                    self.rules.remove(rule)
                return rule
        return None

    def perform(self, request: Request, error: int = 0) -> tuple[int, bytes]:
        """Do it, or fail it with ``error``; log it and count it. Returns the errno and what a read has read."""
        got = b""
        if not error:
            try:
                got = self._act(request)
            except OSError as problem:  # the backing itself is full or broken
                error = problem.errno or errno.EIO
        self._account(request, error)
        return error, got

    def _act(self, request: Request) -> bytes:
        if request.kind == "read":
            return self.read(request.offset, request.length)
        if request.kind == "write":
            written = 0
            while written < request.length:
                written += os.pwrite(self.fd, request.data[written:], request.offset + written)
        elif request.kind == "zero":
            mode = ctypes.c_int(PUNCH_HOLE | 1)  # keep the size
            offset, length = ctypes.c_int64(request.offset), ctypes.c_int64(request.length)
            if libc.fallocate(self.fd, mode, offset, length):
                raise OSError(ctypes.get_errno(), "fallocate")
        return b""

    def _account(self, request: Request, error: int) -> None:
        counters, kind = self.counters, request.kind
        if kind != "read":
            data = bytes(request.data) if self.keep_data else b""
            self.log.append(Entry(kind, request.offset, request.length, error, data))
        if kind == "read":
            counters.failed_reads += bool(error)
            counters.reads += not error
            counters.read_bytes += 0 if error else request.length
        elif kind == "flush":
            counters.failed_flushes += bool(error)
            counters.flushes += not error
        else:
            counters.failed_writes += bool(error)
            counters.writes += kind == "write" and not error
            counters.zeros += kind == "zero" and not error
            counters.write_bytes += request.length if kind == "write" and not error else 0

    def read(self, offset: int, size: int) -> bytes:
        """The bytes that the disk holds; zeros beyond its end."""
        return os.pread(self.fd, size, offset).ljust(size, b"\0")


@dataclass
class Client:
    """One connection to the control socket."""

    connection: socket.socket
    received: bytes = b""


class Server:
    """Joins the disk to the kernel and to the control socket, in one thread."""

    def __init__(self, disk: Disk, fuse: int, control: socket.socket, *, cached: bool) -> None:
        self._disk = disk
        self._fuse = fuse
        self._control = control
        # Uncached, every read and write of the loop device comes here: direct I/O is what makes this a disk.
        self._open_flags = FOPEN_KEEP_CACHE if cached else FOPEN_DIRECT_IO
        self._buffer = bytearray(REQUEST_BYTES_MAX + 4096)
        self._view = memoryview(self._buffer)
        self._held: list[Request] = []
        self._delayed: list[tuple[float, int, Request]] = []
        self._waiting: list[tuple[Client, str, int]] = []
        self._rules_made = 0
        self._alive = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(fuse, selectors.EVENT_READ, self._serve_fuse)
        self._selector.register(control, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._owner_gone)

    def run(self) -> None:
        """Serve until unmounted or until the owner has gone."""
        while self._alive:
            timeout = max(0.0, self._delayed[0][0] - time.monotonic()) if self._delayed else None
            for key, _ in self._selector.select(timeout):
                key.data()
            while self._delayed and self._delayed[0][0] <= time.monotonic():
                self._perform(heapq.heappop(self._delayed)[2])
            self._wake()

    def _owner_gone(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            self._alive = False

    # -- the kernel's side

    def _serve_fuse(self) -> None:
        for _ in range(64):  # bounded, so that a busy disk still hears its control socket
            try:
                size = os.readv(self._fuse, [self._buffer])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: withdrawn while we were reading it
                    continue
                if error.errno != errno.ENODEV:  # ENODEV: unmounted
                    raise
                self._alive = False
                return
            self._handle(self._view[:size])

    def _handle(self, message: memoryview) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
        body = message[IN_HEADER.size :]
        if opcode == WRITE:
            _, offset, length = IO_IN.unpack_from(body)
            data = body[WRITE_IN_BYTES : WRITE_IN_BYTES + length]
            self._submit(Request(unique, "write", offset, length, data))
        elif opcode == READ and node == DISK_NODE:
            _, offset, length = IO_IN.unpack_from(body)
            self._submit(Request(unique, "read", offset, length))
        elif opcode == FSYNC:
            self._submit(Request(unique, "flush"))
        elif opcode == FALLOCATE:
            _, offset, length, mode = FALLOCATE_IN.unpack_from(body)
            if mode & (PUNCH_HOLE | ZERO_RANGE):
                self._submit(Request(unique, "zero", offset, length))
            else:
                self._answer(unique, errno.EOPNOTSUPP)
        elif opcode not in UNANSWERED:
            self._answer(unique, *self._small(opcode, node, body))

    def _small(self, opcode: int, node: int, body: memoryview) -> tuple[int, bytes]:
        """What is not about the disk's content: errno and body of the answer."""
        if opcode == INIT:
            return 0, self._negotiate(body)
        if opcode == LOOKUP:
            if node != ROOT_NODE or bytes(body).rstrip(b"\0") != b"disk":
                return errno.ENOENT, b""
            return 0, struct.pack("<QQQQII", DISK_NODE, 0, VALID_S, VALID_S, 0, 0) + self._attributes(DISK_NODE)
        if opcode in (GETATTR, SETATTR):
            if opcode == SETATTR and int.from_bytes(body[:4], "little") & FATTR_SIZE:
                return errno.EPERM, b""  # a disk does not change its size
            return 0, struct.pack("<QII", VALID_S, 0, 0) + self._attributes(node)
        if opcode in (OPEN, OPENDIR):
            return 0, struct.pack("<QII", node, self._open_flags if opcode == OPEN else 0, 0)
        if opcode == STATFS:
            return 0, struct.pack("<QQQQQIIII24x", self._disk.size // 4096, 0, 0, 2, 0, 4096, 255, 4096, 0)
        if opcode in EMPTY_ANSWER:
            return 0, b""
        return errno.ENOSYS, b""  # the kernel then does without, and does not ask again

    def _negotiate(self, body: memoryview) -> bytes:
        major, minor, read_ahead, offered = INIT_IN.unpack_from(body)
        if major != 7 or minor < MINOR:
            raise RuntimeError(f"FUSE 7.{MINOR} needed, this kernel speaks {major}.{minor}")
        # Requests that are held count as background requests: many of them may not stop the rest.
        background, pages = 4096, REQUEST_BYTES_MAX // 4096
        flags = offered & INIT_FLAGS
        return INIT_OUT.pack(7, MINOR, read_ahead, flags, background, background, REQUEST_BYTES_MAX, 1, pages, 0, 0)

    def _attributes(self, node: int) -> bytes:
        disk = node == DISK_NODE
        mode = stat.S_IFREG | 0o600 if disk else stat.S_IFDIR | 0o700
        size = self._disk.size if disk else 0
        return ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1 if disk else 2, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, error: int, body: Buffer = b"") -> None:
        if error:
            body = b""
        header = OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique)
        try:
            os.writev(self._fuse, [header, body])
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                raise

    # -- the disk's side

    def _submit(self, request: Request) -> None:
        rule = self._disk.rule_for(request)
        if rule is None:
            self._perform(request)
        elif rule.action == "fail":
            self._perform(request, rule.errno)
        else:
            request.data = bytes(request.data)  # the buffer that it lies in is used again
            if rule.action == "hold":
                self._held.append(request)
                self._disk.counters.held = len(self._held)
            else:
                heapq.heappush(self._delayed, (time.monotonic() + rule.delay_s, request.unique, request))

    def _perform(self, request: Request, error: int = 0) -> None:
        error, got = self._disk.perform(request, error)
        if request.kind == "write":
            got = struct.pack("<II", request.length, 0)
        self._answer(request.unique, error, got)

    # -- the control socket's side

    def _accept(self) -> None:
        connection, _ = self._control.accept()
        connection.settimeout(10)  # for answers: a client that does not read may not stop the disk
        client = Client(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(client))

    def _hear(self, client: Client) -> None:
        try:
            received = client.connection.recv(65536)
        except OSError:
            received = b""
        if not received:
            self._drop(client)
            return
        *lines, client.received = (client.received + received).split(b"\n")
        for line in lines:
            try:
                arguments = json.loads(line)
                answer = getattr(self, "_do_" + arguments.pop("do"))(client, **arguments)
            except Exception as problem:  # told to the client, which raises it: the disk itself goes on
                answer = {"error": f"{type(problem).__name__}: {problem}"}
            if answer is not None:
                self._tell(client, answer)

    def _tell(self, client: Client, answer: dict[str, Any], payload: Iterable[bytes] = ()) -> None:
        raw = b"".join(payload)
        try:
            client.connection.sendall(json.dumps({**answer, "payload": len(raw)}).encode() + b"\n" + raw)
        except OSError:
            self._drop(client)

    def _drop(self, client: Client) -> None:
        if client.connection.fileno() >= 0:
            self._waiting = [waiting for waiting in self._waiting if waiting[0] is not client]
            self._selector.unregister(client.connection)
            client.connection.close()

    def _wake(self) -> None:
        """Answer the clients whose counter has been reached."""
        for waiting in list(self._waiting):
            client, counter, at_least = waiting
            if getattr(self._disk.counters, counter) >= at_least:
                self._waiting.remove(waiting)
                self._tell(client, asdict(self._disk.counters))

    def _do_add_rule(self, client: Client, **arguments: Any) -> dict[str, Any]:
        self._rules_made += 1
        self._disk.rules.append(Rule(id=self._rules_made, **arguments))
        return {"rule": self._rules_made}

    def _do_clear_rules(self, client: Client, rule: int | None) -> dict[str, Any]:
        self._disk.rules = [one for one in self._disk.rules if rule is not None and one.id != rule]
        return {}

    def _do_release(self, client: Client, errno: int) -> dict[str, Any]:
        """End all holding and go on with what is held, in the order in which it came."""
        self._disk.rules = [rule for rule in self._disk.rules if rule.action != "hold"]
        held, self._held = self._held, []
        self._disk.counters.held = 0
        for request in held:
            self._perform(request, errno)
        return {"released": len(held)}

    def _do_counters(self, client: Client) -> dict[str, Any]:
        return asdict(self._disk.counters)

    def _do_wait_for(self, client: Client, counter: str, at_least: int) -> None:
        getattr(self._disk.counters, counter)  # an unknown name is the caller's error, now
        self._waiting.append((client, counter, at_least))

    def _do_marker(self, client: Client, data: str) -> dict[str, Any]:
        disk = self._disk
        disk.log.append(Entry("marker", 0, 0, 0, base64.b64decode(data)))
        return {"number": disk.first_entry + len(disk.log) - 1}

    def _do_log(self, client: Client, start: int) -> None:
        disk = self._disk
        start = max(start, disk.first_entry)
        entries = disk.log[start - disk.first_entry :]
        rows = [(one.kind, one.offset, one.length, one.errno, len(one.data)) for one in entries]
        self._tell(client, {"start": start, "entries": rows}, (one.data for one in entries))

    def _do_trim_log(self, client: Client) -> dict[str, Any]:
        disk = self._disk
        disk.first_entry += len(disk.log)
        disk.log.clear()
        return {"start": disk.first_entry}

    def _do_keep_data(self, client: Client, on: bool) -> dict[str, Any]:
        self._disk.keep_data = on
        return {}

    def _do_read_raw(self, client: Client, offset: int, size: int) -> None:
        self._tell(client, {}, [self._disk.read(offset, size)])


def main() -> None:
    """Mount, say "ready" on standard output, and serve."""
    parser = argparse.ArgumentParser(description="A disk that can fail, as a FUSE file system of one file.")
    parser.add_argument("--mount", required=True, metavar="DIR", help="an empty directory")
    parser.add_argument("--control", required=True, metavar="SOCKET", help="path of the control socket to make")
    parser.add_argument("--size", required=True, type=int, metavar="BYTES")
    parser.add_argument("--backing", metavar="FILE", help="where the bytes are kept (default: in memory)")
    parser.add_argument("--keep-data", action="store_true", help="keep the data of writes in the log")
    parser.add_argument("--cached", action="store_true", help="let the kernel cache and map the file itself")
    options = parser.parse_args()

    # Tells the kernel that writing back dirty pages goes through this process: do not make it wait for that.
    libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    backing = os.open(options.backing, os.O_RDWR | os.O_CREAT, 0o600) if options.backing else os.memfd_create("disk")
    os.ftruncate(backing, options.size)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(options.control)
    control.listen(64)

    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    data = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"faulty-disk", os.fsencode(options.mount), b"fuse", ctypes.c_ulong(0), data.encode()):
        raise OSError(ctypes.get_errno(), "mount of a FUSE file system", options.mount)
    server = Server(Disk(backing, options.size, options.keep_data), fuse, control, cached=options.cached)
    print("ready", flush=True)
    server.run()


if __name__ == "__main__":
    main()
