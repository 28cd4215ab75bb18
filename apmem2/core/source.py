"""What is mapped: a file by path or descriptor, or anonymous memory; and what this process knows of the file."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from dataclasses import dataclass
from errno import ENOENT
from typing import Any, ClassVar

from apmem2.core import runtime
from apmem2.core.errors import ErrorCode, OutOfRangeError, PmemError, SizeMismatchError, error_of
from apmem2.core.granularity import Protection
from apmem2.native import ffi, lib

StrPath = str | os.PathLike[str]


class OpenFile:
    """One file of this process, by (device, inode): its name and its first failure (law 4)."""

    __slots__ = ("__weakref__", "_failure", "path")

    _known: ClassVar[weakref.WeakValueDictionary[tuple[int, int], OpenFile]] = weakref.WeakValueDictionary()
    _lock = threading.RLock()  # a collection may come inside it, and with it a map that looks at its file

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._failure: PmemError | None = None

    @classmethod
    def of(cls, pointer: Any, path: str | None) -> OpenFile:
        """The one object for a file of the core; its serial changes when it is opened anew after a failure."""
        key = (int(ffi.cast("uintptr_t", pointer)), int(pointer.serial))
        with cls._lock:
            found = cls._known.get(key)
            if found is None:
                found = cls._known[key] = cls(path)
            elif found.path is None:
                found.path = path
            return found

    @property
    def failure(self) -> PmemError | None:
        """The first failure of a sync, or None."""
        return self._failure

    def latch(self, error: PmemError) -> PmemError:
        """Remember error unless there is an earlier one; the earliest comes back."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            return self._failure


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that was opened for mapping. `pointer`: struct apm_file with one reference; sizes in bytes."""

    pointer: Any
    size: int
    access: Protection
    path: str | None
    created: bool


def failed_before(code: int, cause: int, what: str, path: str | None) -> PmemError:
    """The error for code; when it says that the file failed earlier, with that first failure as its cause."""
    error = error_of(code, what, path)
    if code in (ErrorCode.FILE_FAILED, ErrorCode.CACHE_NOT_DROPPED) and cause:
        error.__cause__ = error_of(cause, "an earlier sync", path)
    return error


async def open_file(
    path: str | None,
    *,
    fd: int = -1,
    flags: int = 0,
    mode: int = 0o600,
    size: int = 0,
    access: Protection | None = None,
) -> Opened:
    """Open, create or grow a file in the pool. The core's manual (APM_JOB_OPEN) says how."""
    what = f"opening {path!r}" if path is not None else f"opening descriptor {fd}"
    request = ffi.new("struct apm_open_request *")
    encoded = None if path is None else ffi.new("char[]", os.fsencode(path))
    request.path = ffi.NULL if encoded is None else encoded
    request.fd = fd
    request.flags = flags
    request.mode = mode
    request.size = size

    def fail(code: int) -> PmemError:
        if code == ErrorCode.SIZE_MISMATCH:
            found = int(request.file_size)
            message = f"{what}: the file has {found} bytes, not {size}"
            hint = None if size > found else "Leave size out to take the file as it is; files are never cut here."
            return SizeMismatchError(message, expected=size, found=found, hint=hint)
        error = failed_before(code, int(request.cause), what, path)
        if code == -ENOENT and flags & lib.APM_OPEN_CREATE:
            error.hint = f"Make the directory first: {os.path.dirname(path or '') or '.'}"
        elif code == -ENOENT:
            error.hint = "It was not to be created: give a size (and create=True) for that, or look at the path."
        return error

    def undo() -> None:
        lib.apm_file_release(request.file)

    try:
        await runtime.control(lib.APM_JOB_OPEN, request, fail, undo=undo, keep=encoded)
    except BaseException:
        request.abandoned = 1  # a creation under way stops at its next piece and leaves nothing
        raise
    return Opened(
        pointer=ffi.gc(request.file, lib.apm_file_release),
        size=int(request.file_size),
        access=Protection(int(request.access)) if access is None else access,
        path=path,
        created=bool(request.created),
    )


class Source:
    """What is mapped. Plain and reusable: for many maps, in any loop and thread; nobody closes it.

    Made by `from_fd`, `from_path` or `anonymous`, which touch nothing. The file is looked at when it is used first.
    """

    __slots__ = ("_access", "_fd", "_held", "_path", "_size")

    def __init__(self, *, fd: int = -1, path: str | None = None, size: int = 0) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._held: Any = None  # of from_fd: our own description, from the first use on
        self._access: Protection | None = None

    @classmethod
    def from_fd(cls, fd: int) -> Source:
        """The file behind a descriptor of the caller's.

        fd: open for reading, and for writing if it is to be mapped so. It is re-opened in the pool at the first use,
        not needed after that, and never closed.
        """
        if isinstance(fd, bool):
            raise TypeError("fd must be a descriptor, not bool")
        number = operator.index(fd)
        if number < 0:
            raise ValueError(f"a descriptor is a whole number from 0 on, not {fd!r}")
        return cls(fd=number)

    @classmethod
    def from_path(cls, path: StrPath) -> Source:
        """A regular file by its path (a symbolic link is not followed). Looked up anew at each use."""
        name = os.fspath(path)
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"path must be str or os.PathLike[str], not {type(path).__name__}")
        if "\0" in name:
            raise ValueError("a path has no null byte")
        return cls(path=name)

    @classmethod
    def anonymous(cls, size: int) -> Source:
        """Memory of size bytes without a file. Its durability is NONE."""
        if isinstance(size, bool) or not isinstance(size, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"size must be a whole number, not {type(size).__name__}")
        if not 0 < size < 1 << 63:
            raise OutOfRangeError(f"anonymous memory needs a size from 1 to 2**63 - 1, not {size}")
        return cls(size=size)

    @property
    def path(self) -> str | None:
        """The path that it was made from, or None."""
        return self._path

    @property
    def is_anonymous(self) -> bool:
        """No file behind it."""
        return self._path is None and self._fd < 0 and self._held is None

    async def size(self) -> int:
        """Bytes of the file now, or of the anonymous memory."""
        return self._size if self.is_anonymous else (await self.opened()).size

    async def alignment(self) -> int:
        """Bytes of which the offset and an explicit length of a mapping must be multiples."""
        if not self.is_anonymous:
            await self.opened()
        return int(lib.apm_page_size())

    async def opened(self) -> Opened:
        """The file, opened with this process's one description of it. Not for anonymous memory."""
        if self._path is not None:
            flags = lib.APM_OPEN_READ_ENOUGH | lib.APM_OPEN_FOREIGN_OWNER
            return await open_file(self._path, flags=flags)
        fd = self._fd if self._held is None else int(self._held.fd)
        opened = await open_file(None, fd=fd, access=self._access)
        self._held, self._access = opened.pointer, opened.access
        return opened

    def __repr__(self) -> str:
        if self._path is not None:
            return f"Source.from_path({self._path!r})"
        return f"Source.anonymous({self._size})" if self.is_anonymous else f"Source.from_fd({self._fd})"


def adopted_source(name: str, length: int) -> Source:
    """The source of a mapping that somebody else made, from the name that the kernel gives it.

    A file that has no name any more keeps the kernel's word for it, and cannot be opened again.
    """
    return Source(size=length) if is_anonymous_name(name) else Source(path=name)


def is_anonymous_name(name: str) -> bool:
    """Does the kernel call anonymous shared memory so?"""
    return not name or name.startswith(("/dev/zero", "/SYSV", "[anon_shmem"))
