"""Leaving the interpreter, forking, and signals: never a hang, never a crash, never a word about another's state.

Every test is a program of its own. `run_program` runs it with -X dev, in an empty directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import asyncio, gc, multiprocessing, os, signal, subprocess, sys, threading, time, warnings
import apmem2
from apmem2.core import runtime
from apmem2.native import lib
PAGE = os.sysconf("SC_PAGESIZE")

def hold():
    lib.apm_observe_hold(lib.APM_CALL_MSYNC, 0, 1)

def release():
    lib.apm_observe_hold(0, 0, 0)

async def held():
    while not lib.apm_observe_held():
        await asyncio.sleep(0)

def in_child(function):
    \"\"\"Run function in a forked child; its exit status.\"\"\"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            sys.stdout.flush()
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(77)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

# How a program may be run: the allocator that fills what it frees makes a use after free show.
MODES = pytest.mark.parametrize(
    "flags", [("-X", "dev"), ("-X", "dev", "-X", "tracemalloc=5"), ()], ids=["dev", "tracemalloc", "plain"]
)


def run(
    directory: Path,
    text: str,
    *,
    flags: tuple[str, ...] = ("-X", "dev"),
    debug_malloc: bool = True,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """A program with the debugging allocator; its exit code is the caller's to judge."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    if debug_malloc:
        environment["PYTHONMALLOC"] = "malloc_debug"
    return subprocess.run(
        [sys.executable, *flags, "-c", PRELUDE + text],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )


def ended_well(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Its standard error, after a look at the exit code and for signs of a crash."""
    assert done.returncode == code, done.stderr + done.stdout
    for sign in ("Fatal Python error", "Segmentation", "Exception ignored", "never awaited"):
        assert sign not in done.stderr, done.stderr
    return "".join(
        line for line in done.stderr.splitlines(True) if not line.startswith("Executing <")
    )  # a busy machine


# ---- the end of the interpreter --------------------------------------------------------------------------------------


@MODES
def test_a_program_that_forgets_to_close_ends_with_a_warning(directory: Path, flags: tuple[str, ...]) -> None:
    text = """
async def main():
    global m
    m = await apmem2.open("a", size=1 << 16)
    await m.memcpy(0, b"x")

asyncio.run(main())
"""
    said = ended_well(run(directory, text, flags=flags))
    assert ("ResourceWarning" in said) == bool(flags)  # Python shows it in development only
    assert (directory / "a").read_bytes()[0] == ord("x")


def test_a_program_that_closes_everything_ends_without_a_word(directory: Path) -> None:
    text = """
async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        await m.persist()
    source = apmem2.Source.from_path("a")
    async with apmem2.map_new(source, required_granularity=apmem2.Granularity.PAGE) as m:
        await m.persist()

asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""


def test_a_program_with_live_views_at_its_end_ends_cleanly(directory: Path) -> None:
    text = """
import numpy
async def main():
    global m, view, array
    m = await apmem2.open("a", size=1 << 16)
    view = m[10:20]
    array = numpy.frombuffer(m.view, dtype="u1")
    n = await apmem2.open("b", size=1 << 16)
    sys.view_of_a_closed_map = n.view  # outlives every module
    await n.aclose()

asyncio.run(main())
"""
    said = ended_well(run(directory, text))
    assert "closed while views of it are alive" in said
    assert "was open when the interpreter ended" in said


@MODES
@pytest.mark.parametrize(
    ("how", "code", "shown"),
    [
        ("raise KeyError('the reason')", 1, "KeyError"),
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), signal.SIGINT); await asyncio.sleep(60)", -signal.SIGINT, "KeyboardInterrupt"),
        ("asyncio.current_task().cancel(); await asyncio.sleep(0)", 1, "CancelledError"),
        ("asyncio.get_running_loop().stop(); await asyncio.sleep(0)", 1, "Event loop stopped before Future completed"),
    ],
    ids=["raises", "sys.exit", "SIGINT", "cancelled", "stopped"],
)
def test_a_program_that_ends_in_the_middle_of_persists_ends_as_it_should(
    directory: Path, flags: tuple[str, ...], how: str, code: int, shown: str
) -> None:
    text = f"""
async def persists(m):
    while True:
        await m.memcpy(0, b"x" * 100)
        await m.persist()

async def main():
    async with apmem2.open("a", size=1 << 16) as m:
        tasks = [asyncio.ensure_future(persists(m)) for _ in range(20)]
        for _ in range(50):
            await asyncio.sleep(0)
        {how}

asyncio.run(main())
"""
    done = run(directory, text, flags=flags)
    assert done.returncode == code, done.stderr
    assert shown in done.stderr
    assert "Fatal Python error" not in done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["persist", "memcpy", "large memcpy", "flush", "aclose", "open"])
