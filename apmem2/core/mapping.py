"""`Map`: a registered mapping, and what can be done with it. How one comes to be: `making`."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Any, overload

from apmem2.core import config, folios, runtime
from apmem2.core.errors import (
    AccessError,
    ClosedError,
    ErrorCode,
    MapFailedError,
    OutOfRangeError,
    PersistError,
    PmemError,
    persist_error,
    warn_caller,
)
from apmem2.core.granularity import Durability, Granularity, MemFlags, Protection, Sharing
from apmem2.core.persist import JOINED_MAX, Data, Inline, Pooled
from apmem2.core.pieces import PIECE, Progress, in_pieces
from apmem2.core.ranges import Buffer, Pin, Touched, is_number, pieces_of, whole
from apmem2.core.registry import Interval, Registry
from apmem2.core.runtime import EACH, Operation, budget
from apmem2.core.source import OpenFile, Source
from apmem2.core.statistics import JobStatistics, of_map
from apmem2.native import ffi, lib

_persist = lib.apm_map_persist
_copy = lib.apm_map_copy
_OUT_OF_RANGE = int(ErrorCode.LENGTH_OUT_OF_RANGE)
_SHARED_BLOCKS = 256  # blocks of one strided buffer that are under way at a time

registry: Registry[Map]


def _is_mapped(address: int, size: int) -> bool:
    """Does it lie in a map of ours, so that reading it may wait for the file?"""
    return registry.overlapping(address, size) is not None


def find(address: int, length: int) -> Map | None:
    """The registered map with the lowest address that overlaps [address, address + length), or None."""
    runtime.check_forked()
    return registry.find(whole(address, "address"), whole(length, "length"))


def mappings() -> list[Map]:
    """All registered maps of this process, by address."""
    runtime.check_forked()
    return registry.owners()


class Map:
    """A registered mapping: memory, and the knowledge of when it is safe.

    Offsets and sizes are bytes from the start of the map; rounding to pages happens here. May be used from any loop and
    thread. Made by `open`, `map_new` and `map_from_existing`, ended by `aclose`.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_closed",
        "_closing",
        "_disowned",
        "_durability",
        "_end",
        "_file",
        "_granularity",
        "_inline",
        "_interval",
        "_owner",
        "_size",
        "_source",
        "_strategy",
        "_view",
        "_why_closed",
        "_writable",
        "_writable_end",
        "handle",
        "pointer",
    )

    def __init__(self, pointer: Any, source: Source, path: str | None, held: Pin | None) -> None:
        settings = config.settle()
        self.pointer: Any = ffi.gc(pointer, lib.apm_map_release)
        self.handle = int(ffi.cast("uintptr_t", pointer))
        self._address = int(pointer.address)
        self._size = int(pointer.length)
        self._granularity = Granularity(int(pointer.granularity))
        self._durability = Durability(int(pointer.durability))
        self._source = source
        self._file = None if pointer.file == ffi.NULL else OpenFile.of(pointer.file, path)
        self._closing = False
        self._closed = False
        self._why_closed = ""
        self._interval: Interval[Map] | None = None
        disowned: list[bool] = []
        self._disowned = disowned

        def disown(_: Any, pointer: Any = self.pointer) -> None:
            disowned.append(True)
            lib.apm_map_disown(pointer)

        # Whoever can reach the bytes of an owned map holds the owner, directly or through a view of it; when the last
        # has gone, the memory is unmapped in the pool. An adopted map's owner is the hold on the buffer.
        protection = int(pointer.protection)
        self._writable = bool(protection & int(Protection.WRITE)) and not (held is not None and held.read_only)
        guard = ffi.gc(ffi.cast("char *", self.address), disown)
        self._owner: Any = guard if held is None else (guard, held)
        self._view: memoryview | None = None
        if protection & int(Protection.READ):
            view = memoryview(ffi.buffer(guard, self.size)) if held is None else held.memory()
            self._view = view if self._writable else view.toreadonly()
        # A private mapping of a file faults its pages in from the file: not on the loop's thread.
        pooled = self.granularity is Granularity.PAGE or (self._file is not None and bool(pointer.sharing))
        self._strategy: Pooled = Pooled() if pooled else Inline(settings.inline_bytes_max)
        self._inline = self._strategy.inline_bytes_max
        self._end = self._size  # of what may be persisted, and of what may be written: nothing once it is closing
        self._writable_end = self._size if self._writable else -1

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """First byte of the memory."""
        return self._address

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def granularity(self) -> Granularity:
        """What a persist works with: effective, not asked for."""
        return self._granularity

    @property
    def durability(self) -> Durability:
        """What a completed persist means on this medium."""
        return self._durability

    @property
    def source(self) -> Source:
        """What is mapped."""
        return self._source

    @property
    def view(self) -> memoryview:
        """All of it, format "B".

        Storing through it neither persists nor is covered by the promise not to block the loop: a store may fault and
        wait for the file system; `memcpy` does not.
        """
        self._check_open()
        if self._view is None:
            raise AccessError("this map was made without Protection.READ", hint="Ask for Protection.READ.")
        return self._view

    @property
    def protection(self) -> Protection:
        """What may be done with the memory."""
        return Protection(int(self.pointer.protection) & 0xE0000000)

    @property
    def sharing(self) -> Sharing:
        """Whether the file sees the stores."""
        return Sharing(int(self.pointer.sharing))

    @property
    def failed(self) -> PmemError | None:
        """The first failure of a sync of this file in this process, or None."""
        runtime.check_forked()
        if self._file is None:
            return None
        if self._file.failure is None and not self._closed:
            code: int = lib.apm_map_failed(self.pointer)
            if code < 0:
                self._file.latch(self._persist_error(code))
        return self._file.failure

    def statistics(self) -> JobStatistics:
        """What the pool did for this map so far. Stays readable after the end."""
        return of_map(self.pointer)

    @property
    def closed(self) -> bool:
        """`aclose` was called, or its mapping was found gone."""
        return self._closing or self._closed

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        state = "forked" if runtime.is_forked() else "closed" if self.closed else "failed" if self.failed else "open"
        return (
            f"<apmem2.Map {self._source!r} address={self.address:#x} size={self.size} "
            f"{self.granularity.name} {self.durability.name} {state}>"
        )

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> memoryview: ...
    def __getitem__(self, index: int | slice) -> int | memoryview:
        """`m[i]`: one byte. `m[a:b]`: a memoryview, no copy."""
        return self.view[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        """Store, synchronously; nothing is persisted."""
        self.view[index] = value

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        runtime.check_forked()
        if self._closing or self._closed:
            raise ClosedError(f"{self._name()} is closed{self._why_closed}")

    def _name(self) -> str:
        return f"the map of {self._file.path}" if self._file and self._file.path else "the map"

    def hold(self) -> object:
        """The owner of the memory, for a job that is about to be submitted."""
        owner = self._owner
        if self._closing or owner is None or runtime.is_forked():
            owner = None  # here and below: a traceback that somebody keeps must not keep the memory mapped
            self._check_open()
        file = self._file
        if file is not None and file.failure is not None:
            owner = None
            raise self._failed_error()
        return owner

    def error(self, code: int) -> PmemError:
        """The exception for a job's negative code; remembers a failure of the file."""
        if code == ErrorCode.FILE_FAILED:
            return self._failed_error()
        error = self._persist_error(code)
        if self._file is not None and isinstance(error, PersistError) and lib.apm_map_failed(self.pointer) < 0:
            self._file.latch(self._persist_error(code))  # not what is raised: its traceback holds the caller's views
        return error

    def _persist_error(self, code: int) -> PmemError:
        return persist_error(code, f"persisting {self._name()}", self._file.path if self._file else None)

    def _failed_error(self) -> PmemError:
        error = MapFailedError(
            f"{self._name()}: an earlier sync of this file failed", filename=self._file.path if self._file else None
        )
        error.__cause__ = self.failed
        return error

    def _range(self, offset: Any, size: Any, what: str) -> tuple[int, int]:
        """(offset, size) checked; (None, None) is all of it."""
        if self._closing or self._closed:
            self._check_open()
        if size is None:
            if offset is None:
                return 0, self._size
            raise TypeError(f"{what}(offset) needs a size as well: {what}(offset, size), {what}(buffer) or {what}()")
        if type(offset) is int and type(size) is int:
            start, length = offset, size
        else:
            start, length = whole(offset, "offset"), whole(size, "size")
        if start < 0 or length < 0 or start + length > self._size:
            raise OutOfRangeError(
                f"{what}: [{start}, {start + length}) does not lie inside the map of {self.size} bytes",
                hint="Offsets are bytes from the start of the map.",
            )
        return start, length

    def _touched(self, buffer: Any, what: str) -> list[tuple[int, int]] | Iterator[tuple[int, int]]:
        """The (offset, size) of the blocks that a buffer inside the map touches."""
        self._check_open()
        unit = int(lib.apm_page_size()) if self.granularity is Granularity.PAGE else int(lib.apm_cpu().line_size)
        touched = Touched(buffer, unit)
        start = touched.address - self._address
        if touched.size == 0 and (start < 0 or start > self.size):
            return []  # an empty buffer has no place of its own
        if start < 0 or start + touched.size > self._size:
            raise OutOfRangeError(
                f"{what}: the buffer does not lie inside the map",
                hint="Give a slice of m.view, or of the buffer that was adopted. (numpy copies for w[3] and w[[1, 2]]: "
                "say w[3:4].)",
            )
        return ((address - self._address, size) for address, size in touched)

    # ---- making durable ----------------------------------------------------------------------------------------------

    @overload
    async def persist(self, *, on_progress: Progress | None = None) -> None: ...
    @overload
    async def persist(self, offset: int, size: int, *, on_progress: Progress | None = None) -> None: ...
    @overload
    async def persist(self, offset: Buffer, /) -> None: ...
    async def persist(self, offset: Any = None, size: Any = None, *, on_progress: Progress | None = None) -> None:
        """Make all of it, `size` bytes from `offset` on, or what `buffer` covers durable.

        offset, size: bytes; size 0 does nothing. buffer: any buffer inside the map; of a strided one the pages that it
        touches. Stores made before the call by the caller's own thread are covered; those of other threads are the
        caller's to order. More than 8 MiB go piece by piece, which others of the same file may come in between:
        on_progress(bytes done, all bytes) is called on the loop after each piece.

        Durability: on return the bytes survive a power cut, where `durability` is POWER_LOSS.
        Raises: `PersistError` when the sync failed, `MapFailedError` when an earlier one of this file did,
        `ClosedError`, `OutOfRangeError`. Cancelled before it began, nothing is submitted; after that the piece under
        way goes on in the background, and no further one is begun.
        """
        # The walk of most calls: what is odd about the others, the rest finds out.
        if type(offset) is int and type(size) is int:
            owner = self._owner  # first: while the bounds say that it is open, this is not None
            if size <= self._inline:
                try:
                    code: int = _persist(self.pointer, offset, size)
                except OverflowError:  # negative; the rest says so
                    code = _OUT_OF_RANGE
                if not code:
                    budget.left = left = budget.left - size - EACH
                    if left < 0:
                        await runtime.breathe()
                    return
                if code != _OUT_OF_RANGE:
                    raise self.error(code)
            elif 0 < size <= PIECE and 0 <= offset <= self._end - size and on_progress is None:
                operation = self._strategy.start_persist(self, owner, offset, size)
                owner = None  # a traceback that somebody keeps must not keep the memory mapped
                try:
                    await operation.future
                except BaseException as error:
                    operation.left(error)
                    raise
                return
            owner = None
        if size is None and offset is not None and not is_number(offset):
            started: list[Operation] = []
            try:
                for start, length in self._touched(offset, "persist"):
                    pending = self._strategy.persist(self, start, length)
                    if isinstance(pending, Operation):
                        started.append(pending)
                        pending.leader = started[0] if len(started) > 1 else None  # no circle
                    elif pending is not None:
                        await pending
                    if len(started) == _SHARED_BLOCKS:
                        batch, started = started, []
                        await runtime.gather(batch)
            except BaseException:
                for operation in started:
                    operation.abandon()
                raise
            await runtime.gather(started)
            return
        start, length = self._range(offset, size, "persist")
        await in_pieces(start, length, partial(self._strategy.persist, self), on_progress)

    @overload
    async def flush(self) -> None: ...
    @overload
    async def flush(self, offset: int, size: int) -> None: ...
    @overload
    async def flush(self, offset: Buffer, /) -> None: ...
    async def flush(self, offset: Any = None, size: Any = None) -> None:
        """Start the write-back of a range, given as for `persist`, and return when it is accepted.

        Durability: none yet; `drain` returns when it is durable, and raises if it failed.
        """
        if size is None and offset is not None and not is_number(offset):
            for start, length in self._touched(offset, "flush"):
                pending = self._strategy.flush(self, start, length)
                if pending is not None:
                    await pending
            return
        start, length = self._range(offset, size, "flush")
        await in_pieces(start, length, partial(self._strategy.flush, self), None, grow=False)

    async def drain(self) -> None:
        """Wait for every flush and NODRAIN copy accepted before on this map, by whatever task or loop.

        Durability: on return all of them are durable. Raises as `persist` if one of them failed; every later drain
        raises as well, because those bytes are not durable.
        """
        self._check_open()
        pending = self._strategy.drain(self)
        if pending is not None:
            await pending

    # ---- copying -----------------------------------------------------------------------------------------------------

    async def memcpy(
        self,
        offset: int,
        data: Buffer | bytes,
        flags: MemFlags | int = 0,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        """Copy data into the map at offset, and make it durable unless flags say otherwise.

        data: any buffer. Up to `configure(copy_bytes_max=…)` bytes are copied at the call; longer data is read in the
        pool and must stay unchanged until that has ended, cancelled or not. It may overlap the destination, also
        through another map of the same file. Data that is not contiguous is copied and written piece by piece.
        flags: see `MemFlags`. on_progress: as for `persist`; more than 8 MiB go piece by piece, from the first byte to
        the last, and after a cancellation or an error some of the pieces have been written. (Data that overlaps the
        destination goes in one.)

        Durability: flags 0: durable on return. NODRAIN: after the next `drain`. NOFLUSH: after a later `persist`. The
        bytes show in the view on return in every case.
        Raises: as `persist`, and `AccessError` on a map without Protection.WRITE.
        """
        if type(data) is bytes and type(offset) is int and type(flags) is int and not flags:
            owner, size = self._owner, len(data)
            if size and 0 <= offset <= self._writable_end - size:
                if size <= self._inline:
                    code: int = _copy(self.pointer, offset, data, size, 0)
                    if code:
                        raise self.error(code)
                    budget.left = left = budget.left - size - EACH
                    if left < 0:
                        await runtime.breathe()
                    return
                if size <= JOINED_MAX and on_progress is None:
                    operation = self._strategy.start_copy(self, owner, offset, data)
                    owner = None
                    try:
                        await operation.future
                    except BaseException as error:
                        operation.left(error)
                        raise
                    return
            owner = None
        self._check_writable()
        bits = self._flags(flags)
        copied_max = config.settle().copy_bytes_max
        if type(data) is not bytes and (pieces := pieces_of(data, copied_max)) is not None:
            _ = self._range(offset, pieces.size, "memcpy")
            for place, piece in pieces:
                await self.memcpy(offset + place, piece, bits)
            return
        source = Data(data, copied_max, _is_mapped)
        start, length = self._range(offset, source.size, "memcpy")
        strategy = self._strategy
        if length > PIECE and (source.owned or not await strategy.overlaps(self, start, source)):
            await in_pieces(0, length, lambda at, n: strategy.copy(self, start + at, source, bits, at, n), on_progress)
        elif length:
            pending = strategy.copy(self, start, source, bits)
            if pending is not None:
                await pending
            if on_progress is not None:
                on_progress(length, length)

    async def memmove(
        self,
        offset: int,
        data: Buffer | bytes,
        flags: MemFlags | int = 0,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        """The same as `memcpy`, which allows overlapping already."""
        await self.memcpy(offset, data, flags, on_progress=on_progress)

    async def memset(
        self,
        offset: int,
        value: int,
        size: int,
        flags: MemFlags | int = 0,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        """Set size bytes from offset on to value (0 to 255). Pieces, durability and errors as for `memcpy`."""
        self._check_writable()
        bits = self._flags(flags)
        byte = whole(value, "value")
        if not 0 <= byte <= 255:
            raise ValueError(f"value must be from 0 to 255, not {byte}")
        start, length = self._range(offset, whole(size, "size"), "memset")
        strategy = self._strategy
        await in_pieces(start, length, lambda at, n: strategy.fill(self, at, byte, n, bits), on_progress)

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise AccessError(
                f"{self._name()} may only be read",
                hint="Map it with Protection.WRITE, or adopt a writable buffer (mode='r+', ACCESS_WRITE).",
            )

    @staticmethod
    def _flags(flags: int) -> int:
        bits = whole(flags, "flags")
        if bits & ~0x3F:
            raise ValueError(f"flags are those of MemFlags, not {bits:#x}")
        return bits

    async def populate(
        self, offset: int | None = None, size: int | None = None, *, on_progress: Progress | None = None
    ) -> None:
        """Read a range (default: all) in from the file, so that touching it does not wait. Dirties nothing.

        on_progress: as for `persist`.

        Raises `OutOfRangeError`, `PersistError` (errno ENXIO) when the file ends before the range does.
        """
        start, length = self._range(offset, size, "populate")
        if self._view is None:
            raise AccessError(f"{self._name()} was made without Protection.READ", hint="Ask for Protection.READ.")
        await in_pieces(start, length, partial(self._strategy.populate, self), on_progress)

    # ---- the page cache ----------------------------------------------------------------------------------------------

    def _in_page_cache(self) -> bool:
        """Does a store here make something of the page cache dirty that a persist then writes?"""
        return self._granularity is Granularity.PAGE and self._durability is not Durability.NONE

    async def write_amplification(
        self, offset: int | None = None, size: int | None = None, *, samples: int = 8
    ) -> float | None:
        """Bytes that a persist of one stored page writes, divided by the page's size: 1.0 is best, 256.0 means 1 MiB.

        The kernel does not tell, so it is tried: up to `samples` pages spread over the range (default: all) are
        persisted, made dirty without changing them, and persisted again; what became dirty is counted. None: it cannot
        be known here (no page cache below the map, a kernel before 5.14, pages that others keep dirty). See
        docs/page_cache.md, and `split_folios` for the cure.

        Durability: none of its own; what lay in those pages is persisted.
        Raises: as `persist`, and `AccessError` on a map that may only be read.
        """
        self._check_writable()
        start, length = self._range(offset, size, "write_amplification")
        count = whole(samples, "samples")
        if not 1 <= count <= 1024:
            raise ValueError(f"samples must be from 1 to 1024, not {count}")
        if not length or not self._in_page_cache():
            return None
        return await folios.measured(self, self._strategy, start, length, count)

    async def split_folios(
        self, offset: int | None = None, size: int | None = None, *, random_access: bool = False
    ) -> int:
        """Split what the page cache holds of a range (default: all) in large folios into single pages, in memory.

        So a one-page persist writes one page again, after somebody read or wrote the file in large pieces. Nothing is
        read, and nothing leaves the cache; the range is persisted first, because what is dirty cannot be split, and
        its pages are faulted in again when they are touched next (about 0.3 µs a page). What another process maps as
        well stays as it is. random_access: also advise the kernel that access is random, so that later faults bring
        single pages (and read nothing ahead: a sequential reader then wants `populate`); without it an adopted
        mapping's own faults may bring large folios again. Maps that `open` and `map_new` made have that advice.

        Returns the bytes that were seen to lie in large folios and do so no more; 0 where there is no page cache.
        Durability: on return the range is durable, as after `persist`. Raises as `persist`.
        """
        start, length = self._range(offset, size, "split_folios")
        if not length or not self._in_page_cache():
            return 0
        await self.persist(start, length)
        return await folios.split(self, self._strategy, start, length, random_access)

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End it: wait for accepted work and raise its error, then let go of the memory. Idempotent.

        Durability: what nobody persisted is not persisted. An owned mapping is unmapped; while views of it are alive
        that is left to the last of them, with a ResourceWarning. An adopted mapping stays as it is.
        """
        runtime.check_forked()
        self._closing = True
        self._end = self._writable_end = self._inline = -1
        if self._closed:
            return
        try:
            await self._strategy.drain_all(self, self._finish)
        except PmemError:
            if self._disowned:
                await self._strategy.drain_all(self, None)  # told of an error or not, it is unmapped on return
            raise
        runtime.sweep()  # loops that were closed in the middle may have held the memory
        if self._disowned:
            await self._strategy.drain_all(self, None)  # until it is unmapped
        elif not self.pointer.adopted:  # of an adopted one another thread is having a look; views do not keep it
            warn_caller(
                f"{self._name()} was closed while views of it are alive; it is unmapped when the last of them is gone",
                ResourceWarning,
                self,
            )

    def _finish(self) -> None:
        """Nothing is in flight: let go. Plain, so that no cancellation can come in between."""
        if self._closed:
            return
        interval, self._interval = self._interval, None
        if interval is not None:
            registry.remove(interval)
        _ = self.failed  # the file is not looked at after this
        self._closed = True
        self._view = None
        self._owner = None

    def memory(self) -> object:
        """The owner of the memory, whatever else is the matter with the map; None: it has let go of it."""
        return self._owner

    def registered(self, interval: Interval[Map]) -> None:
        """Its place in the registry, from now to its end."""
        self._interval = interval

    @property
    def ended(self) -> bool:
        """Closed, and nothing of it left: a map that is still closing is not."""
        return self._closed

    def drop(self, why: str) -> None:
        """Its mapping is gone, by somebody else's doing: closed for good."""
        self._why_closed = f": {why}"
        self._closing = True
        self._end = self._writable_end = self._inline = -1
        self._finish()

    async def __aenter__(self) -> Map:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        interval: Interval[Map] | None = getattr(self, "_interval", None)
        if interval is None or self._closed:
            return
        registry.forget(interval)
        if not runtime.is_forked():
            warnings.warn(f"{self!r} was not closed: await m.aclose()", ResourceWarning, source=self, stacklevel=2)


registry = Registry()


def _warn_at_exit() -> None:
    if runtime.is_forked():
        return
    for left in registry.owners():
        if not left.closed:
            warnings.warn(f"{left!r} was open when the interpreter ended", ResourceWarning, source=left, stacklevel=1)


atexit.register(_warn_at_exit)
