"""How does a numpy.memmap of one's own become durable, slice by slice? Adopt it, and persist what was stored.

    python -m examples.numpy_memmap [FILE]

`numpy.memmap.flush` writes the whole array back and holds the interpreter meanwhile. An adopted array stays what it
was, numpy's own; apmem2 makes any slice of it durable without stopping the event loop, strided ones too.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import apmem2

SENSORS = 1024
DAYS = 512


def create(path: Path) -> None:
    """Make the file, as whoever owns the array does. Its name is made durable too: apmem2 did not make it."""
    with path.open("wb") as file:
        # Written, not sparse: a store into a hole has no way to report a full disk but SIGBUS.
        file.write(bytes(DAYS * SENSORS * np.dtype(np.float32).itemsize))
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


async def record(path: Path) -> None:
    """Store readings into a matrix of days and sensors, and make them durable."""
    readings = np.memmap(path, dtype=np.float32, mode="r+", shape=(DAYS, SENSORS))

    async with apmem2.map_from_existing(readings) as m:
        print(f"adopted {readings.nbytes} bytes: granularity {m.granularity.name}, durability {m.durability.name}")

        readings[0:7] = np.arange(7, dtype=np.float32)[:, None]
        await m.persist(readings[0:7])
        print("one week is durable: rows 0 to 6")

        readings[:, 3] = -1.0
        await m.persist(readings[:, 3])  # strided: one number of every row, and only what it touches is written
        print(f"one sensor is durable: column 3, {DAYS} numbers with a stride of {readings.strides[0]} bytes")

        readings[::30, 100:200] *= 2.0
        await m.persist(readings[::30, 100:200])
        print("every thirtieth day is durable for sensors 100 to 199")
    # The end of `m` never unmaps: the array is numpy's, before and after.
    assert readings[6, 0] == 6.0
    del readings

    again = np.memmap(path, dtype=np.float32, mode="r", shape=(DAYS, SENSORS))
    assert again[6, 0] == 6.0
    assert bool((again[:, 3] == -1.0).all())
    print("read back through a new mapping: as stored")


def main(argv: list[str]) -> None:
    """Run on the file named, or on one that is removed afterwards."""
    if argv:
        create(Path(argv[0]))
        asyncio.run(record(Path(argv[0])))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR") or Path.cwd()) as directory:
        path = Path(directory) / "readings.f32"
        create(path)
        asyncio.run(record(path))


if __name__ == "__main__":
    main(sys.argv[1:])
