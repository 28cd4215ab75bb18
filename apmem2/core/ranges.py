"""Which bytes of memory does a buffer touch? Of contiguous, strided and many-dimensional buffers."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import operator
import re
from collections.abc import Iterator
from typing import Any, Protocol

from apmem2.native import ffi


class SupportsBuffer(Protocol):
    """What type checkers know as a buffer (collections.abc.Buffer from Python 3.12 on)."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class SupportsArrayInterface(Protocol):
    """numpy's arrays, which declare `__buffer__` from Python 3.12 on only."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Buffer = SupportsBuffer | SupportsArrayInterface
"""Anything with the buffer protocol. For type checkers: at run time the buffer is simply asked for."""

_FULL_READ_ONLY = 0x11C  # PyBUF_FULL_RO


class _PyBuffer(ctypes.Structure):
    """Py_buffer, which belongs to the stable ABI since Python 3.11. Only buf is read."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def whole(value: Any, name: str) -> int:
    """A whole number (Python's or numpy's, no bool), or a TypeError that names the parameter."""
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is bool or not hasattr(kind, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {kind.__name__}")
    return operator.index(value)


def is_number(value: object) -> bool:
    """Is it meant as a number? numpy's integers have the buffer protocol as well."""
    return hasattr(type(value), "__index__") and not hasattr(type(value), "__setitem__")


def numbers(buffer: Any) -> Any:
    """The buffer; numpy's times as the numbers that they are, because the buffer protocol has no word for them."""
    kind = getattr(getattr(buffer, "dtype", None), "kind", "")
    return buffer.view("i8") if kind in ("m", "M") else buffer


def as_view(buffer: Any, name: str) -> memoryview:
    """The buffer as a memoryview. A TypeError that names the parameter where there is none; pointers are refused."""
    try:
        view = memoryview(numbers(buffer))
    except TypeError:
        raise TypeError(
            f"{name} must be a buffer (bytes, memoryview, numpy array, mmap ...), not {type(buffer).__name__}"
        ) from None
    if "O" in view.format and "O" in re.sub(":[^:]*:", "", view.format):
        raise ValueError(f"{name} holds Python objects: their addresses mean nothing in a file")
    return view


class Pin:
    """A hold on somebody's buffer: while it lives, the buffer cannot be closed. Over a raw address it holds nothing."""

    __slots__ = ("address", "cdata", "read_only", "size")

    def __init__(self, address: int, size: int, cdata: Any, read_only: bool) -> None:
        self.address = address
        self.size = size
        self.cdata = cdata
        self.read_only = read_only

    def release(self) -> None:
        """Let go of the buffer now, whoever still holds this object (a traceback may)."""
        if self.cdata is not None:
            ffi.release(self.cdata)

    def memory(self) -> memoryview:
        """All of it, format "B": a view of the buffer itself, of the bare address only where that is all there is."""
        cdata = ffi.cast("char *", self.address) if self.cdata is None else self.cdata
        view = memoryview(ffi.buffer(cdata, self.size))
        return view.toreadonly() if self.read_only else view


def raw(address: int, size: int) -> Pin:
    """A raw address: the caller keeps it mapped."""
    return Pin(address, size, None, False)


def pin(buffer: Any) -> Pin:
    """Hold a contiguous buffer."""
    view = as_view(buffer, "buffer")
    buffer = numbers(buffer)
    if not view.contiguous:
        raise ValueError("only a contiguous buffer can be adopted: adopt the whole array, persist slices of it")
    read_only = view.readonly
    if not view.c_contiguous:
        buffer = buffer.T  # Fortran order, an array's: its transpose is the same memory in C order
    view.release()
    held = ffi.from_buffer("char[]", buffer)
    below = _below(buffer)

    def let_go(_: Any) -> None:
        ffi.release(held)
        for lower in below:
            lower.release()

    cdata = ffi.gc(ffi.cast("char *", held), let_go)  # views are made of this one: they hold what is below as well
    return Pin(int(ffi.cast("uintptr_t", held)), len(held), cdata, read_only)


def _below(buffer: Any) -> list[memoryview]:
    """Holds on what a buffer lies on: numpy keeps an mmap below its arrays alive, but lets it be closed."""
    found: list[memoryview] = []
    while buffer is not None:
        buffer = buffer.obj if isinstance(buffer, memoryview) else getattr(buffer, "base", None)
        with contextlib.suppress(TypeError, ValueError, BufferError):
            found.append(memoryview(buffer))
    return found


class Pieces:
    """Data that is not contiguous, in pieces along its first dimension: (place in bytes, piece). `size`: all bytes."""

    __slots__ = ("_count", "_data", "_each", "size")

    def __init__(self, data: Any, view: memoryview, piece_bytes: int) -> None:
        self._data = data
        self._count = (view.shape or (1,))[0]
        self.size = view.nbytes
        self._each = max(1, piece_bytes * self._count // view.nbytes)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        row = self.size // self._count
        for first in range(0, self._count, self._each):
            yield first * row, self._data[first : first + self._each]


def pieces_of(data: Any, piece_bytes: int) -> Pieces | None:
    """How to copy data that is not contiguous without standing still for all of it. None: contiguous, or short."""
    view = as_view(data, "data")
    if view.c_contiguous or view.nbytes <= piece_bytes or (view.shape or (1,))[0] <= 1:
        return None
    if view.ndim > 1 and not hasattr(data, "dtype"):
        return None  # a memoryview of several dimensions cannot be sliced
    return Pieces(data, view, max(piece_bytes, 1))


def _first_element(buffer: Any) -> int:
    """The address of element 0. Asked through the buffer protocol's own door: no other one takes strided buffers."""
    found = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(found), _FULL_READ_ONLY)
    address = found.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))
    return address


class Touched:
    """The memory that a buffer touches: `address` and `size` of its hull, iterated as blocks (address, size).

    Gaps smaller than unit (bytes, the persist's granularity) are closed, because every unit in them is touched.
    """

    __slots__ = ("_block", "_steps", "address", "size")

    def __init__(self, buffer: Any, unit: int) -> None:
        view = as_view(buffer, "buffer")
        buffer = numbers(buffer)
        if view.suboffsets:
            raise ValueError("buffers with suboffsets are not supported")
        self._steps: list[tuple[int, int]] = []
        if view.nbytes == 0 or view.c_contiguous:
            cdata = ffi.from_buffer(buffer)
            self.address = int(ffi.cast("uintptr_t", cdata))
            self._block = self.size = view.nbytes
            return
        self.address = _first_element(buffer)
        self._block = view.itemsize
        reach = view.itemsize
        dimensions = list(zip(view.shape or (), view.strides or (), strict=True))
        for count, stride in sorted(dimensions, key=lambda dimension: abs(dimension[1])):
            if stride < 0:
                self.address += stride * (count - 1)
            step = abs(stride)
            reach += step * (count - 1)
            if count > 1 and not self._steps and step <= max(self._block, unit):
                self._block += step * (count - 1)
            elif count > 1:
                self._steps.append((count, step))
        self.size = reach

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self._block == 0:
            return
        offsets = (range(0, count * step, step) for count, step in reversed(self._steps))
        for combination in itertools.product(*offsets):
            yield self.address + sum(combination), self._block
