"""How does work leave the event loop, and how does the loop learn that it is done?

The only file that knows which event loop it is on; everything above waits through it. One `Bridge` per loop: the jobs
of one tick leave in one C call, completions come back through one eventfd. A cancelled waiter is not a cancelled job
(law 6): work that has not begun is withdrawn, work that has begun goes on with everything that it uses kept alive.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from apmem2.core import config
from apmem2.core.errors import ErrorCode, PmemError, error_of
from apmem2.native import ffi, lib

# kind, flags, tag, map, offset, size, data: struct apm_job; the sizes are asserted on both sides.
_JOB = struct.Struct("=IIQQQQQ")
_RESULT = struct.Struct("=IiQ")
_BATCH = 1024  # jobs of one C call
_TURN = 64  # completions between two turns of the loop
_BREATH = 131072  # inline work between two yields: bytes, with EACH for each call
EACH = 512
_EXIT_WAIT_MS = 5000  # how long leaving the interpreter waits for calls that are under way

_JOB_SIZE = _JOB.size
_PERSIST: int = lib.APM_JOB_PERSIST
_ENDED = -2  # the tag of an operation that has ended

assert _JOB.size == ffi.sizeof("struct apm_job")
assert _RESULT.size == ffi.sizeof("struct apm_result")

Settle = Callable[[int], PmemError]


class Operation:
    """One job from the asking to its completion; awaiting it is waiting for the completion.

    `data` is an address or a number, or short bytes, which leave with those of the tick in one piece of memory,
    `joined`. `keep` holds whatever else the job uses in memory until it has ended. `undo` runs instead of the waiter
    when the job succeeded and nobody is there any more to take what it made. `ended` runs at the end in any case, and a
    job that has it is not withdrawn when its waiter is cancelled.
    """

    __slots__ = (
        "bridge", "data", "ended", "error", "flags", "future", "joined", "keep", "kind", "leader", "map", "offset",
        "refusal", "size", "tag", "undo",
    )  # fmt: skip

    WAITING = -1  # in the list of its tick
    ENDED = _ENDED

    def __init__(
        self,
        bridge: Bridge,
        kind: int,
        error: Settle,
        keep: object,
        flags: int = 0,
        map: int = 0,
        offset: int = 0,
        size: int = 0,
        data: int | bytes = 0,
    ) -> None:
        self.bridge = bridge
        self.kind = kind
        self.flags = flags
        self.map = map
        self.offset = offset
        self.size = size
        self.data = data
        self.error = error
        self.keep = keep
        self.joined: object = None
        self.undo: Callable[[], None] | None = None
        self.ended: Callable[[], None] | None = None
        self.refusal: PmemError | None = None  # why the pool did not take it
        self.tag = Operation.WAITING
        self.future: Any = None  # asyncio.Future[None] or None; Any, so that the walk of most calls need not ask
        self.leader: Operation | None = None  # of several that one waiter waits for, the one that it waits for first

    def __await__(self) -> Generator[Any, None, None]:
        assert self.future is not None
        try:
            yield from self.future
        except BaseException as error:
            self.left(error)
            raise

    def left(self, error: BaseException) -> None:
        """Its waiter leaves with this exception, its own or a cancellation: has to be called."""
        future = self.future
        # A traceback holds the waiter's frames, and those the operation: if they led back to the exception, files and
        # memory would be let go by the garbage collector only.
        self.future = None
        if future is None or not isinstance(error, asyncio.CancelledError):
            return
        succeeded = future.done() and not future.cancelled() and future.exception() is None
        if succeeded and self.undo is not None:
            self.undo()  # the cancellation came before its waiter ran
        self.bridge.withdraw(self)

    def abandon(self) -> None:
        """Nobody will wait for it."""
        if self.future is not None:
            self.future.cancel()
        self.bridge.withdraw(self)

    async def to_the_end(self) -> None:
        """Wait for the completion even when cancelled; the cancellation is raised after it."""
        future = self.future
        assert future is not None
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error
                self.bridge.withdraw(self)
        if cancelled is not None:
            if not future.cancelled() and future.exception() is None and self.undo is not None:
                self.undo()
            try:
                raise cancelled
            finally:
                del cancelled  # its traceback holds this frame: no circle, what the caller lent is free at once
        self.future = None
        try:
            future.result()
        finally:
            del future


class Bridge:
    """Between one event loop and the pool. Used by that loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        settings = config.settle()
        out = ffi.new("struct apm_channel **")
        code: int = lib.apm_channel_new(settings.jobs_max, out)
        if code < 0:
            raise error_of(code, "starting the runtime")
        self.loop = loop
        self.capacity = settings.jobs_max
        self._channel = out[0]
        self._fd: int = lib.apm_channel_fd(self._channel)
        self._slots: list[Operation | None] = []
        self._free: list[int] = []
        self._tick: deque[Operation] = deque()
        self._scheduled = False  # the tick's leaving
        self._taking = False  # completions are left for the next turns
        self._room: list[asyncio.Future[None]] = []
        self._packed = bytearray(_JOB.size * _BATCH)
        self._jobs = ffi.from_buffer("struct apm_job[]", self._packed)
        self._create_future = loop.create_future
        self._results = ffi.new("struct apm_result[]", _BATCH)
        self._completions = memoryview(ffi.buffer(self._results))
        try:
            loop.add_reader(self._fd, self._arrive)
        except BaseException:
            lib.apm_channel_free(self._channel)
            raise

    # ---- out ---------------------------------------------------------------------------------------------------

    def start(self, operation: Operation) -> Operation:
        """Put it on this tick's list; it leaves with all others of the tick."""
        operation.future = self._create_future()
        self._tick.append(operation)
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._leave_together)
        return operation

    def accept(self, operation: Operation) -> Awaitable[None] | None:
        """Hand it to the pool now, after all that was started before it; nobody will wait for its completion.

        None: done. When the pool is full, an awaitable that ends with the acceptance. Raises what the pool refuses
        with.
        """
        self._tick.append(operation)
        self._leave()
        if operation.refusal is not None:
            raise operation.refusal
        return self._accepted(operation) if operation.tag == Operation.WAITING else None

    async def _accepted(self, operation: Operation) -> None:
        try:
            while operation.tag == Operation.WAITING:
                future = self.loop.create_future()
                self._room.append(future)
                await future
        except asyncio.CancelledError:
            if operation.tag == Operation.WAITING:
                self.withdraw(operation)
            raise
        if operation.refusal is not None:
            raise operation.refusal

    def _leave_together(self) -> None:
        """The end of a tick. While completions are left for the next turns, persists wait for the tasks that those will
        wake: not only do they share a round then, but a sync makes the pages read-only again one by one, with an
        interrupt for each to whoever is storing at that moment. (Pages stored and persisted by 256 tasks: 1.9 times as
        many a second. Copies have no such trouble, and gain by leaving at once.)"""
        self._scheduled = False
        if not self._taking or (self._tick and self._tick[0].kind != _PERSIST):
            self._leave()

    def _leave(self) -> None:
        tick = self._tick
        while tick:
            batch = self._batch()
            if not batch:
                return  # full: what comes back makes room
            self._pack(batch)
            accepted: int = lib.apm_pool_submit(self._channel, self._jobs, len(batch))
            if accepted == len(batch):
                continue
            for operation in reversed(batch[max(accepted, 0) :]):
                self._slots[operation.tag] = None
                self._free.append(operation.tag)
                operation.tag = Operation.WAITING
                tick.appendleft(operation)
            if accepted < 0:  # the first one was refused: it is told, the others get their own answer
                refused = tick.popleft()
                refused.refusal = refused.error(accepted)
                self._settle(refused, accepted)

    def _batch(self) -> list[Operation]:
        """The next operations of the tick, each in a slot of its own."""
        tick, slots, free = self._tick, self._slots, self._free
        batch: list[Operation] = []
        while tick and len(batch) < _BATCH:
            if not free:
                if len(slots) == self.capacity:
                    break
                free.append(len(slots))
                slots.append(None)
            operation = tick.popleft()
            awaited = operation.future if operation.leader is None else operation.leader.future
            if awaited is not None and awaited.cancelled():
                self.withdraw(operation)  # its waiter, cancelled just now, has not run yet
            if operation.tag == _ENDED:
                continue  # withdrawn while it waited here
            operation.tag = tag = free.pop()
            slots[tag] = operation
            batch.append(operation)
        return batch

    def _pack(self, batch: list[Operation]) -> None:
        """As an array of struct apm_job; short data in one piece of memory, for as long as one of its jobs runs."""
        pieces = [operation.data for operation in batch if type(operation.data) is bytes]
        joined: Any = None
        address = 0
        if pieces:
            joined = ffi.from_buffer(b"".join(pieces))
            address = int(ffi.cast("uintptr_t", joined))
        pack, packed, place = _JOB.pack_into, self._packed, 0
        for operation in batch:
            data = operation.data
            if type(data) is bytes:
                operation.joined = joined
                data = address
                address += operation.size
            pack(
                packed, place, operation.kind, operation.flags, operation.tag, operation.map, operation.offset,
                operation.size, data,
            )  # fmt: skip
            place += _JOB_SIZE

    def withdraw(self, operation: Operation) -> None:
        """Take it back if it has not begun: nothing is submitted for it then."""
        if operation.ended is not None:
            return
        if operation.tag >= 0:
            lib.apm_pool_withdraw(self._channel, operation.tag)
        elif operation.tag == Operation.WAITING:
            operation.tag = Operation.ENDED
            operation.keep = None
            if operation.future is not None and not operation.future.done():
                operation.future.cancel()

    # ---- back --------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        try:  # noqa: SIM105 - a context manager would cost more than the call
            os.read(self._fd, 8)
        except BlockingIOError:
            pass
        if not self._taking:
            self._take_turn()

    def _take_turn(self) -> None:
        """Settle some; the tasks that they wake, and whoever else is there, have their turn before the next."""
        count = self._take(_TURN)
        # Once there is more than one turn there is one after the last, when the tasks that it woke have asked as well.
        self._taking = count == _TURN or (self._taking and count > 0)
        if self._taking:
            self.loop.call_soon(self._take_turn)
        elif self._tick and not self._scheduled:
            self._leave()
        if self._room:
            waiting, self._room = self._room, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    def _take(self, most: int) -> int:
        slots, free = self._slots, self._free
        tag: int
        code: int
        count: int = lib.apm_channel_take(self._channel, self._results, most)
        closed = self.loop.is_closed()
        for tag, code, _ in _RESULT.iter_unpack(self._completions[: count * _RESULT.size]):
            operation = slots[tag]
            slots[tag] = None
            free.append(tag)
            if operation is None:
                continue
            future = operation.future
            if code or closed or operation.ended is not None or future is None or future.done():
                self._settle(operation, code)
            else:
                operation.tag = _ENDED
                operation.keep = operation.joined = None
                future.set_result(None)
        return count

    def _settle(self, operation: Operation, code: int) -> None:
        operation.tag = Operation.ENDED
        error = None if code >= 0 or code == ErrorCode.WITHDRAWN else operation.error(code)
        operation.keep = operation.joined = None
        if operation.ended is not None:
            operation.ended()
        future = operation.future
        if future is None or future.done() or self.loop.is_closed():
            if code >= 0 and operation.undo is not None:
                operation.undo()
        elif error is not None:
            future.set_exception(error)
        elif code >= 0:
            future.set_result(None)
        else:
            future.cancel()

    # ---- around ------------------------------------------------------------------------------------------------

    def retire(self) -> bool:
        """The loop is closed: let go of what has ended. True when nothing of it is in flight any more."""
        for operation in self._tick:
            operation.tag = Operation.ENDED
        self._tick.clear()
        while self._take(_BATCH) > 0:
            pass
        return bool(lib.apm_channel_free(self._channel) == 0)

    def in_flight(self) -> list[Operation]:
        """Operations that the pool has."""
        return [operation for operation in self._slots if operation is not None]


