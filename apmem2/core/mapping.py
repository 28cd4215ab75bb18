"""`Map`, and how one comes to be: `open`, `map_new`, `map_from_existing`."""

from __future__ import annotations

import atexit
import operator
import os
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, overload

from apmem2.core import config, runtime
from apmem2.core.errors import (
    AccessError,
    ClosedError,
    DurabilityWarning,
    ErrorCode,
    InvalidSourceError,
    MapFailedError,
    MappingExistsError,
    OtherFileError,
    OutOfRangeError,
    PersistError,
    PmemError,
    error_of,
    persist_error,
)
from apmem2.core.granularity import Durability, Granularity, MemFlags, Protection, Sharing
from apmem2.core.opening import Opening
from apmem2.core.persist import Data, Inline, Pooled
from apmem2.core.ranges import Buffer, Pin, Touched, pin, raw
from apmem2.core.registry import Interval, Registry
from apmem2.core.runtime import Operation
from apmem2.core.source import Opened, OpenFile, Source, StrPath, adopted_source, failed_before, open_file
from apmem2.native import ffi, lib

_SHARED_BLOCKS = 256  # blocks of one strided buffer that are under way at a time

_registry: Registry[Map]


def find(address: int, length: int) -> Map | None:
    """The registered map with the lowest address that overlaps [address, address + length), or None."""
    return _registry.find(address, length)


def mappings() -> list[Map]:
    """All registered maps of this process, by address."""
    return _registry.owners()


