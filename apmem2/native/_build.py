"""How is the door to C built? cffi in API mode, from the part of apm.h between its cdef marks; abi3; one extension."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cffi import FFI

HERE = Path("apmem2/native") if Path("apmem2/native/apm.h").exists() else Path(__file__).parent


def sources(directory: Path) -> list[Path]:
    """The C files and headers of the core, in a fixed order (tests and generated files excluded)."""
    return sorted(p for p in directory.iterdir() if p.name.startswith("apm") and p.suffix in (".c", ".h"))


def digest(directory: Path) -> str:
    """SHA-256 over names and contents of the sources: what a build was made from."""
    total = hashlib.sha256()
    for path in sources(directory):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def declarations(directory: Path) -> str:
    """The cdef part of the manual."""
    text = (directory / "apm.h").read_text()
    return text.split("/* cdef begin */")[1].split("/* cdef end */")[0]


ffibuilder = FFI()
ffibuilder.cdef(declarations(HERE))
ffibuilder.set_source(
    "apmem2.native._apm",
    '#include "apm.h"',
    sources=[str(p) for p in sources(HERE) if p.suffix == ".c"],
    include_dirs=[str(HERE)],
    depends=[str(p) for p in sources(HERE)],
    define_macros=[("APM_SOURCE_DIGEST", f'"{digest(HERE)}"')],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
