"""What callers get wrong, and what they are told; and data of kinds that the buffer protocol has no word for."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apmem2
from tests.conftest import Faults, Recorder

SIZE = 1 << 20


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda m: m.memcpy(0, "abc"), TypeError, "data must be a buffer"),
        (lambda m: m.memcpy(0.5, b"x"), TypeError, "offset must be a whole number"),
        (lambda m: m.memcpy(True, b"x"), TypeError, "offset must be a whole number"),
        (lambda m: m.memset(0, 1, None), TypeError, "size must be a whole number"),
        (lambda m: m.memset(0, 256, 1), ValueError, "from 0 to 255"),
        (lambda m: m.persist(np.int64(1)), TypeError, "needs a size"),
        (lambda m: m.persist(None, 5), TypeError, "offset must be a whole number"),
        (lambda m: m.persist(np.zeros(4)), apmem2.OutOfRangeError, "numpy copies"),
        (lambda m: m.memcpy(0, np.array([object()])), ValueError, "Python objects"),
        (lambda m: m.memcpy(0, b"x", 1 << 10), ValueError, "MemFlags"),
    ],
)
async def test_a_wrong_argument_is_named(
    directory: Path, call: Callable[[apmem2.Map], Any], kind: type[Exception], says: str
) -> None:
    async with apmem2.open(directory / "a", size=SIZE) as m:
        with pytest.raises(kind, match=says):
            await call(m)
        assert bytes(m[0:16]) == bytes(16)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: apmem2.open("a", True), TypeError, "size must be"),
        (lambda: apmem2.open("a", 4096.0), TypeError, "size must be"),  # type: ignore[arg-type]
        (lambda: apmem2.open("a", 4096, mode=0o1777), ValueError, "permission bits"),
        (lambda: apmem2.Source.anonymous(True), TypeError, "size must be"),
        (lambda: apmem2.Source.from_fd(True), TypeError, "descriptor"),
        (lambda: apmem2.Source.anonymous(1 << 70), apmem2.OutOfRangeError, "2\\*\\*63"),
    ],
)
def test_a_wrong_argument_of_an_opener_is_named(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


@pytest.mark.asyncio
async def test_an_opener_that_is_taken_for_a_map_says_what_to_do(directory: Path) -> None:
    opening = apmem2.open(directory / "a", size=1)
    with pytest.raises(AttributeError, match="await"):
        _ = opening.persist
    with pytest.raises(TypeError, match="async with"), opening:
        pass
    await (await opening).aclose()


@pytest.mark.asyncio
async def test_a_missing_directory_is_told_from_a_missing_file(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Make the directory first"):
        await apmem2.open(directory / "no" / "a", size=1)
    with pytest.raises(FileNotFoundError, match="give a size"):
        await apmem2.open(directory / "a")


@pytest.mark.asyncio
async def test_times_of_numpy_are_copied_adopted_and_persisted(directory: Path) -> None:
    times = np.memmap(directory / "a", dtype="M8[s]", mode="w+", shape=(64, 64))
    async with apmem2.map_from_existing(times) as m:
        times[3] = np.datetime64("2026-01-01")
        await m.persist(times[3])
        await m.persist(times[:, 5])
        await m.memcpy(0, times[3])
        assert times[0, 0] == np.datetime64("2026-01-01")


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["strided", "Fortran", "rows"])
async def test_long_data_that_is_not_contiguous_arrives_whole(directory: Path, order: str) -> None:
    """Copied piece by piece: the loop gets its turns in between."""
    whole = np.arange(1 << 18, dtype="u4").reshape(512, 512)
    data = {"strided": whole.ravel()[::2], "Fortran": np.asfortranarray(whole), "rows": whole[:, :300]}[order]
    async with apmem2.open(directory / "a", size=1 << 21) as m:
        await m.memcpy(100, data)
        assert bytes(m[100 : 100 + data.nbytes]) == data.tobytes()
        with pytest.raises(apmem2.OutOfRangeError):
            await m.memcpy((1 << 21) - 8, data)


@pytest.mark.asyncio
async def test_short_data_that_lies_in_a_map_is_read_in_the_pool(directory: Path, recorder: Recorder) -> None:
    """It may have to come from the file, for which the loop must not wait."""
    async with apmem2.open(directory / "a", size=SIZE) as m:
        m[0:4] = b"abcd"
        before = recorder.mark()
        await m.memcpy(2, m[0:4])
        looked = [event for event in recorder.events() if event.name == "query" and event.begun > before]
        assert looked
        assert all(event.thread != threading.get_native_id() for event in looked)
        assert bytes(m[0:6]) == b"ababcd"


@pytest.mark.asyncio
async def test_a_failed_file_can_be_opened_anew_without_waiting_for_the_collector(
    directory: Path, faults: Faults
) -> None:
    """The latched failure is not the one that was raised: that one's traceback holds the views of who called."""

    async def work() -> None:
        async with apmem2.open(directory / "a", size=SIZE) as m:
            view = m.view
            try:
                await m.persist(0, 1)
            finally:
                view = view[0:0]

    gc.disable()
    try:
        faults.fail("msync", 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            with pytest.raises(apmem2.PersistError) as caught:
                await work()
        faults.clear()
        caught.value.__traceback__ = None
        del caught
        for _ in range(100):
            await asyncio.sleep(0)
        async with apmem2.open(directory / "a") as m:
            await m.persist(0, 1)
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_a_word_that_forces_nothing_is_said_to_be_ignored(directory: Path, forced: Callable[[str], None]) -> None:
    forced("cachelines")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        m = await apmem2.open(directory / "a", size=SIZE)
    assert m.granularity is apmem2.Granularity.PAGE
    await m.aclose()


@pytest.mark.asyncio
async def test_warnings_point_at_the_line_of_the_caller(directory: Path) -> None:
    with pytest.warns(ResourceWarning) as caught:
        async with apmem2.open(directory / "a", size=SIZE) as m:
            kept = m.view
    assert caught[0].filename == __file__
    del kept
