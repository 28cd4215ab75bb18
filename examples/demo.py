"""Does an acknowledged webhook survive the death of the server? `make demo` shows it, on real HTTP requests.

    python -m examples.demo [--count 3000] [--clients 32] [--kills 1] [--seed N]

It starts the inbox of `examples.webhook_inbox` on loopback, posts deliveries from concurrent clients, kills the
server with SIGKILL while requests are in flight, starts it again, posts the rest, and then reads everything back
through the server. Requests in flight at the kill were never answered and are not sent again, so that the table can
show how many of them are there all the same: that is allowed, an acknowledged one that is not there is a loss.

SIGKILL shows the death of a process only: the kernel and its page cache live on, so even a server that never syncs
would pass. What a power cut leaves takes other tests; the README names them.

The last line is `acknowledged=N found=N lost=0`. The exit code is 1 if an acknowledged event is lost or altered, if
nothing was acknowledged before the first kill, or if anything else went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.webhook_inbox.deliveries import Delivery, deliveries

START_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 30.0
# Where the kills fall, as parts of all requests: not before something is acknowledged, not after nothing is left.
KILL_FROM, KILL_TO = 0.3, 0.7
KILL_JITTER_S = 0.004


class DemoError(Exception):
    """The run cannot show what it should: the server did not start, died by itself, or gave a wrong answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Acknowledged against found. `found` + `lost` is `acknowledged`; altered events count as lost."""

    acknowledged: int
    found: int
    altered: int
    unanswered: int
    unanswered_present: int
    problems: tuple[str, ...]

    @property
    def lost(self) -> int:
        """Acknowledged events that are not there as they were sent."""
        return self.acknowledged - self.found

    @property
    def last_line(self) -> str:
        """What scripts look for."""
        return f"acknowledged={self.acknowledged} found={self.found} lost={self.lost}"


def compare(posted: Iterable[Delivery], acknowledged: dict[str, int], listing: list[dict[str, Any]]) -> Verdict:
    """Judge what the server lists against what was posted and what was answered (id to sequence number).

    An event is found only with the bytes and the sequence number with which it was acknowledged. An event that was
    posted and never answered may be there or not, but if it is, then whole.
    """
    sent = {delivery.event_id: delivery for delivery in posted}
    there: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for line in listing:
        if line["id"] not in sent:
            problems.append(f"event {line['seq']} was never posted")
        elif line["id"] in there:
            problems.append(f"event {line['seq']} is there twice, as {there[line['id']]['seq']} too")
        else:
            there[line["id"]] = line
    damaged = {i for i, line in there.items() if (line["size"], line["sha256"]) != (len(sent[i].body), sent[i].sha256)}
    renumbered = {i for i, seq in acknowledged.items() if i in there and there[i]["seq"] != seq}
    present = acknowledged.keys() & there.keys()
    altered = present & (damaged | renumbered)
    problems += [
        f"event {there[i]['seq']} was never answered, and is there with other bytes" for i in damaged - present
    ]
    return Verdict(
        acknowledged=len(acknowledged),
        found=len(present - altered),
        altered=len(altered),
        unanswered=len(sent.keys() - acknowledged.keys()),
        unanswered_present=len(there.keys() - acknowledged.keys()),
        problems=tuple(problems),
    )


class Server:
    """The server as a child process, one start after the other on the same file."""

    def __init__(self, module: str, data: Path, slots: int) -> None:
        self._command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0"]
        self._command += ["--data", str(data), "--slots", str(slots)]
        self._log = data.with_suffix(".log")
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self) -> float:
        """Start it and wait for its word that it listens; return how long that took, in seconds."""
        begun = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        try:
            # An event with a bound, not a sleep: the line comes when it listens, the end of file when it has died.
            line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        except TimeoutError:
            raise DemoError(f"the server was not ready after {START_TIMEOUT_S:g} s{self._last_words()}") from None
        if not line.startswith(b"ready "):
            raise DemoError(f"the server did not start{self._last_words()}")
        self.url = line.split()[1].decode()
        return time.perf_counter() - begun

    def kill(self) -> None:
        """SIGKILL, to this process id and no other."""
        assert self._process is not None
        if self._process.returncode is not None:
            raise DemoError(f"the server had died by itself ({self._process.returncode}){self._last_words()}")
        os.kill(self._process.pid, signal.SIGKILL)

    async def ended(self) -> None:
        """Wait until the process is gone."""
        assert self._process is not None
        await self._process.wait()

    async def stop(self) -> None:
        """End it in an orderly way, and make sure that it is gone; nothing happens when it is not running."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), START_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise DemoError("the server did not end when it was asked to") from None

    def _last_words(self) -> str:
        words = self._log.read_text(errors="replace").strip().splitlines()[-15:] if self._log.exists() else []
        return "\n".join((":", *words)) if words else ""