class Map:
    """A registered mapping: memory, and the knowledge of when it is safe.

    Offsets and sizes are bytes from the start of the map; rounding to pages happens here. May be used from any loop and
    thread. Made by `open`, `map_new` and `map_from_existing`, ended by `aclose`.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_closing",
        "_disowned",
        "_file",
        "_interval",
        "_owner",
        "_source",
        "_strategy",
        "_view",
        "_why_closed",
        "_writable",
        "address",
        "durability",
        "granularity",
        "handle",
        "pointer",
        "size",
    )

    def __init__(self, pointer: Any, source: Source, path: str | None, held: Pin | None) -> None:
        settings = config.settle()
        self.pointer: Any = ffi.gc(pointer, lib.apm_map_release)
        self.handle = int(ffi.cast("uintptr_t", pointer))
        self.address: int = int(pointer.address)
        """First byte of the memory."""
        self.size: int = int(pointer.length)
        """Bytes."""
        self.granularity = Granularity(int(pointer.granularity))
        """What a persist works with: effective, not asked for."""
        self.durability = Durability(int(pointer.durability))
        """What a completed persist means on this medium."""
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

    # ---- what it is ------------------------------------------------------------------------------------------------

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
        if self._file is None:
            return None
        if self._file.failure is None and not self._closed and not runtime.is_forked():
            code: int = lib.apm_map_failed(self.pointer)
            if code < 0:
                self._file.latch(self._persist_error(code))
        return self._file.failure

    @property
    def closed(self) -> bool:
        """`aclose` was called, or its mapping was found gone."""
        return self._closing or self._closed

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        state = "closed" if self.closed else "failed" if self.failed else "open"
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
            self._file.latch(error)
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
                return 0, self.size
            raise TypeError(f"{what}(offset) needs a size as well: {what}(offset, size), {what}(buffer) or {what}()")
        start, length = operator.index(offset), operator.index(size)
        if start < 0 or length < 0 or start + length > self.size:
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
        start = touched.address - self.address
        if touched.size == 0 and (start < 0 or start > self.size):
            return []  # an empty buffer has no place of its own
        if start < 0 or start + touched.size > self.size:
            raise OutOfRangeError(
                f"{what}: the buffer does not lie inside the map",
                hint="Give a slice of m.view, or of the buffer that was adopted.",
            )
        return ((address - self.address, size) for address, size in touched)

    # ---- making durable ----------------------------------------------------------------------------------------------

    @overload
    async def persist(self) -> None: ...
    @overload
    async def persist(self, offset: int, size: int) -> None: ...
    @overload
    async def persist(self, offset: Buffer, /) -> None: ...
    async def persist(self, offset: Any = None, size: Any = None) -> None:
        """Make all of it, `size` bytes from `offset` on, or what `buffer` covers durable.

        offset, size: bytes; size 0 does nothing. buffer: any buffer inside the map; of a strided one the pages that it
        touches. Stores made before the call by the caller's own thread are covered; those of other threads are the
        caller's to order.

        Durability: on return the bytes survive a power cut, where `durability` is POWER_LOSS.
        Raises: `PersistError` when the sync failed, `MapFailedError` when an earlier one of this file did,
        `ClosedError`, `OutOfRangeError`. Cancelled before it began, nothing is submitted; after that it goes on in the
        background.
        """
        if size is None and offset is not None and not isinstance(offset, int):
            started: list[Operation] = []
            try:
                for start, length in self._touched(offset, "persist"):
                    pending = self._strategy.persist(self, start, length)
                    if isinstance(pending, Operation):
                        started.append(pending)
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
        if length:
            pending = self._strategy.persist(self, start, length)
            if pending is not None:
                await pending

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
        if size is None and offset is not None and not isinstance(offset, int):
            for start, length in self._touched(offset, "flush"):
                pending = self._strategy.flush(self, start, length)
                if pending is not None:
                    await pending
            return
        start, length = self._range(offset, size, "flush")
        if length:
            pending = self._strategy.flush(self, start, length)
            if pending is not None:
                await pending

    async def drain(self) -> None:
        """Wait for every flush and NODRAIN copy accepted before on this map, by whatever task or loop.

        Durability: on return all of them are durable. Raises as `persist` if one of them failed.
        """
        self._check_open()
        pending = self._strategy.drain(self)
        if pending is not None:
            await pending

    # ---- copying -----------------------------------------------------------------------------------------------------

    async def memcpy(self, offset: int, data: Buffer | bytes, flags: MemFlags | int = 0) -> None:
        """Copy data into the map at offset, and make it durable unless flags say otherwise.

        data: any buffer. Up to `configure(copy_bytes_max=…)` bytes are copied at the call; longer data is read in the
        pool and must stay unchanged until that has ended, cancelled or not. It may overlap the destination, also
        through another map of the same file. flags: see `MemFlags`.

        Durability: flags 0: durable on return. NODRAIN: after the next `drain`. NOFLUSH: after a later `persist`. The
        bytes show in the view on return in every case.
        Raises: as `persist`, and `AccessError` on a map without Protection.WRITE.
        """
        self._check_writable()
        bits = self._flags(flags)
        source = Data(data, config.settle().copy_bytes_max)
        start, length = self._range(offset, source.size, "memcpy")
        if length:
            pending = self._strategy.copy(self, start, source, bits)
            if pending is not None:
                await pending

    async def memmove(self, offset: int, data: Buffer | bytes, flags: MemFlags | int = 0) -> None:
        """The same as `memcpy`, which allows overlapping already."""
        await self.memcpy(offset, data, flags)

    async def memset(self, offset: int, value: int, size: int, flags: MemFlags | int = 0) -> None:
        """Set size bytes from offset on to value (0 to 255). Durability and errors as for `memcpy`."""
        self._check_writable()
        bits = self._flags(flags)
        byte = operator.index(value)
        if not 0 <= byte <= 255:
            raise ValueError(f"value must be from 0 to 255, not {byte}")
        start, length = self._range(offset, size, "memset")
        if length:
            pending = self._strategy.fill(self, start, byte, length, bits)
            if pending is not None:
                await pending

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise AccessError(f"{self._name()} may only be read", hint="Map it with Protection.WRITE.")

    @staticmethod
    def _flags(flags: int) -> int:
        bits = operator.index(flags)
        if bits & ~0x3F:
            raise ValueError(f"flags are those of MemFlags, not {bits:#x}")
        return bits

    async def populate(self, offset: int | None = None, size: int | None = None) -> None:
        """Read a range (default: all) in from the file, so that touching it does not wait. Dirties nothing.

        Raises `OutOfRangeError`, `PersistError` (errno ENXIO) when the file ends before the range does.
        """
        start, length = self._range(offset, size, "populate")
        if self._view is None:
            raise AccessError(f"{self._name()} was made without Protection.READ", hint="Ask for Protection.READ.")
        if length:
            await self._strategy.populate(self, start, length)

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End it: wait for accepted work and raise its error, then let go of the memory. Idempotent.

        Durability: what nobody persisted is not persisted. An owned mapping is unmapped; while views of it are alive
        that is left to the last of them, with a ResourceWarning. An adopted mapping stays as it is.
        """
        runtime.check_forked()
        self._closing = True
        if self._closed:
            return
        try:
            await self._strategy.drain_all(self, self._finish)
        except PmemError:
            if self._disowned:
                await self._strategy.drain_all(self, None)  # told of an error or not, it is unmapped on return
            raise
        if self._disowned:
            await self._strategy.drain_all(self, None)  # until it is unmapped
        else:
            warnings.warn(
                f"{self._name()} was closed while views of it are alive; it is unmapped when the last of them is gone",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def _finish(self) -> None:
        """Nothing is in flight: let go. Plain, so that no cancellation can come in between."""
        if self._closed:
            return
        interval, self._interval = self._interval, None
        if interval is not None:
            _registry.remove(interval)
        _ = self.failed  # the file is not looked at after this
        self._closed = True
        self._view = None
        self._owner = None

    def drop(self, why: str) -> None:
        """Its mapping is gone, by somebody else's doing: closed for good."""
        self._why_closed = f": {why}"
        self._closing = True
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
        _registry.forget(interval)
        if not runtime.is_forked():
            warnings.warn(f"{self!r} was not closed: await m.aclose()", ResourceWarning, source=self, stacklevel=2)


_registry = Registry()


def _warn_of_durability(found: Map) -> None:
    if found.durability is Durability.POWER_LOSS:
        return
    meaning = "does not survive" if found.durability is Durability.NONE else "is not known to survive"
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("apmem2."):
        level, frame = level + 1, frame.f_back  # whoever awaited the opener: another number of frames each time
    try:
        warnings.warn(
            f"{found!r}: what is persisted here {meaning} a power cut",
            DurabilityWarning,
            source=found,
            stacklevel=level,
        )
    except BaseException:  # warnings are errors here: nobody gets the map, so nobody would close it
        found.drop("its warning was raised as an error")
        raise


def _warn_at_exit() -> None:
    if runtime.is_forked():
        return
    for left in _registry.owners():
        if not left.closed:
            warnings.warn(f"{left!r} was open when the interpreter ended", ResourceWarning, source=left, stacklevel=1)


atexit.register(_warn_at_exit)


# ---- making maps -----------------------------------------------------------------------------------------------------


async def _map(
    opened: Opened | None,
    source: Source,
    *,
    offset: int,
    length: int,
    sharing: Sharing,
    protection: Protection,
    required: Granularity,
    keep_cache: bool,
) -> Map:
    """Map an opened file, or anonymous memory, and register it."""
    path = opened.path if opened else None
    what = f"mapping {source!r}"
    request = ffi.new("struct apm_map_request *")
    request.file = opened.pointer if opened else ffi.NULL
    request.offset = offset
    request.length = length
    request.sharing = int(sharing)
    request.protection = int(protection)
    request.required_granularity = int(required)
    request.flags = lib.APM_MAP_KEEP_CACHE if keep_cache else 0

    def fail(code: int) -> PmemError:
        error = error_of(code, what, path)
        if code == ErrorCode.GRANULARITY_NOT_SUPPORTED:
            granted = Granularity(int(request.granularity)).name
            return type(error)(f"{what}: {required.name} was required and only {granted} is granted")
        return failed_before(code, int(opened.pointer.failed) if opened else 0, what, path)

    def undo() -> None:
        lib.apm_map_disown(request.map)
        lib.apm_map_release(request.map)

    await runtime.control(lib.APM_JOB_MAP, request, fail, undo=undo, keep=opened)
    made = Map(request.map, source, path, None)
    async with _registry.lock:
        while True:
            interval = _registry.add(made, made.address, made.size)
            if interval is not None:
                break
            # The kernel gave us this address, so whatever is registered there is not mapped any more.
            stale = _registry.overlapping(made.address, made.size)
            if stale is not None:
                _drop_stale(stale)
        made._interval = interval  # pyright: ignore[reportPrivateUsage]
    _warn_of_durability(made)
    return made


def _drop_stale(interval: Interval[Map]) -> None:
    owner: Map | None = interval.owner()
    _registry.remove(interval)
    if owner is not None:
        owner.drop("its owner unmapped the memory")


def open(
    path: StrPath,
    size: int | None = None,
    *,
    create: bool = True,
    required_granularity: Granularity = Granularity.PAGE,
    mode: int = 0o600,
    grow: bool = False,
    sparse: bool = False,
    keep_cache: bool = False,
    populate: bool = False,
    allow_foreign_owner: bool = False,
) -> Opening[Map]:
    """Create or open a file, map all of it for reading and writing, and own it. Await it, or `async with`.

    path: a regular file of this user (`allow_foreign_owner=True` for another's); links are not followed. size: bytes,
    any number above 0. A missing file is created with it: allocated and written with zeros unless `sparse`, durable
    with its name before this returns, and invisible until then. An existing file must have that size; with `grow` a
    smaller one is made longer. None takes an existing file as it is. mode: permissions of a new file.
    required_granularity: the coarsest that is accepted. keep_cache: do not drop the file's clean cached pages (a warm
    restart; persists of files that were written or read in large pieces then write much more than they were asked to).
    populate: read it in before returning.

    Durability: of a new or grown file, its size and name are durable on return.
    Raises: `MissingFileError`, `SizeMismatchError`, `DirectoryError`, `FileAccessError`, `InvalidSourceError` (a pipe
    or device), `AccessError` (another user's), `OpenError` (a full disk: nothing is left behind), `MapFailedError`,
    `GranularityNotSupportedError`. Warns (`DurabilityWarning`) where persists do not survive a power cut.
    """
    source = Source.from_path(path)
    wanted = 0 if size is None else operator.index(size)
    if size is not None and wanted <= 0:
        raise OutOfRangeError(f"size must be above 0, not {wanted}")
    if wanted >= 1 << 63:
        raise OutOfRangeError(f"size must be below 2**63, not {wanted}")
    required = Granularity(required_granularity)

    async def begin() -> Map:
        flags = 0
        for name, bit in (
            (create and size is not None, lib.APM_OPEN_CREATE),
            (grow, lib.APM_OPEN_GROW),
            (sparse, lib.APM_OPEN_SPARSE),
            (allow_foreign_owner, lib.APM_OPEN_FOREIGN_OWNER),
        ):
            flags |= bit if name else 0
        opened = await open_file(source.path, flags=flags, mode=mode, size=wanted)
        if opened.size == 0:
            raise OutOfRangeError(f"opening {source.path!r}: the file is empty", hint="Give a size and grow=True.")
        made = await _map(
            opened,
            source,
            offset=0,
            length=opened.size,
            sharing=Sharing.SHARED,
            protection=Protection.READ | Protection.WRITE,
            required=required,
            keep_cache=keep_cache,
        )
        del opened
        if populate:
            try:
                await made.populate()
            except BaseException:
                await made.aclose()
                raise
        return made

    return Opening("apmem2.open", begin)


def map_new(
    source: Source,
    *,
    required_granularity: Granularity,
    offset: int = 0,
    length: int | None = None,
    sharing: Sharing = Sharing.SHARED,
    protection: Protection = Protection.READ | Protection.WRITE,
    keep_cache: bool = False,
) -> Opening[Map]:
    """A new mapping of a source. Await it, or `async with`.

    required_granularity: the coarsest that is accepted. offset: bytes, a multiple of the page size. length: bytes, a
    multiple of the page size, inside the file; None: to its end. sharing, protection: as the words say. keep_cache: see
    `open`.

    Raises: `OutOfRangeError` (offset or length unaligned or beyond the file, an empty file), `AccessError` (the source
    does not allow the protection), `InvalidSourceError`, `GranularityNotSupportedError`, `MapFailedError`, `OpenError`.
    """
    if not isinstance(source, Source):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"source must be a Source, not {type(source).__name__}")
    required = Granularity(required_granularity)
    share = Sharing(sharing)
    protect = Protection(protection)
    page = int(lib.apm_page_size())
    start = operator.index(offset)
    if protect & ~(Protection.EXEC | Protection.READ | Protection.WRITE):
        raise InvalidSourceError("protection has bits that are none of Protection", code=ErrorCode.INVALID_PROT_FLAG)
    if start < 0:
        raise OutOfRangeError(f"offset must be 0 or more, not {start}", code=ErrorCode.OFFSET_OUT_OF_RANGE)
    if start % page:
        raise OutOfRangeError(
            f"offset {start} is not a multiple of the page size ({page})", code=ErrorCode.OFFSET_UNALIGNED
        )
    if length is not None:
        if operator.index(length) <= 0:
            raise OutOfRangeError(f"length must be above 0, not {length}", hint="None maps to the end.")
        if length % page:
            raise OutOfRangeError(
                f"length {length} is not a multiple of the page size ({page})",
                code=ErrorCode.LENGTH_UNALIGNED,
                hint="None maps to the end of the file.",
            )

    async def begin() -> Map:
        opened = None if source.is_anonymous else await source.opened()
        size = await source.size() if opened is None else opened.size
        if opened is not None and share is Sharing.SHARED and protect & Protection.WRITE & ~opened.access:
            raise error_of(ErrorCode.NO_ACCESS, f"mapping {source!r}", source.path)
        if opened is not None and size == 0:
            raise error_of(ErrorCode.SOURCE_EMPTY, f"mapping {source!r}")
        if start >= size:
            raise error_of(ErrorCode.OFFSET_OUT_OF_RANGE, f"mapping {source!r} of {size} bytes at {start}")
        count = size - start if length is None else length
        if count > size - start:
            raise error_of(ErrorCode.MAP_RANGE, f"mapping {source!r} of {size} bytes: {count} from {start} on")
        return await _map(
            opened,
            source,
            offset=start,
            length=count,
            sharing=share,
            protection=protect,
            required=required,
            keep_cache=keep_cache,
        )

    return Opening("apmem2.map_new", begin)