class _Budget:
    """What inline work may still spend before the others of its loop get a turn.

    One for all loops: sharing it makes them breathe more often, which does no harm.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = _BREATH


budget = _Budget()


def breathe() -> Awaitable[None]:
    """The budget is spent: to be awaited, and the others get their turn."""
    budget.left = _BREATH
    return asyncio.sleep(0)


def spend(size: int) -> Awaitable[None] | None:
    """Account for inline work of size bytes; what it returns, if anything, is to be awaited."""
    budget.left -= size + EACH
    return None if budget.left > 0 else breathe()


class Waiter:
    """One wake-up, from any thread or loop, for a coroutine of the loop that made it."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    async def wait(self) -> None:
        """Return after `wake`."""
        await self._future

    def wake(self) -> bool:
        """Wake it. False: its loop is closed, nobody will ever come."""
        try:
            self._loop.call_soon_threadsafe(self._set)
        except RuntimeError:
            return False
        return True

    def _set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


# ---- the process: one bridge for each loop, fork and exit -----------------------------------------------------------


class _Here(threading.local):
    bridge: Bridge | None = None


_here = _Here()
_lock = threading.RLock()  # guards the two below; held for moments only; a collection inside it may close a map
_bridges: list[Bridge] = []
_at_exit_set = False
_forked = False


