"""What is counted: jobs, rounds, bytes and latencies, of the process and of each map."""

from __future__ import annotations

import asyncio
import mmap
from contextlib import suppress
from pathlib import Path

import pytest

import apmem2
from apmem2.native import ffi, lib
from tests.conftest import Faults

PAGE = mmap.PAGESIZE
STEPS = 56


@pytest.mark.asyncio
async def test_a_map_counts_its_own_jobs_and_not_its_neighbours(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=PAGE) as m, apmem2.open(directory / "b", size=PAGE) as other:
        await m.persist(0, 100)
        await m.memcpy(0, b"x" * 200)
        await other.persist(0, 7)
        mine = m.statistics()
        assert (mine.submitted, mine.completed, mine.failed, mine.withdrawn, mine.in_flight) == (2, 2, 0, 0, 0)
        assert (mine.bytes_persisted, mine.bytes_copied) == (100, 200)
        assert (mine.rounds, mine.round_jobs, mine.jobs_per_round) == (2, 2, 1.0)
        assert other.statistics().bytes_persisted == 7
        assert 0 < mine.latency_p50_s <= mine.latency_p99_s <= mine.latency_max_s
        assert 0 < mine.latency_mean_s <= mine.latency_max_s


@pytest.mark.asyncio
async def test_jobs_of_one_round_are_counted_as_such(directory: Path, faults: Faults) -> None:
    async with apmem2.open(directory / "a", size=8 * PAGE) as m:
        faults.hold("msync")
        first = asyncio.ensure_future(m.persist(0, 1))
        await faults.held()
        rest = [asyncio.ensure_future(m.persist(page * PAGE, 1)) for page in range(1, 8)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert m.statistics().in_flight == 8
        doomed = rest.pop()
        doomed.cancel()
        with suppress(asyncio.CancelledError):
            await doomed
        faults.release()
        await asyncio.gather(first, *rest)
        counted = m.statistics()
        assert (counted.rounds, counted.round_jobs) == (2, 7)
        assert (counted.completed, counted.withdrawn, counted.in_flight) == (8, 1, 0)
        assert counted.bytes_persisted == 7, "what was withdrawn was not persisted"


@pytest.mark.asyncio
async def test_a_failed_job_is_counted_as_failed_and_its_bytes_are_not(directory: Path, faults: Faults) -> None:
    m = await apmem2.open(directory / "a", size=PAGE)
    faults.fail("msync", 5)
    with pytest.raises(apmem2.PersistError):
        await m.persist(0, 10)
    await m.aclose()
    ended = m.statistics()  # also after the end
    assert (ended.failed, ended.bytes_persisted) == (1, 0)


@pytest.mark.asyncio
async def test_the_process_counts_what_its_maps_count(directory: Path) -> None:
    before = apmem2.statistics()
    async with apmem2.open(directory / "a", size=PAGE) as m:
        await m.persist(0, 10)
        after, mine = apmem2.statistics(), m.statistics()
        assert after.submitted - before.submitted >= mine.submitted + 2  # opening and mapping
        assert after.rounds - before.rounds == mine.rounds == 1
        assert after.bytes_persisted - before.bytes_persisted == 10
        assert after.latency_p50_s <= after.latency_p99_s <= after.latency_max_s


def latency(times_ns: list[int]) -> object:
    """A histogram of these times, built as the core describes it."""
    found = ffi.new("struct apm_latency *")
    for time in times_ns:
        us, step = time // 1000, 0
        if us:
            power = us.bit_length() - 1
            step = min(1 + 2 * power + ((us >> (power - 1)) & 1 if power else 0), STEPS - 1)
        found.steps[step] += 1
        found.count += 1
        found.max_ns = max(found.max_ns, time)
    return found


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    "times",
    [
        [500],
        [1_000],
        [1_500],
        [2_999, 3_000],
        [123_456] * 99 + [9_000_000],
        list(range(1000, 2_000_000, 777)),
        [1 << 40],
    ],
    ids=["below 1 us", "1 us", "1.5 us", "an edge", "an outlier", "many", "beyond the last"],
)
def test_a_percentile_is_never_too_short_and_at_most_half_too_long(times: list[int], share: float) -> None:
    true = sorted(times)[max(0, -(-int(share * 10000) * len(times) // 10000) - 1)]
    told = lib.apm_latency_at(latency(times), share)
    assert true <= told <= max(times)
    assert told <= max(true * 1.5 + 1000, 1000)


def test_without_jobs_there_is_no_latency() -> None:
    assert lib.apm_latency_at(ffi.new("struct apm_latency *"), 0.99) == 0