@pytest.mark.parametrize("uv", [False, True], ids=["asyncio", "uvloop"])
def test_work_that_hangs_at_the_exit_is_waited_for_no_longer_than_the_bound(
    directory: Path, kind: str, uv: bool
) -> None:
    """The call never comes back. What it uses must stay in memory, and the program must end."""
    gate, ask = {
        "persist": ("MSYNC", "m.persist()"),
        "memcpy": ("PWRITE_DSYNC", "m.memcpy(0, b'x')"),
        "large memcpy": ("PWRITE_DSYNC", "m.memcpy(0, bytearray(b'x' * 300_000))"),
        "flush": ("MSYNC", "flush_and_wait(m)"),
        "aclose": ("MUNMAP", "m.aclose()"),
        "open": ("FALLOCATE", "opened()"),
    }[kind]
    text = f"""
runtime._EXIT_WAIT_MS = 50

async def opened():
    return await apmem2.open("b", size=1 << 20)

async def flush_and_wait(m):
    await m.flush()
    await m.drain()

async def main():
    m = await apmem2.open("a", size=1 << 20)
    lib.apm_observe_hold(lib.APM_CALL_{gate}, 0, 1)
    task = asyncio.ensure_future({ask})
    await held()
    task.cancel()

if {uv}:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
print("left the loop")
"""
    done = run(directory, text, timeout=30)
    said = ended_well(done)
    assert done.stdout == "left the loop\n"
    assert ("was open when" in said or "was not closed" in said) == (kind != "aclose"), said
    assert not (directory / "b").exists()


def test_work_under_way_at_the_exit_is_finished_within_the_bound(directory: Path) -> None:
    """A copy that had begun and whose waiter is gone is in the file when the process has ended."""
    text = """
async def main():
    m = await apmem2.open("a", size=1 << 20)
    lib.apm_observe_hold(lib.APM_CALL_PWRITE_DSYNC, 0, 1)
    task = asyncio.ensure_future(m.memcpy(0, bytearray(b"x" * 300_000)))
    await held()
    task.cancel()

timer = threading.Timer(0.2, release)
timer.daemon = True  # not waited for by the interpreter: it opens the gate while our exit function waits
timer.start()
asyncio.run(main())
"""
    ended_well(run(directory, text))
    assert (directory / "a").read_bytes()[:300_000] == b"x" * 300_000


def test_a_stopped_pool_withdraws_what_has_not_begun(directory: Path) -> None:
    text = """
runtime._EXIT_WAIT_MS = 50
import atexit

async def main():
    m = await apmem2.open("a", size=1 << 20)
    hold()
    await m.flush(0, 1)
    await held()
    n = await apmem2.open("b", size=1 << 20)
    tasks = [asyncio.ensure_future(m.persist(i * PAGE, 1)) for i in range(50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)

asyncio.run(main())
"""
    ended_well(run(directory, text, timeout=30))


@MODES
def test_daemon_threads_with_loops_of_their_own_do_not_disturb_the_exit(
    directory: Path, flags: tuple[str, ...]
) -> None:
    text = """
runtime._EXIT_WAIT_MS = 2000
ready = threading.Barrier(5)

def serve(number):
    async def main():
        async with apmem2.open(f"{number}", size=1 << 16) as m:
            await asyncio.to_thread(ready.wait)
            while True:
                await asyncio.gather(m.memcpy(0, b"x" * 100), m.persist(), m.flush(0, 10), return_exceptions=True)

    try:
        asyncio.run(main())
    except apmem2.PoolError:
        pass

for number in range(4):
    threading.Thread(target=serve, args=(number,), daemon=True).start()
ready.wait()
"""
    for _ in range(3):
        done = run(directory, text, flags=flags)
        assert done.returncode == 0, done.stderr
        assert "Segmentation" not in done.stderr


