"""What has to be measured in a process of its own: `python worker.py registry N`, `... memory bare|pool`, `... waiting
bare|persist COUNT [FILE]`, `... ticker`, `... trips LOOP`, `... inline LOOP BYTES_MAX FILE`. Prints JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter_ns
from typing import Any


def resident() -> dict[str, int]:
    """Bytes of this process: resident, and proportional."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def say(value: object) -> None:
    """One line."""
    print(json.dumps(value), flush=True)


async def registry(registered: int) -> None:
    """Adopt that many pieces of one shared mapping, then measure one more at each line of the input: COUNT."""
    import warnings

    import apmem2

    warnings.simplefilter("ignore", apmem2.DurabilityWarning)
    step = 256
    memory = mmap.mmap(-1, max(registered * 2 * step, 1 << 20))
    view = memoryview(memory)
    kept: list[apmem2.Map] = []
    for first in range(0, registered, 1000):
        some = range(first, min(first + 1000, registered))
        kept += await asyncio.gather(*(adopt(view[2 * i * step : 2 * i * step + step]) for i in some))
    say(len(apmem2.mappings()))
    for line in sys.stdin:
        took: list[int] = []
        for i in range(int(line)):
            at = (i * 7919 % registered * 2 + 1) * step  # a gap between two, all over the table
            began = perf_counter_ns()
            one = await apmem2.map_from_existing(view[at : at + step])
            took.append(perf_counter_ns() - began)
            await one.aclose()
        say(took)


async def adopt(piece: memoryview):  # type: ignore[no-untyped-def]
    """As a coroutine, for gather."""
    import apmem2

    return await apmem2.map_from_existing(piece)


async def memory(kind: str) -> None:
    """A loop that ran, with or without us."""
    await asyncio.sleep(0.01)
    if kind == "pool":
        import apmem2  # noqa: F401

        for _ in range(20):
            await one_job()
    say(resident())


async def waiting(kind: str, count: int, path: str) -> None:
    """That many tasks, all waiting: each for a persist, or each for a future."""
    loop = asyncio.get_running_loop()
    if kind == "bare":
        futures = []

        async def one(_: int) -> None:
            future = loop.create_future()
            futures.append(future)
            await future

        before = resident()
        tasks = [loop.create_task(one(number)) for number in range(count)]
        await asyncio.sleep(0)
        after = resident()
        for future in futures:
            future.set_result(None)
        await asyncio.gather(*tasks)
    else:
        import apmem2

        async with apmem2.open(path, 16 << 20) as m:
            await m.memcpy(0, b"1")
            pages = len(m) // 4096
            before = resident()
            tasks = [loop.create_task(m.persist(number % pages * 4096, 4096)) for number in range(count)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            after = resident()
            done = sum(task.done() for task in tasks)
            await asyncio.gather(*tasks)
            if done > count // 2:
                raise RuntimeError(f"{done} of {count} persists did not wait")
    say({name: after[name] - before[name] for name in after})


async def ticker() -> None:
    """For each line of the input, SECONDS, the lateness of a 1 ms ticker in all that time: what the machine does to any
    loop meanwhile."""
    for line in sys.stdin:
        end = perf_counter_ns() + float(line) * 1e9
        late: list[float] = []
        while (now := perf_counter_ns()) < end:
            await asyncio.sleep(0.001)
            late.append(max(0.0, perf_counter_ns() - now - 1e6))
        say(late)


async def one_job() -> None:
    """An empty one, to the pool and back."""
    from apmem2.core import runtime
    from apmem2.core.errors import error_of
    from apmem2.native import ffi, lib

    await runtime.control(lib.APM_JOB_NOOP, ffi.NULL, lambda code: error_of(code, "an empty job"))


async def trips() -> None:
    """For each line of the input, `job|wake COUNT PAUSE_NS`: nanoseconds of each empty job, or of each wake-up through
    an eventfd that a reader of this loop waits for, after a pause in which nothing ran."""
    loop = asyncio.get_running_loop()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    waiting: list[asyncio.Future[None]] = []

    def arrive() -> None:
        os.eventfd_read(fd)
        waiting.pop().set_result(None)

    async def one_wake() -> None:
        future = loop.create_future()
        waiting.append(future)
        os.eventfd_write(fd, 1)
        await future

    loop.add_reader(fd, arrive)
    for line in sys.stdin:
        what, count, pause_ns = line.split()
        one = one_job if what == "job" else one_wake
        took: list[int] = []
        for _ in range(int(count)):
            time.sleep(int(pause_ns) / 1e9)  # noqa: ASYNC251 - the loop has nothing else to do
            began = perf_counter_ns()
            await one()
            took.append(perf_counter_ns() - began)
        say(took)
    loop.remove_reader(fd)
    os.close(fd)


async def inline(bytes_max: int, path: str) -> None:
    """Whether this processor can flush lines; then for each line of the input, `SIZE COUNT`, nanoseconds of each
    persist of so many dirty bytes at cache-line granularity."""
    import warnings

    import apmem2

    warnings.simplefilter("ignore", apmem2.DurabilityWarning)
    os.environ["PMEM2_FORCE_GRANULARITY"] = "CACHE_LINE"
    apmem2.configure(inline_bytes_max=bytes_max)
    async with apmem2.open(path, 1 << 20) as m:
        able = m.granularity is apmem2.Granularity.CACHE_LINE
        say(able)
        for line in sys.stdin:
            size, count = map(int, line.split())
            took: list[int] = []
            for number in range(count):
                m[0:size] = bytes([number % 251 + 1]) * size
                began = perf_counter_ns()
                await m.persist(0, size)
                took.append(perf_counter_ns() - began)
            say(took)


def run_on(name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """asyncio.run, on that loop."""
    if name == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    else:
        asyncio.run(main())


if __name__ == "__main__":
    import cffi  # noqa: F401

    with contextlib.suppress(ImportError):
        import anyio  # noqa: F401
    command, *rest = sys.argv[1:]
    if command == "registry":
        asyncio.run(registry(int(rest[0])))
    elif command == "memory":
        asyncio.run(memory(rest[0]))
    elif command == "ticker":
        asyncio.run(ticker())
    elif command == "trips":
        run_on(rest[0], trips)
    elif command == "inline":
        run_on(rest[0], lambda: inline(int(rest[1]), rest[2]))
    else:
        asyncio.run(waiting(rest[0], int(rest[1]), rest[2] if len(rest) > 2 else ""))
