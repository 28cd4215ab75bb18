"""The errors: one tree, each with a code and a hint, each also the built-in that a caller would catch."""

from __future__ import annotations

import copy
import errno
import pickle
import re
from pathlib import Path

import pytest

import apmem2
from apmem2.core import errors
from apmem2.core.errors import code_name, error_of, persist_error
from apmem2.native import ffi, lib

HEADER = Path(apmem2.__file__).parent / "native" / "apm.h"

BUILT_INS: dict[str, type[Exception]] = {
    "PmemError": Exception,
    "OutOfRangeError": ValueError,
    "InvalidSourceError": ValueError,
    "AccessError": PermissionError,
    "SizeMismatchError": ValueError,
    "GranularityNotSupportedError": ValueError,
    "MappingExistsError": FileExistsError,
    "NotMappedError": ValueError,
    "PrivateMemoryError": ValueError,
    "OtherFileError": ValueError,
    "ClosedError": ValueError,
    "ForkedError": RuntimeError,
    "PoolError": OSError,
    "OutOfMemoryError": MemoryError,
    "LockedError": BlockingIOError,
    "LogFullError": OSError,
    "LogBusyError": BlockingIOError,
    "TrimmedError": LookupError,
    "OpenError": OSError,
    "MissingFileError": FileNotFoundError,
    "DirectoryError": IsADirectoryError,
    "ParentError": NotADirectoryError,
    "FileAccessError": PermissionError,
    "PersistError": OSError,
    "MapFailedError": OSError,
    "CorruptionError": ValueError,
    "FormatVersionError": ValueError,
    "ReplicationError": RuntimeError,
}


def _classes() -> list[type[apmem2.PmemError]]:
    found: list[type[apmem2.PmemError]] = []
    waiting: list[type[apmem2.PmemError]] = [apmem2.PmemError]
    while waiting:
        kind = waiting.pop()
        if kind.__module__.startswith("apmem2.") and kind not in found:
            found.append(kind)
        waiting.extend(kind.__subclasses__())
    return found


