"""In which pieces does the page cache hold a map's file, what does that cost, and how is it cured?

A store makes the whole folio of the page cache dirty, up to 2 MiB, and a persist writes it. The kernel does not tell
how large a folio is, so it is measured by making single pages dirty (apm_folio.c). See docs/page_cache.md.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from apmem2.core import runtime
from apmem2.core.persist import Bound, Pooled
from apmem2.core.pieces import in_pieces
from apmem2.core.runtime import Operation
from apmem2.native import ffi, lib


class Placed(Bound, Protocol):
    """A map as `persist` knows it, and where it lies."""

    @property
    def address(self) -> int:
        """First byte of the memory."""
        ...


def _sampled(address: int, start: int, length: int, samples: int) -> list[int]:
    """Offsets of one byte in each page that the core takes: the same rule as apm_measure_run."""
    page = int(lib.apm_page_size())
    first = (address + start) % page
    pages = (first + length + page - 1) // page
    return sorted({max(start, start - first + pages * i // samples * page) for i in range(samples)})


async def measured(bound: Placed, strategy: Pooled, start: int, length: int, samples: int) -> float | None:
    """What a persist of one stored page writes, in pages; None when nothing told."""
    places = _sampled(bound.address, start, length, samples)

    async def persist() -> None:
        pending: list[Awaitable[None] | None] = [strategy.persist(bound, place, 1) for place in places]
        await runtime.gather([one for one in pending if isinstance(one, Operation)])

    request = ffi.new("struct apm_measure_request *")
    request.samples = samples
    await persist()  # a page that is dirty already tells nothing
    await strategy.ask(bound, lib.APM_JOB_MEASURE, start, length, request)
    await persist()  # nothing is left dirty that was clean
    told = int(request.measured)
    return int(request.bytes) / (told * int(lib.apm_page_size())) if told else None


async def split(bound: Placed, strategy: Pooled, start: int, length: int, random_access: bool) -> int:
    """Bytes that were seen to leave large folios."""
    request = ffi.new("struct apm_split_request *")
    request.flags = lib.APM_SPLIT_RANDOM if random_access else 0
    found = 0

    async def piece(offset: int, size: int) -> None:
        nonlocal found
        await strategy.ask(bound, lib.APM_JOB_SPLIT, offset, size, request)
        found += int(request.bytes)

    await in_pieces(start, length, piece, None)
    return found