def is_forked() -> bool:
    """Is this a child of the process that started the runtime?"""
    return _forked


def check_forked() -> None:
    """Raise `ForkedError` in a child of the process that started the runtime (law 7)."""
    if _forked:
        raise error_of(ErrorCode.FORKED, "apmem2")


def bridge() -> Bridge:
    """The bridge of the running loop, made at its first use."""
    if _forked:
        check_forked()
    loop = asyncio.get_running_loop()
    found = _here.bridge
    if found is None or found.loop is not loop:
        found = _here.bridge = _bridge_of(loop)
    return found


def _retire_closed() -> None:  # _lock held
    _bridges[:] = [known for known in _bridges if not (known.loop.is_closed() and known.retire())]


def sweep() -> None:
    """Let go of what jobs of closed loops held, as far as they have ended."""
    if any(known.loop.is_closed() for known in _bridges):
        with _lock:
            _retire_closed()


def _bridge_of(loop: asyncio.AbstractEventLoop) -> Bridge:
    global _at_exit_set
    with _lock:
        for known in _bridges:
            if known.loop is loop:
                return known
        _retire_closed()
        fresh = Bridge(loop)
        _bridges.append(fresh)
        if not _at_exit_set:
            _at_exit_set = True
            atexit.register(_leave_process)
        return fresh


