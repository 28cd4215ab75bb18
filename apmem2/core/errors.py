"""What can go wrong, who is at fault, and what to do: one tree under `PmemError`.

Every class carries `code` (an `ErrorCode`, or the negative errno of the system call that failed) and `hint` (the
cure), and is also the built-in exception that a caller would catch.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import IntEnum
from errno import (
    EACCES,
    EBADF,
    EBUSY,
    EDQUOT,
    EEXIST,
    EINVAL,
    EIO,
    EISDIR,
    ELOOP,
    ENOENT,
    ENOMEM,
    ENOSPC,
    ENOTDIR,
    ENXIO,
    EPERM,
    EROFS,
)
from typing import Any, ClassVar

from apmem2.native import ffi, lib


class ErrorCode(IntEnum):
    """Codes that are not an errno. Down to -100,037 they have libpmem2's numbers, names and meaning."""

    UNKNOWN = -100000
    NOSUPP = -100001
    FILE_HANDLE_NOT_SET = -100003
    INVALID_FILE_HANDLE = -100004
    INVALID_FILE_TYPE = -100005
    MAP_RANGE = -100006
    MAPPING_EXISTS = -100007
    GRANULARITY_NOT_SET = -100008
    GRANULARITY_NOT_SUPPORTED = -100009
    OFFSET_OUT_OF_RANGE = -100010
    OFFSET_UNALIGNED = -100011
    LENGTH_UNALIGNED = -100015
    MAPPING_NOT_FOUND = -100016
    SOURCE_EMPTY = -100018
    INVALID_SHARING_VALUE = -100019
    ADDRESS_NULL = -100023
    LENGTH_OUT_OF_RANGE = -100030
    INVALID_PROT_FLAG = -100031
    NO_ACCESS = -100032

    FORKED = -101001
    STOPPED = -101002
    WITHDRAWN = -101003
    FILE_FAILED = -101004
    FILE_SHRANK = -101005
    SIZE_MISMATCH = -101006
    FOREIGN_OWNER = -101007
    NOT_MAPPED = -101008
    PRIVATE_MEMORY = -101009
    OTHER_FILE = -101010
    CACHE_NOT_DROPPED = -101011
    NOT_CONTIGUOUS = -101012
    CLOSED = -101013


_NOT_THE_CALLER = {"apmem2", "asyncio", "contextlib"}


class DurabilityWarning(UserWarning):
    """A map whose persists do not survive a power cut, or of which that is not known. Given once per map."""


def warn_caller(message: str, category: type[Warning], source: object) -> None:
    """Warn at the line of whoever called into the package: between it and here lie any number of frames."""
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, source=source, stacklevel=level)


class PmemError(Exception):
    """Any error of apmem2. `code`: `ErrorCode` or negative errno. `hint`: what to do about it, may be empty."""

    default_code: ClassVar[int] = ErrorCode.UNKNOWN
    default_hint: ClassVar[str] = ""
    default_errno: ClassVar[int] = EIO

    def __init__(
        self,
        message: str = "",
        *,
        code: int | None = None,
        hint: str | None = None,
        errno: int | None = None,
        filename: str | None = None,
    ) -> None:
        if isinstance(self, OSError):
            number = self.default_errno if errno is None else errno
            arguments: tuple[Any, ...] = (number, message) if filename is None else (number, message, filename)
        else:
            arguments = (message,)
        super().__init__(*arguments)
        self._message = message
        self.code: int = self.default_code if code is None else code
        self.hint: str = self.default_hint if hint is None else hint

    def __str__(self) -> str:
        return f"{self._message}. {self.hint}" if self.hint else self._message

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self.args
        if isinstance(self, OSError) and self.filename is not None:
            arguments = (*arguments, self.filename)  # OSError takes it out of args
        return (_rebuild, (type(self), arguments, self.__dict__.copy()))


