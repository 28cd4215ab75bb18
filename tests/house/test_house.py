"""The house itself: floors and doors, words that have their one place, what is public, what is said of it.

Everything here is read from the sources, nothing is run.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import apmem2
import apmem2.core

PACKAGE = Path(apmem2.__file__).parent
NATIVE = PACKAGE / "native"
FLOORS = ["native", "core", "structures", "roof"]
ROOF = {"asgi", "cli", "replication", "testing", "__main__", "__init__"}

LINES_MAX = 450
LONGER = {
    "native/apm_pool.c": 850,  # one state machine under one lock
    "core/mapping.py": 690,  # Map
    "core/runtime.py": 550,  # the only file that knows the loop
}


def modules() -> list[Path]:
    """The Python files of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "build" not in path.relative_to(PACKAGE).parts)


def c_files() -> list[Path]:
    """The C files of the core, its tests aside."""
    return sorted(
        path for path in NATIVE.rglob("*.[chS]") if path.relative_to(NATIVE).parts[0] not in ("build", "test")
    )


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def order(floor: str) -> list[str]:
    """The files of a floor from left to right, as its docstring gives them."""
    package = PACKAGE / floor / "__init__.py"
    documentation = ast.get_docstring(ast.parse(package.read_text()))
    assert documentation is not None, f"{package} says in which order its files stand"
    return re.findall(r"\w+", documentation.split("\n\n")[1])


def floor_of(name: str) -> int:
    """The floor of a full name of ours."""
    part = name.split(".")[1] if "." in name else "__init__"
    return FLOORS.index(part) if part in FLOORS else FLOORS.index("roof")


def without_comments(text: str) -> str:
    """C without its comments and strings."""
    return re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", " ", text, flags=re.DOTALL)


# ---- floors ------------------------------------------------------------------------------------


def test_every_file_of_the_core_has_its_place_in_the_order() -> None:
    found = {path.stem for path in (PACKAGE / "core").glob("*.py")} - {"__init__"}
    assert found == set(order("core"))
    assert len(order("core")) == len(set(order("core")))


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.stem)
def test_a_file_of_the_core_imports_only_from_its_left_and_from_the_ground(path: Path) -> None:
    names = order("core")
    left = set(names[: names.index(path.stem)]) if path.stem in names else set()
    for name in imports(path):
        if not name.startswith("apmem2"):
            continue
        parts = name.split(".")
        if parts[1:2] == ["native"]:
            continue
        assert parts[1] == "core", f"{path.stem} imports {name}, of a higher floor"
        assert len(parts) == 2 or parts[2] in left, f"{path.stem} imports {name}, which does not stand to its left"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_no_higher_floor(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    mine = FLOORS.index(parts[0]) if parts[0] in FLOORS else FLOORS.index("roof")
    for name in imports(path):
        if name.startswith("apmem2."):
            assert floor_of(name) <= mine, f"{path} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_c_is_reached_only_through_its_door(path: Path) -> None:
    """From the core alone (and by the testing kit, which sees the recorder), and never past native/__init__.py."""
    parts = path.relative_to(PACKAGE).parts
    for name in imports(path):
        if parts[0] == "native":
            continue
        assert not name.startswith(("apmem2.native._apm", "_cffi_backend")), f"{path} imports {name}"
        assert name != "cffi", f"{path} imports cffi"
        if name.startswith("apmem2.native"):
            assert name in ("apmem2.native", "apmem2.native.lib", "apmem2.native.ffi")
            assert parts[0] in ("core", "testing"), f"{path} reaches C past the core"


def test_imports_run_in_no_circle() -> None:
    """Imports inside functions count: they hide a circle, they do not open it."""
    names = {".".join(("apmem2", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in modules()}
    edges = {
        name: {other for other in imports(path) if other in names and other != name} for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in sorted(edges[name]):
                walk(other, (*above, name))
            done.add(name)

    for name in names:
        walk(name, ())
    assert len(done) > 10


# ---- words that have their one place -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "homes"),
    [
        (r"\b(msync|fdatasync|fsync|syncfs|sync_file_range|pwritev2|pwritev|pwrite)\s*\(", {"apm_sync.c"}),
        (r"\bpthread_create\s*\(", {"apm_pool.c"}),
        (
            r"(?i)\b_?(mm_)?(clwb|clflush|clflushopt|sfence|mfence|stream_si\w*|stream_ps\w*|movdir64b)\b",
            {"apm_flush.c", "apm_line.h", "apm_copy*"},
        ),
    ],
    ids=["sync calls", "threads", "instructions"],
)
def test_a_word_stands_only_in_its_files(words: str, homes: set[str]) -> None:
    """Sync calls only in sync, threads only in pool, instruction words only in flush and copy."""
    seen = False
    for path in c_files():
        code = without_comments(path.read_text())
        at_home = any(path.match(home) for home in homes)
        for line in code.splitlines():
            if re.search(words, line):
                assert at_home, f"{path.name}: {line.strip()}"
                seen = True
    assert seen, "nothing was found at home either: the words are wrong"


def test_the_core_knows_nothing_of_python() -> None:
    for path in c_files():
        code = without_comments(path.read_text())
        assert "Python.h" not in path.read_text(), path.name
        assert not re.search(r"\bPy[A-Z_]\w*", code), path.name


# ---- what a file is ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", c_files(), ids=lambda path: path.name)
def test_a_c_file_opens_with_its_name_and_what_it_answers(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"/* {path.name} - "), first
    assert len(first) > len(path.name) + 20


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_python_file_opens_with_what_it_answers(path: Path) -> None:
    documentation = ast.get_docstring(ast.parse(path.read_text()))
    assert documentation
    assert len(documentation.splitlines()[0]) > 20


@pytest.mark.parametrize("path", [*modules(), *c_files()], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_find_things_in(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGER.get(str(path.relative_to(PACKAGE)), LINES_MAX)


def test_the_list_of_longer_files_is_true() -> None:
    for name in LONGER:
        assert len((PACKAGE / name).read_text().splitlines()) > LINES_MAX, f"{name} is short enough now: strike it out"


# ---- what is public --------------------------------------------------------------------------------


def test_what_is_imported_is_exported_and_what_is_exported_is_imported() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}
    assert public == set(apmem2.__all__)
    assert list(apmem2.__all__) == sorted(apmem2.__all__)
    assert len(apmem2.__all__) == len(set(apmem2.__all__))


def _public_members(kind: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield name, member
        elif isinstance(member, staticmethod | classmethod):
            yield name, member.__func__
        elif inspect.isfunction(member):
            yield name, member


@pytest.mark.parametrize("name", apmem2.__all__)
def test_everything_public_says_what_it_is(name: str) -> None:
    thing = getattr(apmem2, name)
    assert inspect.getdoc(thing), name
    if not inspect.isclass(thing):
        return
    assert thing.__doc__, f"{name} only inherits its docstring"
    if not issubclass(thing, enum.Enum):
        for member_name, member in _public_members(thing):
            assert getattr(member, "__doc__", None), f"{name}.{member_name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_function_and_class_of_a_file_has_a_docstring(path: Path) -> None:
    """Methods of the same name as one of a base class in the file inherit theirs, as do overloads."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            overload = any("overload" in ast.dump(decorator) for decorator in node.decorator_list)
            assert overload or ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