async def gather(operations: list[Operation]) -> None:
    """Wait for all of them, then raise the first error. Cancelled, it lets go of all of them."""
    error: PmemError | None = None
    try:
        for operation in operations:
            try:
                await operation
            except PmemError as failure:
                error = error or failure
    except BaseException:
        for operation in operations:
            operation.abandon()
        raise
    if error is not None:
        raise error


async def control(
    kind: int,
    request: Any,
    error: Settle,
    *,
    undo: Callable[[], None] | None = None,
    keep: object = None,
    handle: int = 0,
    to_the_end: bool = False,
) -> None:
    """Run one control job of the core on `request` in the pool.

    handle: the map that it is about, pinned meanwhile. undo: run when it succeeded and its waiter was cancelled.
    to_the_end: a cancellation is raised only after the job has ended (for jobs that are short and hold something of the
    caller's).
    """
    operation = Operation(bridge(), kind, error, (request, keep))
    operation.map = handle
    operation.data = int(ffi.cast("uintptr_t", request))
    operation.undo = undo
    operation.bridge.start(operation)
    if to_the_end:
        await operation.to_the_end()
    else:
        await operation


def _mark_forked() -> None:
    global _forked
    if _bridges or lib.apm_is_forked():
        _forked = True


def _leave_process() -> None:
    """Stop the pool before the interpreter frees memory that a job may be using."""
    if _forked or lib.apm_is_forked():
        return
    left: int = lib.apm_pool_stop(_EXIT_WAIT_MS)
    if left > 0:  # a call that hangs in the kernel: what it uses must never be freed
        import ctypes

        for known in _bridges:
            for operation in known.in_flight():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(operation))


os.register_at_fork(after_in_child=_mark_forked)