@overload
def map_from_existing(
    buffer: Buffer, /, *, source: Source | None = None, granularity: Granularity | None = None
) -> Opening[Map]: ...
@overload
def map_from_existing(
    address: int, length: int, /, *, source: Source | None = None, granularity: Granularity | None = None
) -> Opening[Map]: ...
def map_from_existing(
    where: Any,
    length: int | None = None,
    /,
    *,
    source: Source | None = None,
    granularity: Granularity | None = None,
) -> Opening[Map]:
    """Adopt a mapping that somebody else made. Await it, or `async with`.

    buffer: `mmap.mmap`, `numpy.memmap` or a contiguous slice of it, a ctypes or cffi buffer, any buffer, writable or
    not, that lies in a shared mapping. It is held, so that it cannot be closed beneath the map, until `aclose`. Or
    address and length in bytes: a raw address cannot be held; whoever owns it must keep it mapped until `aclose`.
    source: what is mapped there; None: found through the kernel's own tables. granularity: what is claimed, None: found
    out.

    The whole range must be mapped, shared, and of the source; it must overlap no registered map (half-open byte
    intervals: touching is allowed). `aclose` ends the object and never unmaps. Advice and cached pages of the mapping
    are not touched.

    Durability: nothing by itself; what happened before the adoption cannot be known.
    Raises: `MappingExistsError` (`.existing`), `PrivateMemoryError`, `NotMappedError`, `OtherFileError`,
    `GranularityNotSupportedError` (a claim finer than the kernel grants), `OutOfRangeError`, `MapFailedError`.
    """
    if source is not None and not isinstance(source, Source):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"source must be a Source, not {type(source).__name__}")
    claimed = -1 if granularity is None else int(Granularity(granularity))
    if isinstance(where, int):
        if length is None:
            raise TypeError("map_from_existing(address) needs a length as well")
        size = operator.index(length)
        if where <= 0 or size <= 0 or where + size > 1 << 64:
            code = ErrorCode.ADDRESS_NULL if where == 0 else ErrorCode.LENGTH_OUT_OF_RANGE
            raise OutOfRangeError(
                f"{size} bytes at {where:#x} are no range of memory: empty, at 0, or beyond the address space",
                code=code,
            )
        held = raw(where, size)
    else:
        if length is not None:
            raise TypeError("map_from_existing(buffer) takes no length: adopt a slice of the buffer")
        held = pin(where)
        if held.size == 0:
            raise OutOfRangeError("an empty buffer cannot be adopted")
    del where

    async def begin() -> Map:
        try:
            return await _adopt(held, source, claimed)
        except BaseException:
            held.release()
            raise

    return Opening("apmem2.map_from_existing", begin)


