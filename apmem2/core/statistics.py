"""What has the pool done so far, and what does it do now? Numbers that are always counted, in all and by map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apmem2.core import runtime
from apmem2.native import ffi, lib


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """The jobs of the pool that concern one map. Work that ran inline is not in it.

    Counts are jobs; rounds are those in which a job took part, round_jobs the jobs in them; bytes are as asked for, not
    rounded to pages. Latencies are from acceptance to completion; the percentiles come from a histogram with two steps
    to each doubling: they are up to half too long, never too short, and never more than the maximum.
    """

    submitted: int
    completed: int
    failed: int
    withdrawn: int
    in_flight: int
    rounds: int
    round_jobs: int
    bytes_persisted: int
    bytes_copied: int
    latency_mean_s: float
    latency_p50_s: float
    latency_p99_s: float
    latency_max_s: float

    @property
    def jobs_per_round(self) -> float:
        """Mean number of jobs that shared a round; 0 before the first."""
        return self.round_jobs / self.rounds if self.rounds else 0.0


@dataclass(frozen=True, slots=True)
class Statistics(JobStatistics):
    """The same for the whole process, and what only the pool has.

    `sync_calls` are msync and synchronous writes; `oldest_round_s` is the age of the longest running round (0: none
    runs); `threads` are those that were started.
    """

    sync_calls: int
    oldest_round_s: float
    threads: int


def _common(out: Any) -> dict[str, Any]:
    latency = out.latency
    return {
        "submitted": out.submitted,
        "completed": out.completed,
        "failed": out.failed,
        "withdrawn": out.withdrawn,
        "in_flight": out.in_flight,
        "rounds": out.rounds,
        "round_jobs": out.round_jobs,
        "bytes_persisted": out.bytes_persisted,
        "bytes_copied": out.bytes_copied,
        "latency_mean_s": latency.total_ns / latency.count / 1e9 if latency.count else 0.0,
        "latency_p50_s": lib.apm_latency_at(ffi.addressof(latency), 0.5) / 1e9,
        "latency_p99_s": lib.apm_latency_at(ffi.addressof(latency), 0.99) / 1e9,
        "latency_max_s": latency.max_ns / 1e9,
    }


def statistics() -> Statistics:
    """A frozen snapshot of the runtime's numbers. Any thread; starts nothing."""
    runtime.check_forked()
    out = ffi.new("struct apm_statistics *")
    lib.apm_pool_statistics(out)
    return Statistics(
        **_common(out), sync_calls=out.sync_calls, oldest_round_s=out.oldest_round_ns / 1e9, threads=out.threads
    )


def of_map(pointer: Any) -> JobStatistics:
    """The same of one map (struct apm_map *)."""
    runtime.check_forked()
    out = ffi.new("struct apm_map_statistics *")
    lib.apm_map_statistics(pointer, out)
    return JobStatistics(**_common(out))
