"""How is a range made durable at this granularity? One strategy per kind of map, chosen for a map once.

Every method is plain: it does the work here and returns None, or returns what has to be awaited. What is submitted
carries the memory's owner with it, so a map outlives its jobs (law 5). Strategies have no state of a map, which would
tie the two into a cycle.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from apmem2.core import runtime
from apmem2.core.errors import PmemError
from apmem2.core.granularity import MemFlags
from apmem2.core.ranges import as_view
from apmem2.core.runtime import Operation
from apmem2.native import ffi, lib

JOINED_MAX = 8192  # bytes of data that leave with those of the same tick, because copying them is cheaper than lending
_FLUSH_COST = 8192  # of the inline budget: a submission of its own
_PERSIST: int = lib.APM_JOB_PERSIST
_COPY: int = lib.APM_JOB_COPY
_OWNED: int = lib.APM_F_SOURCE_OWNED
_SHARED_POPULATE = 4 << 20  # bytes from which on two jobs share the reading in
_NODRAIN = int(MemFlags.NODRAIN)
_NOFLUSH = int(MemFlags.NOFLUSH)


class Bound(Protocol):
    """What a strategy needs of its map."""

    pointer: Any  # struct apm_map *
    handle: int  # the same, as a number

    def hold(self) -> object:
        """The owner of the memory, to be kept until the job has ended; raises when closed or failed."""
        ...

    def error(self, code: int) -> PmemError:
        """The exception for a job's negative code."""
        ...


class Data:
    """Bytes to be copied: where they are, how many, and whether they are ours alone until the copy has ended."""

    __slots__ = ("address", "cdata", "owned", "size")

    def __init__(self, data: Any, copy_bytes_max: int, is_mapped: Callable[[int, int], bool]) -> None:
        self.owned = True
        if type(data) is not bytes:
            view = as_view(data, "data")
            short = view.nbytes <= copy_bytes_max
            if short and view.c_contiguous and type(data) is not bytearray:
                cdata = ffi.from_buffer(
                    view
                )  # what lies in a map is read in the pool: it may have to come from the file
                short = not is_mapped(int(ffi.cast("uintptr_t", cdata)), view.nbytes)
            if short or not view.c_contiguous:
                data = view.tobytes()  # read once, here: the caller may change it from now on (law 6)
            else:
                self.owned = False
                data = view
        self.cdata = ffi.from_buffer(data)
        self.size = len(self.cdata)
        self.address = int(ffi.cast("uintptr_t", self.cdata))