async def _adopt(held: Pin, source: Source | None, claimed: int) -> Map:
    address, size = held.address, held.size
    what = f"adopting {size} bytes at {address:#x}"
    opened = None if source is None or source.is_anonymous else await source.opened()
    request = ffi.new("struct apm_adopt_request *")
    request.address = address
    request.length = size
    request.file = opened.pointer if opened else ffi.NULL
    request.claimed = claimed

    def name() -> str:
        return os.fsdecode(ffi.string(request.path))

    def fail(code: int) -> PmemError:
        if code == ErrorCode.GRANULARITY_NOT_SUPPORTED:
            granted = Granularity(int(request.granularity)).name
            error = error_of(code, what)
            return type(error)(f"{what}: {Granularity(claimed).name} was claimed and only {granted} is granted")
        where = f"{what} (from {int(request.bad_address):#x} on)" if request.bad_address != address else what
        return failed_before(code, int(request.cause), where, opened.path if opened else name() or None)

    def undo() -> None:
        lib.apm_map_disown(request.map)
        lib.apm_map_release(request.map)

    # Waited for to its end even when cancelled: it takes microseconds, and the caller's buffer must be free after it.
    await runtime.control(lib.APM_JOB_ADOPT, request, fail, undo=undo, keep=(held, opened), to_the_end=True)
    if source is not None and source.is_anonymous and not _is_anonymous_name(name()):
        undo()
        raise OtherFileError(f"{what}: a file is mapped there ({name()}), not anonymous memory")
    path = source.path if source is not None else name() or None
    made = Map(request.map, source or adopted_source(name(), size), path, held)
    try:
        async with _registry.lock:
            made._interval = await _claim(made, what)  # pyright: ignore[reportPrivateUsage]
    except BaseException:
        made.drop("it was never registered")
        raise
    _warn_of_durability(made)
    return made