def test_a_daemon_thread_with_a_hanging_sync_does_not_disturb_the_exit(directory: Path) -> None:
    text = """
runtime._EXIT_WAIT_MS = 50
ready = threading.Event()

def serve():
    async def main():
        m = await apmem2.open("a", size=1 << 16)
        hold()
        task = asyncio.ensure_future(m.persist())
        await held()
        ready.set()
        await task

    asyncio.run(main())

threading.Thread(target=serve, daemon=True).start()
ready.wait()
"""
    done = run(directory, text, timeout=30)
    assert done.returncode == 0, done.stderr


def test_what_is_asked_after_the_pool_stopped_is_refused_and_does_not_hang(directory: Path) -> None:
    """An exit function that was registered early runs after ours."""
    text = """
import atexit

async def late():
    for ask in (lambda: apmem2.open("b", size=4096), lambda: m.persist(), lambda: m.flush(), lambda: m.aclose()):
        try:
            await ask()
        except apmem2.PoolError as error:
            assert error.code == apmem2.ErrorCode.STOPPED
            print("refused")

atexit.register(lambda: asyncio.run(late()))

async def main():
    global m
    m = await apmem2.open("a", size=1 << 16)

asyncio.run(main())
"""
    done = run(directory, text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n" * 4


def test_what_a_hanging_job_uses_is_never_freed(directory: Path) -> None:
    """The call may come back after Python has freed everything; this takes away all that holds its buffer before."""
    text = """
import weakref

class Buffer(bytearray):
    pass

runtime._EXIT_WAIT_MS = 50

async def main():
    m = await apmem2.open("a", size=1 << 20)
    lib.apm_observe_hold(lib.APM_CALL_PWRITE_DSYNC, 0, 1)
    data = Buffer(b"x" * 300_000)
    alive = weakref.ref(data)
    task = asyncio.ensure_future(m.memcpy(0, data))
    await held()
    task.cancel()
    return alive, m.address

warnings.simplefilter("ignore", ResourceWarning)
alive, address = asyncio.run(main())
runtime._leave_process()
runtime._bridges.clear()
runtime._here.bridge = None
gc.collect()
assert alive() is not None
assert any(line.startswith(f"{address:x}-") for line in open("/proc/self/maps"))
release()
while apmem2.statistics().in_flight:
    time.sleep(0.001)
"""
    done = run(directory, text)
    assert done.returncode == 0, done.stderr
    assert (directory / "a").read_bytes()[:300_000] == b"x" * 300_000


def test_exit_without_finalization_does_not_hang(directory: Path) -> None:
    text = """
async def main():
    m = await apmem2.open("a", size=1 << 16)
    hold()
    await m.flush()
    await held()
    os._exit(5)

asyncio.run(main())
"""
    assert run(directory, text).returncode == 5


def test_a_second_interrupt_while_leaving_does_not_crash(directory: Path) -> None:
    text = """
runtime._EXIT_WAIT_MS = 1000

async def main():
    m = await apmem2.open("a", size=1 << 16)
    hold()
    await m.flush()
    await held()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

asyncio.run(main())
"""
    done = run(directory, text, timeout=30)
    assert done.returncode in (0, 1, -signal.SIGINT), done.stderr
    assert "Fatal Python error" not in done.stderr


# ---- fork ------------------------------------------------------------------------------------------------------------


def test_everything_inherited_says_forked_in_a_child_and_the_parent_goes_on(directory: Path) -> None:
    text = """
async def main():
    m = await apmem2.open("a", size=1 << 16)
    m[0] = 1
    await m.memcpy(1, b"x")
    source = apmem2.Source.from_path("a")
    await source.size()
    fd = os.open("a", os.O_RDWR)
    by_fd = apmem2.Source.from_fd(fd)
    await by_fd.size()
    part = m[0:PAGE]
    before = apmem2.statistics()

    def child():
        assert lib.apm_is_forked() == 1
        asked = []

        def plainly(name, call):
            try:
                call()
            except apmem2.ForkedError as error:
                assert error.code == apmem2.ErrorCode.FORKED and isinstance(error, RuntimeError)
                asked.append(name)

        plainly("view", lambda: m.view)
        plainly("getitem", lambda: m[0])
        plainly("setitem", lambda: m.__setitem__(0, 99))
        plainly("statistics", apmem2.statistics)

        async def awaited():
            page = apmem2.Granularity.PAGE
            for name, ask in {
                "persist": lambda: m.persist(), "persist range": lambda: m.persist(0, 1),
                "persist buffer": lambda: m.persist(part), "flush": lambda: m.flush(),
                "drain": lambda: m.drain(), "memcpy": lambda: m.memcpy(0, b"y"), "memset": lambda: m.memset(0, 1, 1),
                "populate": lambda: m.populate(), "aclose": lambda: m.aclose(), "open": lambda: apmem2.open("a"),
                "map_new": lambda: apmem2.map_new(source, required_granularity=page),
                "map_new fd": lambda: apmem2.map_new(by_fd, required_granularity=page),
                "adopt": lambda: apmem2.map_from_existing(part),
                "size": lambda: source.size(), "size fd": lambda: by_fd.size(), "alignment": lambda: source.alignment(),
            }.items():
                try:
                    await ask()
                except apmem2.ForkedError:
                    asked.append(name)
            try:
                async with m:
                    pass
            except apmem2.ForkedError:
                asked.append("async with")

        loop = asyncio.new_event_loop()
        asyncio._set_running_loop(None)
        loop.run_until_complete(awaited())
        loop.close()
        assert len(asked) == 21, asked
        assert part[0] == 1  # plain memory, of the same file

    assert in_child(child) == 0
    assert apmem2.statistics() == before
    m[0] = 2
    await asyncio.gather(*(m.persist(i, 1) for i in range(100)))
    del part, child
    await m.aclose()
    os.close(fd)

asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""


def test_a_child_that_leaves_by_the_front_door_warns_of_nothing(directory: Path) -> None:
    """It inherited an open map, views, a task and work in flight; its interpreter is finalized."""
    text = """
async def main():
    global m, view
    m = await apmem2.open("a", size=1 << 16)
    view = m.view
    hold()
    await m.flush()
    await held()

asyncio.run(main())
pid = os.fork()
if pid == 0:
    print("child")
    sys.exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("child ended with", status)
release()
async def end():
    global view
    await m.persist()
    del view
    await m.aclose()
asyncio.run(end())
"""
    done = run(directory, text)
    assert ended_well(done) == ""
    assert done.stdout.splitlines() == ["child", "child ended with 0"]


def test_a_fork_in_the_middle_of_everything_leaves_parent_and_child_alive(directory: Path) -> None:
    """Threads hold the core's locks at the moment of the fork; the child must not wait for one."""
    text = """
stop = False

def serve(number):
    async def main():
        async with apmem2.open(f"{number}", size=1 << 16) as m:
            while not stop:
                await asyncio.gather(m.memcpy(0, b"x" * 100), m.persist(), m.flush(0, 10), m.drain())
                async with apmem2.open("shared", size=4096):
                    pass
    asyncio.run(main())

def child():
    for ask in (apmem2.statistics, lambda: asyncio.run(once())):
        try:
            ask()
        except apmem2.ForkedError:
            continue
        raise SystemExit("not refused")
    gc.collect()

async def once():
    await apmem2.open("b", size=4096)

threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
while apmem2.statistics().submitted < 100:
    time.sleep(0.001)
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a fork beside threads
assert [in_child(child) for _ in range(30)] == [0] * 30
stop = True
for thread in threads:
    thread.join()
assert apmem2.statistics().in_flight == 0
"""
    assert ended_well(run(directory, text)) == ""


def test_a_child_of_a_process_that_had_only_imported_works(directory: Path) -> None:
    text = """
apmem2.statistics()
apmem2.configure(threads=6)

def child():
    assert lib.apm_is_forked() == 0
    async def main():
        async with apmem2.open("a", size=1 << 16) as m:
            await m.memcpy(0, b"child")
        assert apmem2.statistics().submitted > 0
    asyncio.run(main())

assert in_child(child) == 0
assert in_child(child) == 0

async def main():
    async with apmem2.open("a") as m:
        assert bytes(m[0:5]) == b"child"

asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""


def test_a_grandchild_of_a_child_that_works_is_refused_too(directory: Path) -> None:
    text = """
def refused():
    try:
        asyncio.run(use())
    except apmem2.ForkedError:
        return
    raise SystemExit("not refused")

async def use():
    async with apmem2.open("a", size=1 << 16) as m:
        await m.persist()

def child():
    asyncio.run(use())
    assert in_child(refused) == 0
    asyncio.run(use())

assert in_child(child) == 0
"""
    assert ended_well(run(directory, text)) == ""


@pytest.mark.parametrize(("method", "expected"), [("fork", "ForkedError"), ("spawn", "done"), ("forkserver", "done")])
def test_multiprocessing_children_are_refused_when_forked_and_work_when_fresh(
    directory: Path, method: str, expected: str
) -> None:
    """A module in a file: a spawned child has to import what it is to run."""
    (directory / "program.py").write_text(
        """
import asyncio, multiprocessing, sys
import apmem2

async def use(name):
    async with apmem2.open(name, size=1 << 16) as m:
        await m.memcpy(0, name.encode())
        return "done"

def work(name):
    try:
        return asyncio.run(use(name))
    except apmem2.ForkedError:
        return "ForkedError"

if __name__ == "__main__":
    asyncio.run(use("parent"))
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(sorted(set(pool.map(work, ["one", "two", "three"]))))
        pool.close()
        pool.join()
    asyncio.run(use("parent"))
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "program.py", method],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended_well(done) == ""
    assert done.stdout == f"['{expected}']\n"


