"""Sequences of copies, fills and stores through two maps of one file, against a bytearray.

The sources are what goes wrong: slices of the map itself and of the other map of the same file, overlapping the
destination either way, copied at the call or read by a thread of the pool.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import apmem2
from apmem2 import DurabilityWarning, Granularity, MemFlags, Source
from apmem2.core import config

PAGE = mmap.PAGESIZE
SIZE = 5 * PAGE + 100  # of the file: not a multiple of the page size
SHIFT = PAGE  # the second map begins one page into the file
COPIED = 300  # bytes up to which data is copied at the call, in these tests

Where = Literal["first", "second"]
WHERE = st.sampled_from(["first", "second"])
PLACE = st.one_of(st.integers(0, SIZE), st.integers(0, 64), st.integers(2 * PAGE - 20, 2 * PAGE + 20))
LENGTH = st.one_of(
    st.integers(0, 16), st.integers(COPIED - 2, COPIED + 2), st.integers(0, 3 * PAGE), st.integers(PAGE - 1, PAGE + 1)
)
FLAGS = st.sampled_from(
    [MemFlags(0), MemFlags(0), MemFlags.NODRAIN, MemFlags.NOFLUSH, MemFlags.NONTEMPORAL, MemFlags.WB | MemFlags.NODRAIN]
)


@dataclass(frozen=True)
class Copy:
    """memcpy (or memmove) of `length` bytes; a source of None is bytes of their own."""

    to: Where
    place: int
    source: Where | None
    source_place: int
    length: int
    flags: MemFlags
    move: bool


@dataclass(frozen=True)
class Fill:
    to: Where
    place: int
    value: int
    length: int
    flags: MemFlags


@dataclass(frozen=True)
class Store:
    to: Where
    place: int
    value: int
    length: int


@dataclass(frozen=True)
class Persist:
    to: Where
    place: int
    length: int
    flush: bool


OPERATIONS = st.lists(
    st.one_of(
        st.builds(Copy, WHERE, PLACE, st.one_of(WHERE, WHERE, st.none()), PLACE, LENGTH, FLAGS, st.booleans()),
        st.builds(Fill, WHERE, PLACE, st.integers(0, 255), LENGTH, FLAGS),
        st.builds(Store, WHERE, PLACE, st.integers(0, 255), st.integers(0, 40)),
        st.builds(Persist, WHERE, PLACE, LENGTH, st.booleans()),
    ),
    max_size=12,
)


def content(size: int, salt: int) -> bytes:
    """Bytes in which a shift by any number is seen."""
    return bytes((number * 7 + (number >> 8) * 13 + salt) & 0xFF for number in range(size))


async def run(path: Path, operations: list[Copy | Fill | Store | Persist]) -> None:
    model = bytearray(content(SIZE, 1))
    path.write_bytes(model)  # noqa: ASYNC240
    source = Source.from_path(path)
    required = Granularity.PAGE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)  # a forced granularity has one
        first = await apmem2.open(path)
        second = await apmem2.map_new(source, required_granularity=required, offset=SHIFT)
    maps = {"first": (first, 0), "second": (second, SHIFT)}

    def inside(where: Where, place: int, length: int) -> tuple[apmem2.Map, int, int, int]:
        """The map, and the range cut to it: offset in the map, offset in the file, length."""
        m, base = maps[where]
        start = min(place, m.size)
        return m, start, base + start, min(length, m.size - start)

    async with first, second:
        for salt, operation in enumerate(operations, 2):
            m, start, at, length = inside(operation.to, operation.place, operation.length)
            if isinstance(operation, Copy):
                if operation.source is None:
                    data: bytes | memoryview = content(length, salt)
                else:
                    other, from_start, _, length = inside(operation.source, operation.source_place, length)
                    data = other[from_start : from_start + length]
                expected = bytes(data)
                await (m.memmove if operation.move else m.memcpy)(start, data, operation.flags)
                del data
                model[at : at + length] = expected
            elif isinstance(operation, Fill):
                await m.memset(start, operation.value, length, operation.flags)
                model[at : at + length] = bytes([operation.value]) * length
            elif isinstance(operation, Store):
                m[start : start + length] = bytes([operation.value]) * length
                model[at : at + length] = bytes([operation.value]) * length
            elif operation.flush:
                await m.flush(start, length)
            else:
                await m.persist(start, length)
            assert bytes(first.view) == model
            assert bytes(second.view) == model[SHIFT:]
        await first.drain()
        await second.drain()
        await first.persist()
        assert path.read_bytes() == model  # noqa: ASYNC240
    assert path.read_bytes() == model  # noqa: ASYNC240


@pytest.fixture(params=["pages", "lines", "lines in the pool"])
def kind(request: pytest.FixtureRequest, forced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Granularity, and small bounds, so that small examples go every way."""
    if request.param != "pages":
        forced("CACHE_LINE")
    inline = 0 if request.param == "lines in the pool" else config.settle().inline_bytes_max
    bounds = replace(config.settle(), copy_bytes_max=COPIED, inline_bytes_max=inline)
    monkeypatch.setattr(config, "_settings", bounds)
    return str(request.param)


BACKWARDS = Copy("first", 100, "first", 0, 2 * PAGE, MemFlags(0), False)
FORWARDS = Copy("first", 0, "first", 100, 2 * PAGE, MemFlags(0), False)
BACKWARDS_ALIASED = Copy("first", SHIFT + 100, "second", 0, 2 * PAGE, MemFlags(0), False)
FORWARDS_ALIASED = Copy("second", 0, "first", SHIFT + 100, 2 * PAGE, MemFlags(0), True)


@given(operations=OPERATIONS)
@example(operations=[BACKWARDS])
@example(operations=[FORWARDS])
@example(operations=[BACKWARDS_ALIASED])
@example(operations=[FORWARDS_ALIASED])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_the_file_and_both_maps_are_what_the_operations_say(
    kind: str, directory: Path, operations: list[Copy | Fill | Store | Persist]
) -> None:
    asyncio.run(run(directory / "a", operations))


# ---- larger than one piece of work ----

BIG = 5 << 20
LENGTHS = [300 << 10, (1 << 20) + 1, (5 << 19) + 77]  # bytes: one bounce, two, three
DISTANCES = [1, 100, PAGE, (1 << 20) - 1, (1 << 20) + 1]


@pytest.mark.parametrize("granularity", ["PAGE", "CACHE_LINE"])
@pytest.mark.parametrize("source", ["same map", "other map"])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.asyncio
async def test_long_data_that_overlaps_its_destination_arrives_whole(
    granularity: str, source: str, direction: str, directory: Path, forced: Callable[[str], None]
) -> None:
    """Longer than `copy_bytes_max`: a thread of the pool reads it while it is overwritten."""
    forced(granularity)
    path = directory / "a"
    original = os.urandom(BIG)
    path.write_bytes(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)
        first = await apmem2.open(path)
        second = await apmem2.map_new(Source.from_path(path), required_granularity=Granularity.PAGE)
    async with first, second:
        model = bytearray(original)
        other = first if source == "same map" else second
        for length, distance in itertools.product(LENGTHS, DISTANCES):
            low, high = 1234, 1234 + distance
            start, to = (low, high) if direction == "up" else (high, low)
            model[to : to + length] = bytes(model[start : start + length])
            await first.memcpy(to, other[start : start + length])
            assert bytes(first.view) == model, (length, distance)
            assert path.read_bytes() == model