def _is_anonymous_name(name: str) -> bool:
    return name.startswith(("/dev/zero", "/memfd:", "/SYSV", "[anon_shmem"))


async def _claim(made: Map, what: str) -> Interval[Map]:
    """Register an adopted range, with the registry's lock held; entries that are mapped no more are dropped."""
    while True:
        interval = _registry.add(made, made.address, made.size)
        if interval is not None:
            return interval
        other = _registry.overlapping(made.address, made.size)
        if other is None:
            continue
        existing: Map | None = other.owner()
        if existing is None:
            _registry.remove(other)
            continue
        if not existing.pointer.adopted or await _still_there(existing):
            if existing._closed:  # pyright: ignore[reportPrivateUsage]
                continue  # by another thread, just now; one that is still closing is still there
            raise MappingExistsError(
                f"{what}: [{existing.address:#x}, {existing.address + existing.size:#x}) is registered already",
                existing=existing,
            )
        _drop_stale(other)


async def _still_there(existing: Map) -> bool:
    request = ffi.new("struct apm_check_request *")

    def fail(code: int) -> PmemError:
        return error_of(code, "looking at the kernel's table of mappings")

    await runtime.control(lib.APM_JOB_CHECK, request, fail, keep=existing, handle=existing.handle, to_the_end=True)
    return bool(request.still_there)
