"""How long does the event loop stand still while 256 MiB are flushed? `to_thread(mmap.flush)` beside `Map.persist`.

    python -m examples.loop_freeze [MEBIBYTES]

A ticker on the loop sleeps for 1 ms again and again and notes how late it wakes. CPython holds the GIL inside
`mmap.flush`, so a thread does not help: the loop stops for the whole flush. apmem2 calls msync without the GIL.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import apmem2

PAGE = 4096


async def lateness(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """(seconds that work took, worst lateness of a 1 ms ticker beside it in seconds)."""
    worst = 0.0

    async def ticker() -> None:
        nonlocal worst
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - due)

    beside = asyncio.create_task(ticker())
    await asyncio.sleep(0.02)
    began = time.perf_counter()
    await work()
    took = time.perf_counter() - began
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    return took, worst


def dirty(memory: memoryview) -> None:
    """Store one byte into every page."""
    memory[::PAGE] = bytes(b ^ 1 for b in memory[::PAGE])


async def main(size: int, directory: Path) -> None:
    async with apmem2.open(directory / "flushed", size) as m:
        with (directory / "flushed").open("r+b") as file, mmap.mmap(file.fileno(), size) as mm:
            rows: list[tuple[str, tuple[float, float]]] = [("idle", await lateness(lambda: asyncio.sleep(0.1)))]
            with memoryview(mm) as memory:
                dirty(memory)
            rows.append(("asyncio.to_thread(mm.flush)", await lateness(lambda: asyncio.to_thread(mm.flush))))
            dirty(m.view)
            rows.append(("await m.persist()", await lateness(m.persist)))
    print(f"{size >> 20} MiB, one byte stored in every page")
    for name, (took, worst) in rows:
        print(f"{name:30} took {took * 1e3:8.1f} ms   a 1 ms ticker was up to {worst * 1e3:7.1f} ms late")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        asyncio.run(main((int(sys.argv[1]) if len(sys.argv) > 1 else 256) << 20, Path(scratch)))
