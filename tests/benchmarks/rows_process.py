"""What a process of its own shows: the registry with many maps, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from .context import WORKER, Context, Entry, Worker, same_package
from .harness import MIB, Goal, Row, interleave, median_ratio, microseconds


async def adopt(worker: Worker, count: int) -> float:
    """Median nanoseconds of one adoption in a worker."""
    worker.tell(count)
    took: list[float] = worker.answer()
    return median(took)


async def registry(c: Context) -> list[Row]:
    """Registering an adopted sub-range among many."""
    many, few = c.scale.registered, 100
    with Worker("registry", str(many)) as large, Worker("registry", str(few)) as small:
        for worker, expected in ((large, many), (small, few)):
            found = worker.answer()
            if found != expected:
                raise RuntimeError(f"{found} maps registered, not {expected}")
        count = min(90, c.scale.operations)
        await adopt(large, count)
        await adopt(small, count)
        times = max(5, c.scale.alternations)
        left, right = await interleave(times, lambda: adopt(large, count), lambda: adopt(small, count))
    return [
        Row(
            f"registering an adopted sub-range among {many:,}",
            f"among {few}",
            microseconds(median(left)),
            microseconds(median(right)),
            median_ratio(left, right),
            Goal("<=", 2),
        )
    ]


def ask(*arguments: str) -> dict[str, int]:
    """One run of the worker."""
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=same_package())
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"the worker ended with status {done.returncode}")
    answer: dict[str, int] = json.loads(done.stdout)
    return answer


async def memory(c: Context) -> list[Row]:
    """Of the import and the pool, and of very many waiting persists."""
    imported: list[dict[str, int]] = []
    for _ in range(max(1, min(5, c.scale.alternations))):
        pool, bare = ask("memory", "pool"), ask("memory", "bare")
        imported.append({name: pool[name] - bare[name] for name in pool} | {"bare": bare["Rss"]})
    count = c.scale.waiting
    with c.scratch() as path:
        each: list[tuple[dict[str, int], dict[str, int]]] = []
        for _ in range(max(1, min(3, c.scale.alternations))):
            where: Path = path()
            each.append((ask("waiting", "persist", str(count), str(where)), ask("waiting", "bare", str(count))))
            half = ask("waiting", "persist", str(count // 2), str(path()))
    rss, pss, base = (median(one[name] for one in imported) for name in ("Rss", "Pss", "bare"))
    ours, theirs = (median(one[side]["Rss"] for one in each) for side in (0, 1))
    return [
        Row(
            "memory of import + pool (MiB more)",
            "bare Python + asyncio + cffi (+ anyio)",
            f"{(base + rss) / MIB:.1f} MiB",
            f"{base / MIB:.1f} MiB",
            rss / MIB,
            Goal("<=", 6),
            note=f"proportional: {pss / MIB:.1f} MiB more",
        ),
        Row(
            f"memory of {count:,} waiting persists",
            "as many tasks that wait for a bare future",
            f"{ours / MIB:.0f} MiB, {ours / count:,.0f} B each",
            f"{theirs / MIB:.0f} MiB, {theirs / count:,.0f} B each",
            ours / theirs,
        ),
        Row(
            f"memory of {count:,} waiting persists: bounded",
            f"of {count // 2:,}, for each",
            f"{ours / count:,.0f} B each",
            f"{half['Rss'] / (count // 2):,.0f} B each",
            (ours / count) / (half["Rss"] / (count // 2)),
            Goal("<=", 1.25),
        ),
    ]


ENTRIES = [Entry("registry", registry, each=False), Entry("memory", memory, each=False)]
