"""The only door to C: `lib` and `ffi`, refused when the library was built from other sources than lie beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from apmem2.native._apm import ffi, lib

__all__ = ["ffi", "lib"]


def _digest(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.name.startswith("apm") and p.suffix in (".c", ".h")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _refuse_stale_build() -> None:
    here = Path(__file__).parent
    if not (here / "apm_pool.c").exists():
        return  # an installed package carries no sources to be stale against
    built = ffi.string(lib.apm_source_digest()).decode()
    if built != _digest(here):
        raise ImportError(
            "apmem2: the C core was built from other sources than those in "
            f"{here}; build it again with: python -m pip install -e ."
        )


_refuse_stale_build()
