"""How does a map come to be? `open` and `map_new` make one, `map_from_existing` adopts somebody else's mapping."""

from __future__ import annotations

import os
from typing import Any, overload

from apmem2.core import runtime
from apmem2.core.errors import (
    DurabilityWarning,
    ErrorCode,
    InvalidSourceError,
    MappingExistsError,
    OtherFileError,
    OutOfRangeError,
    PmemError,
    error_of,
    warn_caller,
)
from apmem2.core.granularity import Durability, Granularity, Protection, Sharing
from apmem2.core.mapping import Map, registry
from apmem2.core.opening import Opening
from apmem2.core.ranges import Buffer, Pin, is_number, pin, raw, whole
from apmem2.core.registry import Interval
from apmem2.core.source import (
    Opened,
    Source,
    StrPath,
    adopted_source,
    failed_before,
    is_anonymous_name,
    open_file,
)
from apmem2.native import ffi, lib


def _warn_of_durability(found: Map) -> None:
    word = os.environ.get("PMEM2_FORCE_GRANULARITY")
    if word and lib.apm_forced_granularity() < 0:
        warn_caller(
            f"PMEM2_FORCE_GRANULARITY={word!r} is none of BYTE, CACHE_LINE and PAGE: it is ignored",
            RuntimeWarning,
            found,
        )
    if found.durability is Durability.POWER_LOSS:
        return
    meaning = "does not survive" if found.durability is Durability.NONE else "is not known to survive"
    try:
        warn_caller(f"{found!r}: what is persisted here {meaning} a power cut", DurabilityWarning, found)
    except BaseException:  # warnings are errors here: nobody gets the map, so nobody would close it
        found.drop("its warning was raised as an error")
        raise


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
    async with registry.lock:
        while True:
            interval = registry.add(made, made.address, made.size)
            if interval is not None:
                break
            # The kernel gave us this address, so whatever is registered there is not mapped any more.
            stale = registry.overlapping(made.address, made.size)
            if stale is not None:
                _drop_stale(stale)
        made.registered(interval)
    _warn_of_durability(made)
    return made


def _drop_stale(interval: Interval[Map]) -> None:
    owner: Map | None = interval.owner()
    registry.remove(interval)
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
    wanted = 0 if size is None else whole(size, "size")
    if not 0 <= whole(mode, "mode") <= 0o777:
        raise ValueError(f"mode must be permission bits from 0 to 0o777, not {mode:#o}")
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
    start = whole(offset, "offset")
    if protect & ~(Protection.EXEC | Protection.READ | Protection.WRITE):
        raise InvalidSourceError(
            "protection has bits that are none of Protection",
            code=ErrorCode.INVALID_PROT_FLAG,
            hint="Combine Protection.READ, WRITE and EXEC.",
        )
    if start < 0:
        raise OutOfRangeError(f"offset must be 0 or more, not {start}", code=ErrorCode.OFFSET_OUT_OF_RANGE)
    if start % page:
        raise OutOfRangeError(
            f"offset {start} is not a multiple of the page size ({page})", code=ErrorCode.OFFSET_UNALIGNED
        )
    if length is not None:
        if whole(length, "length") <= 0:
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
    are not touched: where the file was read or written in large pieces, a persist of one page may write up to 2 MiB
    (`Map.write_amplification` measures it, `Map.split_folios` cures it; `memcpy` never does).

    Durability: nothing by itself; what happened before the adoption cannot be known. The name and size of a file that
    somebody else made are theirs to make durable: fsync it and its directory once (what `open` makes is durable).
    Raises: `MappingExistsError` (`.existing`), `PrivateMemoryError`, `NotMappedError`, `OtherFileError`,
    `GranularityNotSupportedError` (a claim finer than the kernel grants), `OutOfRangeError`, `MapFailedError`.
    """
    if source is not None and not isinstance(source, Source):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"source must be a Source, not {type(source).__name__}")
    claimed = -1 if granularity is None else int(Granularity(granularity))
    if is_number(where):
        where = whole(where, "address")
        if length is None:
            raise TypeError("map_from_existing(address) needs a length as well")
        size = whole(length, "length")
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
    if source is not None and source.is_anonymous and not is_anonymous_name(name()):
        undo()
        raise OtherFileError(f"{what}: a file is mapped there ({name()}), not anonymous memory")
    path = source.path if source is not None else name() or None
    made = Map(request.map, source or adopted_source(name(), size), path, held)
    try:
        async with registry.lock:
            made.registered(await _claim(made, what))
    except BaseException:
        made.drop("it was never registered")
        raise
    _warn_of_durability(made)
    return made


async def _claim(made: Map, what: str) -> Interval[Map]:
    """Register an adopted range, with the registry's lock held; entries that are mapped no more are dropped."""
    while True:
        interval = registry.add(made, made.address, made.size)
        if interval is not None:
            return interval
        other = registry.overlapping(made.address, made.size)
        if other is None:
            continue
        existing: Map | None = other.owner()
        if existing is None:
            registry.remove(other)
            continue
        if not existing.pointer.adopted or await _still_there(existing):
            if existing.ended:
                continue  # by another thread, just now; one that is still closing is still there
            raise MappingExistsError(
                f"{what}: [{existing.address:#x}, {existing.address + existing.size:#x}) is registered already",
                existing=existing,
            )
        _drop_stale(other)


async def _still_there(existing: Map) -> bool:
    request = ffi.new("struct apm_check_request *")

    owner = existing.memory()
    if owner is None:
        return False

    def fail(code: int) -> PmemError:
        return error_of(code, "looking at the kernel's table of mappings")

    await runtime.control(
        lib.APM_JOB_CHECK, request, fail, keep=(existing, owner), handle=existing.handle, to_the_end=True
    )
    return bool(request.still_there)