def test_a_started_program_inherits_no_descriptor_of_ours(directory: Path) -> None:
    text = """
async def main():
    fds = lambda: set(os.listdir("/proc/self/fd"))
    async with apmem2.open("a", size=1 << 16) as m:
        await m.persist()
        code = "import os; fds = '/proc/self/fd/'; print(*(os.readlink(fds + fd) for fd in os.listdir(fds) "
        code += "if int(fd) > 2 and os.path.lexists(fds + fd)))"
        for close in (True, False):
            child = subprocess.run([sys.executable, "-c", code], close_fds=close, capture_output=True, text=True)
            assert child.returncode == 0 and "apm" not in child.stdout, child
            assert os.getcwd() + "/a" not in child.stdout and "eventfd" not in child.stdout, child.stdout
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, close_fds=False, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0 and b"eventfd" not in out and b"/a" not in out.split(b"/proc")[0], out
        own = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
               if os.path.lexists(f"/proc/self/fd/{fd}")]
        assert any("eventfd" in name for name in own)  # there was something to inherit
        assert apmem2.statistics().in_flight == 0
        await m.persist()

asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_the_threads_of_the_pool_are_named_and_block_every_signal(directory: Path) -> None:
    text = """
async def main():
    async with apmem2.open("a", size=1 << 16) as m, apmem2.open("b", size=1 << 16) as n:
        await asyncio.gather(*(x.persist(i, 1) for x in (m, n) for i in range(50)), *(m.populate() for _ in range(50)))
        found = {}
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as lines:
                status = dict(line.split(":", 1) for line in lines)
            found[int(task)] = (status["Name"].strip(), int(status["SigBlk"], 16))
        ours = [blocked for name, blocked in found.values() if name.startswith("apmem2-")]
        assert len(ours) == apmem2.statistics().threads >= 2, found
        # all but KILL and STOP, which nobody can block, and the two that the C library keeps for itself
        for blocked in ours:
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                assert blocked >> (number - 1) & 1, (number, hex(blocked))
        assert found[os.getpid()][1] == 0  # the program's own thread blocks nothing

asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""


@pytest.mark.parametrize("uv", [False, True], ids=["asyncio", "uvloop"])
def test_signals_in_the_middle_of_persists_reach_the_program_and_break_no_call(directory: Path, uv: bool) -> None:
    text = f"""
async def main():
    came = 0
    def arrived():
        nonlocal came
        came += 1
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, arrived)
    async with apmem2.open("a", size=1 << 16) as m:
        for number in range(200):
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.gather(m.memcpy(number, b"x"), m.persist(number, 1))
        assert m.failed is None
    assert came > 0

if {uv}:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
    assert ended_well(run(directory, text)) == ""