CLASSES = sorted(_classes(), key=lambda kind: kind.__name__)
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def header_codes() -> dict[str, int]:
    """enum apm_error as apm.h has it."""
    text = HEADER.read_text()
    body = re.search(r"enum apm_error \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    return {name: int(number) for name, number in re.findall(r"APM_E_(\w+) = (-\d+)", body.group(1))}


# ---- the tree ----------------------------------------------------------------------------------


@every_class
def test_every_error_is_public_and_has_a_documented_built_in(kind: type[apmem2.PmemError]) -> None:
    if kind.__module__ != errors.__name__:
        pytest.skip("an error of a higher floor, which is tested there")
    assert getattr(apmem2, kind.__name__) is kind
    assert kind.__name__ in apmem2.__all__
    assert issubclass(kind, BUILT_INS[kind.__name__])


def test_every_documented_error_exists() -> None:
    assert set(BUILT_INS) <= {kind.__name__ for kind in CLASSES}


@every_class
def test_every_error_has_a_code_and_a_hint(kind: type[apmem2.PmemError]) -> None:
    error = kind("what happened")
    assert isinstance(error.code, int)
    assert error.code < 0
    assert isinstance(error.hint, str)
    assert str(error) == ("what happened. " + error.hint if error.hint else "what happened")
    other = kind("what happened", code=-errno.EIO, hint="do this")
    assert (other.code, other.hint, str(other)) == (-errno.EIO, "do this", "what happened. do this")


@every_class
def test_every_error_says_what_it_is_and_why_in_its_docstring(kind: type[apmem2.PmemError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != kind.__mro__[1].__doc__


@every_class
@pytest.mark.parametrize("how", ["copy", "deepcopy", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_every_error_can_be_pickled_and_copied(kind: type[apmem2.PmemError], how: str | int) -> None:
    """Across processes: multiprocessing, a task queue."""
    error = kind("what happened", code=-errno.EIO, hint="do this", errno=errno.EDQUOT, filename="/a/b")
    error.add_note("by the way")
    again = pickle.loads(pickle.dumps(error, how)) if isinstance(how, int) else getattr(copy, how)(error)
    assert type(again) is kind
    assert again is not error
    assert (str(again), again.code, again.hint, again.args) == (str(error), error.code, error.hint, error.args)
    assert again.__notes__ == ["by the way"]
    if isinstance(error, OSError):
        assert isinstance(again, OSError)
        assert (again.errno, again.filename) == (errno.EDQUOT, "/a/b")


@every_class
def test_an_os_error_has_an_errno_and_keeps_its_class(kind: type[apmem2.PmemError]) -> None:
    """OSError's constructor chooses a class by errno: not here."""
    for number in (errno.ENOENT, errno.EACCES, errno.EEXIST, errno.EIO, errno.EAGAIN):
        error = kind("what happened", errno=number, filename="/a")
        assert type(error) is kind
        if isinstance(error, OSError):
            assert (error.errno, error.filename) == (number, "/a")
    plain = kind("what happened")
    if isinstance(plain, OSError):
        assert isinstance(plain.errno, int)
        assert plain.filename is None


def test_what_an_error_carries_survives_pickling() -> None:
    mismatch = pickle.loads(pickle.dumps(apmem2.SizeMismatchError("x", expected=5, found=7)))
    assert (mismatch.expected, mismatch.found) == (5, 7)
    damage = pickle.loads(pickle.dumps(apmem2.CorruptionError("x", path="/a", offset=4096, seq=9)))
    assert (damage.path, damage.offset, damage.seq) == ("/a", 4096, 9)


def test_an_existing_map_stays_behind_when_its_error_is_pickled() -> None:
    """A map cannot leave its process; the error can."""
    error = apmem2.MappingExistsError("x", existing=lambda: None)  # as little picklable as a map
    again = pickle.loads(pickle.dumps(error))
    assert again.existing is None
    assert str(again) == str(error)
    assert error.existing is not None


def test_a_warning_of_durability_is_a_user_warning() -> None:
    assert issubclass(apmem2.DurabilityWarning, UserWarning)


# ---- header = errors ---------------------------------------------------------------------------


def test_the_header_and_the_enum_have_the_same_codes() -> None:
    assert {code.name: int(code) for code in apmem2.ErrorCode} == header_codes()


def test_the_core_names_every_code_as_the_enum_does() -> None:
    assert len(header_codes()) > 30
    for name, number in header_codes().items():
        assert ffi.string(lib.apm_error_name(number)).decode() == name
        assert code_name(number) == name
        assert getattr(lib, f"APM_E_{name}") == number


def test_the_core_names_an_errno_and_knows_no_other_number() -> None:
    assert code_name(-errno.EIO) == "EIO"
    assert code_name(-errno.ENOSPC) == "ENOSPC"
    for number in (0, 5, -99999, -100002, -200000, -(1 << 31)):
        assert code_name(number) == "UNKNOWN"


def test_our_own_codes_lie_outside_those_of_libpmem2() -> None:
    """libpmem2's run from -100,000 down to -100,037; ours begin at -101,001."""
    for code in apmem2.ErrorCode:
        assert -100037 <= code <= -100000 or code <= -101001


# ---- codes become errors -----------------------------------------------------------------------


@pytest.mark.parametrize("code", list(apmem2.ErrorCode), ids=lambda code: code.name)
@pytest.mark.parametrize("make", [error_of, persist_error])
def test_every_code_becomes_an_error_that_carries_it(code: apmem2.ErrorCode, make: object) -> None:
    assert callable(make)
    error = make(code, "opening 'a'", "a")
    assert isinstance(error, apmem2.PmemError)
    assert error.code == code
    assert str(error).startswith("opening 'a': ")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EISDIR, IsADirectoryError),
        (errno.ENOTDIR, NotADirectoryError),
        (errno.EACCES, PermissionError),
        (errno.EPERM, PermissionError),
        (errno.EROFS, PermissionError),
        (errno.ENOMEM, MemoryError),
        (errno.ENOSPC, apmem2.OpenError),
        (errno.EMFILE, apmem2.OpenError),
        (errno.EIO, apmem2.OpenError),
    ],
)
def test_an_errno_of_opening_becomes_the_built_in_that_a_caller_would_catch(number: int, kind: type[Exception]) -> None:
    error = error_of(-number, "opening 'a'", "a")
    assert isinstance(error, kind)
    assert error.code == -number
    if isinstance(error, OSError):
        assert (error.errno, error.filename) == (number, "a")


def test_an_errno_of_a_sync_becomes_a_persist_error_with_errno_and_name() -> None:
    error = persist_error(-errno.ENOSPC, "persisting a", "/a")
    assert isinstance(error, apmem2.PersistError)
    assert (error.errno, error.filename, error.code) == (errno.ENOSPC, "/a", -errno.ENOSPC)
    assert isinstance(error, OSError)
