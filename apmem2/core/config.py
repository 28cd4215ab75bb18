"""The bounds of the process, each with its unit: set once, before the first use."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from apmem2.native import lib


@dataclass(frozen=True, slots=True)
class Settings:
    """Process-wide settings; see `configure`."""

    threads: int = 16
    inline_bytes_max: int = 16384
    jobs_max: int = 16384
    copy_bytes_max: int = 262144


_lock = threading.Lock()
_settings = Settings()
_in_use = False


def configure(
    *,
    threads: int | None = None,
    inline_bytes_max: int | None = None,
    jobs_max: int | None = None,
    copy_bytes_max: int | None = None,
) -> Settings:
    """Set the bounds of this process. Only before anything was opened: `RuntimeError` afterwards.

    threads: upper bound of the pool's threads (6 to 1024), started when there is work for them. A file that hangs on
    its device holds three at most: with n of them, (n - 3) // 3 files may hang before a healthy one has to wait.
    inline_bytes_max: bytes up to which work at cache-line or byte granularity runs on the loop's own thread, because
    that is cheaper than the hop to another; 0: always the pool.
    jobs_max: jobs of one event loop that are handed to the pool at a time (1 to 1,048,576); more wait in the loop.
    copy_bytes_max: bytes up to which `memcpy` takes a copy of its data; longer data must stay unchanged until the copy
    has ended, cancelled or not.
    """
    global _settings
    wanted = {
        name: value
        for name, value in (
            ("threads", threads),
            ("inline_bytes_max", inline_bytes_max),
            ("jobs_max", jobs_max),
            ("copy_bytes_max", copy_bytes_max),
        )
        if value is not None
    }
    bounds = {
        "threads": (6, 1024),
        "inline_bytes_max": (0, 1 << 40),
        "jobs_max": (1, 1 << 20),
        "copy_bytes_max": (0, 1 << 40),
    }
    for name, value in wanted.items():
        low, high = bounds[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    with _lock:
        if _in_use:
            raise RuntimeError("configure() comes too late: the runtime is in use; call it before the first open")
        _settings = replace(_settings, **wanted)
        return _settings


def settle() -> Settings:
    """The settings, from now on fixed. Called by the runtime when it starts."""
    global _in_use
    with _lock:
        if not _in_use:
            _in_use = True
            lib.apm_pool_configure(_settings.threads)
        return _settings