def _rebuild(kind: type[PmemError], arguments: tuple[Any, ...], state: dict[str, Any]) -> PmemError:
    base: Any = OSError if issubclass(kind, OSError) else Exception  # whose constructor kind uses
    error: PmemError = base.__new__(kind, *arguments)
    base.__init__(error, *arguments)
    error.__dict__.update(state)
    return error


# ---- the caller asked for what cannot be -----------------------------------------------------------------------


class OutOfRangeError(PmemError, ValueError):
    """An offset, size or buffer that does not lie inside the map or the file."""

    default_code = ErrorCode.LENGTH_OUT_OF_RANGE


class InvalidSourceError(PmemError, ValueError):
    """Something that cannot be mapped: a directory by descriptor, a pipe, a socket, a write-only descriptor."""

    default_code = ErrorCode.INVALID_FILE_TYPE
    default_hint = "Map a regular file that is open for reading."


class AccessError(PmemError, PermissionError):
    """The source does not allow the protection that was asked for, or the file belongs to another user."""

    default_code = ErrorCode.NO_ACCESS
    default_errno = EACCES


class SizeMismatchError(PmemError, ValueError):
    """An existing file has another size than was asked for. `.expected` and `.found` in bytes."""

    default_code = ErrorCode.SIZE_MISMATCH
    default_hint = "Leave size out to take the file as it is, or say grow=True to make it longer."

    def __init__(self, message: str = "", *, expected: int = 0, found: int = 0, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.expected = expected
        self.found = found


class GranularityNotSupportedError(PmemError, ValueError):
    """The medium grants only a coarser granularity than was required or claimed."""

    default_code = ErrorCode.GRANULARITY_NOT_SUPPORTED
    default_hint = "Accept Granularity.PAGE, or map a file on a DAX file system."


class MappingExistsError(PmemError, FileExistsError):
    """The range overlaps one that is registered already: `.existing` is that map."""

    default_code = ErrorCode.MAPPING_EXISTS
    default_errno = EEXIST
    default_hint = "Use the existing map (.existing), or close it first."

    def __init__(self, message: str = "", *, existing: Any = None, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.existing = existing

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (kind, arguments, state) = super().__reduce__()
        return (rebuild, (kind, arguments, {**state, "existing": None}))  # a map stays in its process


class NotMappedError(PmemError, ValueError):
    """Part of the range is not mapped (any more)."""

    default_code = ErrorCode.NOT_MAPPED
    default_hint = "Keep the owner of the mapping alive while the map is in use."


class PrivateMemoryError(PmemError, ValueError):
    """Memory that never reaches a file: heap, stack, or a MAP_PRIVATE mapping."""

    default_code = ErrorCode.PRIVATE_MEMORY
    default_hint = "Adopt a shared mapping: mmap.mmap(fd, n), numpy.memmap(path, mode='r+')."


class OtherFileError(PmemError, ValueError):
    """The range is mapped from another file than the given source, or from several."""

    default_code = ErrorCode.OTHER_FILE
    default_hint = "Leave source out to have it found, or give the file that is mapped there."


# ---- the moment ---------------------------------------------------------------------------------------------------


class ClosedError(PmemError, ValueError):
    """Used after `aclose()`, or after its mapping was found gone."""

    default_code = ErrorCode.CLOSED


class ForkedError(PmemError, RuntimeError):
    """Used in a child of the process that started the runtime. Nothing of it works there."""

    default_code = ErrorCode.FORKED
    default_hint = "Open maps after forking, or start processes with spawn or exec."


class PoolError(PmemError, OSError):
    """The pool cannot take work: no thread could be started, or the interpreter is exiting."""

    default_code = ErrorCode.STOPPED
    default_errno = EBUSY


class OutOfMemoryError(PmemError, MemoryError):
    """The system has no memory, or no address space, for this."""

    default_code = -ENOMEM


class LockedError(PmemError, BlockingIOError):
    """A structure is open in another process."""

    default_code = ErrorCode.UNKNOWN
    default_errno = EBUSY


class LogFullError(PmemError, OSError):
    """The log's capacity is reached: nothing was written."""


class LogBusyError(PmemError, BlockingIOError):
    """The bound of bytes in flight is reached: nothing was accepted."""

    default_errno = EBUSY


class TrimmedError(PmemError, LookupError):
    """The record was there and has been trimmed."""


# ---- the world ------------------------------------------------------------------------------------------------------


class OpenError(PmemError, OSError):
    """A file could not be opened, created or mapped; `errno` and `filename` say why and which."""


class MissingFileError(OpenError, FileNotFoundError):
    """The file is not there, and was not to be created."""

    default_errno = ENOENT
    default_hint = "Look at the path."


class DirectoryError(OpenError, IsADirectoryError):
    """A directory stands where a file was asked for."""

    default_errno = EISDIR


class ParentError(OpenError, NotADirectoryError):
    """A part of the path is no directory."""

    default_errno = ENOTDIR


class FileAccessError(OpenError, PermissionError):
    """The system does not allow the file to be opened as asked."""

    default_errno = EACCES
    default_hint = (
        "Look at the permissions of the file, its directory and its file system; what may only be read can be mapped "
        "with map_new(..., protection=Protection.READ)."
    )


class PersistError(PmemError, OSError):
    """A sync or a write failed; `errno` and `filename` say how and where. The bytes may or may not be durable."""

    default_hint = "Close every map of this file; opening it anew shows what the disk really has."


class MapFailedError(PmemError, OSError):
    """An earlier sync of this file failed; `__cause__` is that failure. Nothing is written until it is opened anew."""

    default_code = ErrorCode.FILE_FAILED
    default_hint = "Close every map of this file; opening it anew shows what the disk really has."


# ---- the past -------------------------------------------------------------------------------------------------------


class CorruptionError(PmemError, ValueError):
    """Bytes on media are not what was written. `.path`, `.offset` (bytes) and `.seq` say where."""

    def __init__(self, message: str = "", *, path: str = "", offset: int = 0, seq: int = 0, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.path = path
        self.offset = offset
        self.seq = seq


class FormatVersionError(PmemError, ValueError):
    """The file was written by a newer version."""


class ReplicationError(PmemError, RuntimeError):
    """The engine has something else than was shipped, or another writer took over."""


# ---- from the core's codes -------------------------------------------------------------------------------------------

_OPEN_BY_ERRNO: dict[int, type[OpenError]] = {
    ENOENT: MissingFileError,
    EISDIR: DirectoryError,
    ENOTDIR: ParentError,
    EACCES: FileAccessError,
    EPERM: FileAccessError,
    EROFS: FileAccessError,
}

_BY_CODE: dict[int, tuple[type[PmemError], str]] = {
    ErrorCode.NOSUPP: (PmemError, "not supported"),
    ErrorCode.INVALID_FILE_HANDLE: (InvalidSourceError, "the descriptor is not open for reading"),
    ErrorCode.INVALID_FILE_TYPE: (InvalidSourceError, "not a regular file"),
    ErrorCode.MAP_RANGE: (OutOfRangeError, "the range ends after the file does"),
    ErrorCode.OFFSET_OUT_OF_RANGE: (OutOfRangeError, "the offset lies beyond the end of the file"),
    ErrorCode.OFFSET_UNALIGNED: (OutOfRangeError, "the offset is not a multiple of the page size"),
    ErrorCode.LENGTH_UNALIGNED: (OutOfRangeError, "the length is not a multiple of the page size"),
    ErrorCode.SOURCE_EMPTY: (OutOfRangeError, "the file is empty"),
    ErrorCode.INVALID_SHARING_VALUE: (InvalidSourceError, "not a value of Sharing"),
    ErrorCode.ADDRESS_NULL: (OutOfRangeError, "the address is 0"),
    ErrorCode.LENGTH_OUT_OF_RANGE: (OutOfRangeError, "the length is 0 or wraps around the address space"),
    ErrorCode.INVALID_PROT_FLAG: (InvalidSourceError, "not a value of Protection"),
    ErrorCode.NO_ACCESS: (AccessError, "the source does not allow this protection"),
    ErrorCode.GRANULARITY_NOT_SUPPORTED: (GranularityNotSupportedError, "the medium does not grant this granularity"),
    ErrorCode.FORKED: (ForkedError, "the runtime was started before the fork and is dead in this process"),
    ErrorCode.STOPPED: (PoolError, "the pool was stopped: the interpreter is exiting"),
    ErrorCode.FILE_FAILED: (MapFailedError, "an earlier sync of the file failed"),
    ErrorCode.FOREIGN_OWNER: (AccessError, "the file belongs to another user"),
    ErrorCode.NOT_MAPPED: (NotMappedError, "part of the range is not mapped"),
    ErrorCode.PRIVATE_MEMORY: (PrivateMemoryError, "the memory is private: nothing in it reaches a file"),
    ErrorCode.OTHER_FILE: (OtherFileError, "the range is mapped from another file"),
    ErrorCode.NOT_CONTIGUOUS: (OtherFileError, "the range spans mappings that do not continue each other in the file"),
    ErrorCode.CACHE_NOT_DROPPED: (MapFailedError, "a sync of this file failed and its cached pages cannot be dropped"),
}

_HINTS: dict[int, str] = {
    ErrorCode.FOREIGN_OWNER: "Say allow_foreign_owner=True if that is meant.",
    ErrorCode.NOT_CONTIGUOUS: "Adopt each mapping by itself.",
    ErrorCode.CACHE_NOT_DROPPED: "Something still maps it: unmap it everywhere, then open again.",
    ErrorCode.NO_ACCESS: "Open the descriptor read-write, or ask for Protection.READ.",
    ErrorCode.NOT_MAPPED: "Give address and length of memory that is mapped, and keep its owner alive.",
    -ENOSPC: "Nothing was made; free some space first.",
    -EDQUOT: "Nothing was made; free some space first.",
    -EINVAL: "This file cannot be mapped or synced like an ordinary one.",
    -EBADF: "The descriptor is not open.",
    -ELOOP: "Symbolic links are not followed: give the file itself.",
}


def code_name(code: int) -> str:
    """The name of an `ErrorCode` or of a negative errno ("EIO")."""
    name: bytes = ffi.string(lib.apm_error_name(code))
    return name.decode()


def errno_of(code: int) -> int:
    """The errno that goes best with a negative code of the core."""
    if code == ErrorCode.FILE_SHRANK:
        return ENXIO
    return -code if -4096 < code < 0 else EIO


def describe(code: int) -> str:
    """What a negative code says, as half a sentence."""
    if code == ErrorCode.FILE_SHRANK:
        return "the file ends before the range does: it was truncated"
    if code in _BY_CODE:
        return _BY_CODE[code][1]
    return os.strerror(-code) if -4096 < code < 0 else code_name(code)


def error_of(code: int, what: str, filename: str | None = None) -> PmemError:
    """The exception for a negative code that opening, mapping or adopting `what` gave."""
    message = f"{what}: {describe(code)}"
    if code in _BY_CODE:
        kind, _ = _BY_CODE[code]
        return kind(message, code=code, hint=_HINTS.get(code), filename=filename)
    if code == -ENOMEM:
        return OutOfMemoryError(message, code=code)
    kind = _OPEN_BY_ERRNO.get(-code, OpenError)
    return kind(message, code=code, hint=_HINTS.get(code), errno=errno_of(code), filename=filename)


def persist_error(code: int, what: str, filename: str | None) -> PmemError:
    """The exception for a negative code that a sync, a write or a drain gave."""
    message = f"{what}: {describe(code)}"
    if code == ErrorCode.NOT_MAPPED:
        return NotMappedError(message, code=code)
    if code in (ErrorCode.FORKED, ErrorCode.STOPPED):
        return error_of(code, what)
    full = code in (-ENOSPC, -EDQUOT)
    hint = "Free some space; files made with sparse=True need it when a page is stored into first." if full else None
    return PersistError(message, code=code, hint=hint, errno=errno_of(code), filename=filename)