@dataclass
class Run:
    """Clients that post, and one hand that kills. What is answered is written down when the answer is whole."""

    server: Server
    client: aiohttp.ClientSession
    posted: list[Delivery]
    advance: Callable[[], None]
    acknowledged: dict[str, int] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    acknowledged_at_kill: list[int] = field(default_factory=list)
    in_flight_at_kill: list[int] = field(default_factory=list)
    reopen_s: list[float] = field(default_factory=list)
    down_s: float = 0.0
    in_flight: int = 0

    def __post_init__(self) -> None:
        self._rest = iter(self.posted)
        self._up = asyncio.Event()
        self._up.set()
        self._idle = asyncio.Event()
        self._progress = asyncio.Event()

    async def post_all(self, clients: int, kills: list[tuple[int, float]]) -> None:
        """Post everything from `clients` tasks; `kills` says after how many settled requests, and how much later."""
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client())
            group.create_task(self._killer(kills))

    async def _client(self) -> None:
        while True:
            await self._up.wait()
            # No await from here to the request: a client is in flight, or held by `_up`, or done.
            delivery = next(self._rest, None)
            if delivery is None:
                return
            self.in_flight += 1
            try:
                await self._post(delivery)
            finally:
                self.in_flight -= 1
                if not self.in_flight:
                    self._idle.set()
            self.advance()
            self._progress.set()

    async def _post(self, delivery: Delivery) -> None:
        try:
            async with self.client.post(
                f"{self.server.url}/events", data=delivery.body, headers=delivery.headers
            ) as response:
                answer = await response.read()
        except aiohttp.ClientError as error:
            if self._up.is_set():
                raise DemoError(f"a request failed and nobody had killed the server: {error!r}") from error
            self.unanswered.append(delivery.event_id)
            return
        if not response.ok:
            raise DemoError(f"the server answered {response.status}: {answer.decode(errors='replace')}")
        self.acknowledged[delivery.event_id] = json.loads(answer)["seq"]

    async def _killer(self, kills: list[tuple[int, float]]) -> None:
        for settled, jitter_s in kills:
            while len(self.acknowledged) + len(self.unanswered) < settled:
                self._progress.clear()
                await self._progress.wait()
            await asyncio.sleep(jitter_s)
            if not self.in_flight:
                raise DemoError("no request was in flight at the moment of the kill: use a larger --count")
            begun = time.perf_counter()
            self._up.clear()
            self._idle.clear()
            self.in_flight_at_kill.append(self.in_flight)
            self.acknowledged_at_kill.append(len(self.acknowledged))
            self.server.kill()
            await self.server.ended()
            # Answers that were on their way when it died still count: they were received whole.
            await self._idle.wait()
            self.reopen_s.append(await self.server.start())
            self.down_s += time.perf_counter() - begun
            self._up.set()