class Pooled:
    """Page granularity: everything goes to the pool, where it shares the rounds of its file."""

    def _operation(
        self, bound: Bound, kind: int, offset: int, size: int, flags: int = 0, data: int = 0, keep: Any = None
    ) -> Operation:
        held = (bound.hold(), keep)
        return Operation(runtime.bridge(), kind, bound.error, held, flags, bound.handle, offset, size, data)

    inline_bytes_max = -1

    def start_persist(self, bound: Bound, owner: object, offset: int, size: int) -> Operation:
        """The walk of most calls, without a detour: durable when it ends.

        owner: as `hold` gives it; whether the file has failed, the round asks.
        """
        bridge = runtime.bridge()
        return bridge.start(Operation(bridge, _PERSIST, bound.error, owner, 0, bound.handle, offset, size))

    def start_copy(self, bound: Bound, owner: object, offset: int, data: bytes) -> Operation:
        """Likewise, of bytes of up to `joined_bytes_max`, without flags."""
        bridge = runtime.bridge()
        return bridge.start(Operation(bridge, _COPY, bound.error, owner, _OWNED, bound.handle, offset, len(data), data))

    def persist(self, bound: Bound, offset: int, size: int) -> Awaitable[None] | None:
        """Durable when the awaitable ends."""
        return self.start_persist(bound, bound.hold(), offset, size)

    def flush(self, bound: Bound, offset: int, size: int) -> Awaitable[None] | None:
        """Accepted when this returns None, or when the awaitable ends."""
        operation = self._operation(bound, lib.APM_JOB_PERSIST, offset, size, lib.APM_PERSIST_UNAWAITED)
        return operation.bridge.accept(operation) or runtime.spend(_FLUSH_COST)

    def drain(self, bound: Bound) -> Awaitable[None] | None:
        """Everything accepted before is durable when the awaitable ends."""
        if lib.apm_map_idle(bound.pointer) == 1:
            bound.hold()
            return runtime.spend(0)
        operation = Operation(runtime.bridge(), lib.APM_JOB_DRAIN, bound.error, None)
        operation.map = bound.handle
        return operation.bridge.start(operation)

    def drain_all(self, bound: Bound, ended: Callable[[], None] | None) -> Awaitable[None]:
        """Whatever was accepted for this map has ended when the awaitable ends; `ended` is called then in any case."""
        operation = Operation(runtime.bridge(), lib.APM_JOB_DRAIN, bound.error, None)
        operation.map = bound.handle
        operation.flags = lib.APM_DRAIN_ALL
        operation.ended = ended
        return operation.bridge.start(operation)

    def populate(self, bound: Bound, offset: int, size: int) -> Awaitable[None]:
        """Read in when the awaitable ends."""
        if size < _SHARED_POPULATE:
            operation = self._operation(bound, lib.APM_JOB_POPULATE, offset, size)
            return operation.bridge.start(operation)
        # Two that take turns along the range: while one waits for the device, the other maps what has come.
        both = [
            self._operation(bound, lib.APM_JOB_POPULATE, offset, size, half)
            for half in (lib.APM_POPULATE_EVEN, lib.APM_POPULATE_ODD)
        ]
        return runtime.gather([operation.bridge.start(operation) for operation in both])

    def ask(self, bound: Bound, kind: int, offset: int, size: int, request: Any) -> Awaitable[None]:
        """The request about a range is answered when the awaitable ends."""
        place = int(ffi.cast("uintptr_t", request))
        operation = self._operation(bound, kind, offset, size, data=place, keep=request)
        return operation.bridge.start(operation)

    def copy(
        self, bound: Bound, offset: int, data: Data, flags: int, place: int = 0, size: int | None = None
    ) -> Awaitable[None] | None:
        """By flags: durable, accepted or only visible when the awaitable ends. place, size: a piece of data."""
        owned: int = _OWNED if data.owned else 0
        length = data.size if size is None else size
        return self._store(bound, _COPY, offset, length, data.address + place, flags, owned, data)

    async def overlaps(self, bound: Bound, offset: int, data: Data) -> bool:
        """Would the copy read bytes that it writes, so that it cannot be cut into pieces?"""
        request = ffi.new("struct apm_overlap_request *", {"data": data.address, "offset": offset, "size": data.size})
        keep = (bound.hold(), data)
        await runtime.control(lib.APM_JOB_OVERLAP, request, bound.error, keep=keep, handle=bound.handle)
        return bool(request.overlaps)

    def fill(self, bound: Bound, offset: int, value: int, size: int, flags: int) -> Awaitable[None] | None:
        """As `copy`, of one byte value."""
        return self._store(bound, lib.APM_JOB_FILL, offset, size, value, flags, 0, None)

    def _store(
        self, bound: Bound, kind: int, offset: int, size: int, data: int, flags: int, extra: int, keep: Any
    ) -> Awaitable[None] | None:
        if flags & _NODRAIN and not flags & _NOFLUSH:
            visible = self._operation(bound, kind, offset, size, _NOFLUSH | extra, data, keep)
            return self._visible_then_flushed(bound, visible.bridge.start(visible), offset, size)
        operation = self._operation(bound, kind, offset, size, (flags & _NOFLUSH) | extra, data, keep)
        return operation.bridge.start(operation)

    async def _visible_then_flushed(self, bound: Bound, copied: Awaitable[None], offset: int, size: int) -> None:
        await copied
        pending = self.flush(bound, offset, size)
        if pending is not None:
            await pending


class Inline(Pooled):
    """Cache-line and byte granularity: small ranges run here, on the caller's thread, without a system call.

    A fence orders the flushes of its own thread only, so each call ends with its fence (law 1) and `drain` has nothing
    to do but wait for what went to the pool. A budget gives the other tasks of the loop their turn.
    """

    def __init__(self, inline_bytes_max: int) -> None:
        self.inline_bytes_max = inline_bytes_max

    def _done(self, bound: Bound, code: int, size: int) -> Awaitable[None] | None:
        if code < 0:
            raise bound.error(code)
        return runtime.spend(size)

    def persist(self, bound: Bound, offset: int, size: int) -> Awaitable[None] | None:
        if size > self.inline_bytes_max:
            return super().persist(bound, offset, size)
        owner = bound.hold()  # a local reference: the memory stays mapped while C runs without the GIL
        code: int = lib.apm_map_persist(bound.pointer, offset, size)
        del owner
        return self._done(bound, code, size)

    def flush(self, bound: Bound, offset: int, size: int) -> Awaitable[None] | None:
        if size > self.inline_bytes_max:
            return super().flush(bound, offset, size)
        return self.persist(bound, offset, size)

    def copy(
        self, bound: Bound, offset: int, data: Data, flags: int, place: int = 0, size: int | None = None
    ) -> Awaitable[None] | None:
        if data.size > self.inline_bytes_max or not data.owned:  # the pool looks for other mappings of it
            return super().copy(bound, offset, data, flags, place, size)
        owner = bound.hold()
        code: int = lib.apm_map_copy(bound.pointer, offset, data.cdata, data.size, flags)
        del owner
        return self._done(bound, code, data.size)

    def fill(self, bound: Bound, offset: int, value: int, size: int, flags: int) -> Awaitable[None] | None:
        if size > self.inline_bytes_max:
            return super().fill(bound, offset, value, size, flags)
        owner = bound.hold()
        code: int = lib.apm_map_fill(bound.pointer, offset, value, size, flags)
        del owner
        return self._done(bound, code, size)

    def _store(
        self, bound: Bound, kind: int, offset: int, size: int, data: int, flags: int, extra: int, keep: Any
    ) -> Awaitable[None] | None:
        # NODRAIN too is waited for: it must be visible on return, and a store and its fence are one call anyway.
        operation = self._operation(bound, kind, offset, size, flags | extra, data, keep)
        return operation.bridge.start(operation)