def kill_moments(count: int, kills: int, chance: random.Random) -> list[tuple[int, float]]:
    """After how many settled requests to kill, and how many seconds after that; one kill in each equal part."""
    width = count * (KILL_TO - KILL_FROM) / max(kills, 1)
    starts = (count * KILL_FROM + width * k for k in range(kills))
    return [(int(start + chance.random() * width), chance.random() * KILL_JITTER_S) for start in starts]


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; elsewhere a line for every tenth, so that logs stay readable."""
    if console.is_terminal:
        columns = (TextColumn("posting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("posting", total=total)
            yield lambda: bar.advance(task)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * 10 // total != (done - 1) * 10 // total:
            print(f"posting {done}/{total}", flush=True)

    yield advance


def table(run: Run, verdict: Verdict, posting_s: float) -> Table:
    """The outcome, for people."""
    rows = Table("what", "events", title="SIGKILL in the middle of webhooks", title_justify="left")
    rows.columns[1].justify = "right"
    rows.add_row("posted", str(len(run.posted)))
    rows.add_row("acknowledged (2xx received whole)", str(verdict.acknowledged))
    rows.add_row("found, of the acknowledged", str(verdict.found), style="green")
    rows.add_row("lost", str(verdict.lost), style="bold red" if verdict.lost else "green")
    rows.add_row("  of these there, but altered", str(verdict.altered))
    rows.add_row("never answered", str(verdict.unanswered))
    rows.add_row("  of these there all the same", str(verdict.unanswered_present), end_section=True)
    for number, (before, flying, seconds) in enumerate(
        zip(run.acknowledged_at_kill, run.in_flight_at_kill, run.reopen_s, strict=True), start=1
    ):
        rows.add_row(f"kill {number}: acknowledged before / in flight", f"{before} / {flying}")
        rows.add_row(f"kill {number}: process start to ready again", f"{seconds:.2f} s")
    rows.add_row("requests per second, down time left out", f"{len(run.posted) / (posting_s - run.down_s):.0f}")
    return rows


async def demo(options: argparse.Namespace, data: Path, console: Console) -> Verdict:
    """One whole run on the file `data`."""
    chance = random.Random(options.seed)
    kills = kill_moments(options.count, options.kills, chance)
    posted = list(deliveries(options.count, options.seed))
    server = Server(options.server_module, data, slots=options.count)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=options.clients)
    try:
        await server.start()
        # POST is never repeated by the client by itself: what was in flight at a kill stays unanswered.
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            async with client.get(f"{server.url}/health") as response:
                health = await response.json()
            print(f"server on {server.url}, ring in {data}, durability {health['durability']}", flush=True)
            if health["durability"] != "POWER_LOSS":
                print(f"note: nobody can promise that {data.parent} survives a power cut; use --dir for another place")
            begun = time.perf_counter()
            with progress_bar(console, options.count) as advance:
                run = Run(server, client, posted, advance)
                await run.post_all(options.clients, kills)
            posting_s = time.perf_counter() - begun
            async with client.get(f"{server.url}/events", raise_for_status=True) as response:
                events = [json.loads(line) async for line in response.content]
    finally:
        await server.stop()
    verdict = compare(posted, run.acknowledged, events)
    console.print(table(run, verdict, posting_s))
    if kills and not run.acknowledged_at_kill[0]:
        raise DemoError("nothing was acknowledged before the first kill")
    return verdict


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Kill a webhook inbox; count what is left."
    )
    parser.add_argument("--count", type=int, default=3000, help="requests to post")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients")
    parser.add_argument("--kills", type=int, default=1, help="how often the server is killed")
    parser.add_argument("--seed", type=int, default=None, help="chooses deliveries and moments of the kills")
    parser.add_argument("--dir", type=Path, default=None, help="where the ring goes; default: $TMPDIR or here")
    parser.add_argument("--server-module", default="examples.webhook_inbox", help="the server to judge")
    options = parser.parse_args(argv)
    if options.count < 1 or options.clients < 1 or options.kills < 0:
        parser.error("--count and --clients must be at least 1, --kills at least 0")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 only where every acknowledged event is there as it was sent."""
    options = arguments(argv)
    console = Console()
    parent = options.dir or Path(os.environ.get("TMPDIR") or Path.cwd())
    directory = Path(tempfile.mkdtemp(prefix="apmem2-demo-", dir=parent))
    print(
        f"{options.count} requests, {options.clients} clients, {options.kills} kill(s), --seed {options.seed}",
        flush=True,
    )
    good = False
    try:
        verdict = uvloop.run(demo(options, directory / "inbox.ring", console))
        for problem in verdict.problems[:10]:
            print(f"problem: {problem}")
        good = verdict.lost == 0 and verdict.acknowledged > 0 and not verdict.problems
        print(
            "note: SIGKILL shows process death only: the page cache survives it. Power cuts need more, see the README."
        )
        if not good:
            print(f"the ring is kept in {directory}")
        print(verdict.last_line)
    except* (DemoError, aiohttp.ClientError, OSError, ValueError, KeyError) as group:
        for error in group.exceptions:
            print(f"failed: {error}", file=sys.stderr)
        print(f"the files are kept in {directory}", file=sys.stderr)
    finally:
        if good:
            shutil.rmtree(directory)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
