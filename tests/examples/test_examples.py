"""The examples do what they say: the ring recovers, the inbox answers when it may, the demo notices a loss."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("starlette")
pytest.importorskip("uvloop")
pytest.importorskip("rich")

import aiohttp

from examples.demo import DemoError, Server, Verdict, compare, kill_moments
from examples.webhook_inbox import ring
from examples.webhook_inbox.deliveries import BODY_BYTES_MAX, BODY_BYTES_MIN, Delivery, deliveries
from examples.webhook_inbox.inbox import IdReusedError, Inbox, InboxFailedError, InboxFullError, NotDurableYetError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ring.Geometry(slot_count=4, slot_bytes=4096)
TIMEOUT_S = 120


class FakeMemory:
    """The part of a map that the inbox uses, on a bytearray; copies can be held or made to fail."""

    def __init__(self, size: int = SMALL.file_bytes) -> None:
        self.view = memoryview(bytearray(size))
        self.failed: BaseException | None = None
        self.calls: list[str] = []
        self.held: dict[int, asyncio.Event] = {}
        self.error: BaseException | None = None

    async def persist(self, offset: int, size: int) -> None:
        self.calls.append(f"persist {offset} {size}")

    async def populate(self, offset: int, size: int) -> None:
        assert offset >= 0
        assert offset + size <= len(self.view)
        self.calls.append("populate")

    async def memcpy(self, offset: int, data: bytes) -> None:
        if offset in self.held:
            await self.held[offset].wait()
        if self.error is not None:
            raise self.error
        self.view[offset : offset + len(data)] = data
        self.calls.append("memcpy")


async def opened(memory: FakeMemory) -> Inbox:
    return await Inbox.open(memory, SMALL)  # type: ignore[arg-type]


async def bodies(inbox: Inbox) -> list[bytes]:
    return [record.body async for record in inbox.events()]


def packed(seq: int, body: bytes = b"body", event_id: str = "id") -> bytes:
    return ring.pack_record(ring.Record(seq, 1, event_id, body), SMALL)


# ---- the bytes of the ring


def test_a_record_comes_back_as_it_was_packed() -> None:
    record = ring.Record(7, 123456789, "lieferung-é", bytes(range(256)))
    assert ring.unpack_record(memoryview(ring.pack_record(record, SMALL).ljust(SMALL.slot_bytes, b"\xff"))) == record


def test_the_largest_record_fills_its_slot() -> None:
    record = ring.Record(1, 1, "i" * ring.ID_BYTES_MAX, b"b" * SMALL.body_bytes_max)
    assert len(ring.pack_record(record, SMALL)) == SMALL.slot_bytes
    with pytest.raises(ValueError, match="body"):
        ring.pack_record(ring.Record(1, 1, "", b"b" * (SMALL.body_bytes_max + 1)), SMALL)
    with pytest.raises(ValueError, match="id"):
        ring.pack_record(ring.Record(1, 1, "i" * (ring.ID_BYTES_MAX + 1), b""), SMALL)


def test_every_cut_of_a_record_is_refused() -> None:
    whole = packed(2, b"x" * 100)
    for cut in range(len(whole)):
        slot = memoryview(whole[:cut].ljust(SMALL.slot_bytes, b"\0"))
        if cut == 0:
            assert ring.unpack_record(slot) is None
        else:
            with pytest.raises(ring.TornRecordError):
                ring.unpack_record(slot)


def test_every_flipped_bit_of_a_record_is_refused() -> None:
    whole = packed(2, b"some body")
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole.ljust(SMALL.slot_bytes, b"\0"))
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ring.TornRecordError):
            ring.unpack_record(memoryview(damaged))


def test_a_length_from_the_medium_is_bounded_by_the_slot() -> None:
    damaged = bytearray(packed(2))
    damaged[24:28] = b"\xff\xff\xff\xff"
    with pytest.raises(ring.TornRecordError, match="head"):
        ring.unpack_record(memoryview(damaged))


def test_a_torn_mark_leaves_its_predecessor() -> None:
    view = memoryview(bytearray(SMALL.file_bytes))
    assert ring.unpack_mark(view) == ring.Mark(0, 0)
    marks = [ring.Mark(1, 10), ring.Mark(2, 20), ring.Mark(3, 30)]
    for mark in marks:
        view[mark.offset : mark.offset + 28] = ring.pack_mark(mark)
    assert ring.unpack_mark(view) == marks[2]
    view[marks[2].offset + 20] ^= 1
    assert ring.unpack_mark(view) == marks[1]
    view[marks[1].offset + 20] ^= 1
    with pytest.raises(ring.RingDamagedError):
        ring.unpack_mark(view)


# ---- the inbox on its map


@pytest.mark.asyncio
async def test_recovery_finds_whole_records_and_refuses_a_torn_one() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    for n in range(3):
        await inbox.store(f"id-{n}", b"body %d" % n)
    memory.view[SMALL.slot_offset(2) + 40] ^= 1
    again = await opened(memory)
    assert await bodies(again) == [b"body 0", b"body 2"]
    assert again.torn == 1
    assert await again.store("id-1", b"body 1") == (4, True)


@pytest.mark.asyncio
async def test_recovery_persists_what_it_finds_before_it_looks() -> None:
    memory = FakeMemory()
    await (await opened(memory)).store("id", b"body")
    memory.calls.clear()
    await opened(memory)
    assert memory.calls[0] == f"persist 0 {SMALL.file_bytes}"


@pytest.mark.asyncio
async def test_pages_are_read_in_before_they_are_looked_at() -> None:
    memory = FakeMemory()
    await (await opened(memory)).store("id", b"body")
    memory.calls.clear()
    inbox = await opened(memory)
    assert memory.calls[1:] == ["populate"]
    memory.calls.clear()
    assert await bodies(inbox) == [b"body"]
    assert await inbox.read(1) is not None
    assert memory.calls == ["populate", "populate"]


@pytest.mark.asyncio
async def test_an_id_is_forgotten_with_the_slot_that_held_it() -> None:
    inbox = await opened(FakeMemory())
    for n in range(1, 6):
        assert await inbox.store(f"id-{n}", b"body") == (n, True)
        await inbox.consume(n)
    assert await inbox.store("id-2", b"body") == (2, False)
    assert await inbox.store("id-1", b"another body") == (6, True)
    assert await inbox.store("id-2", b"another body") == (7, True)


@pytest.mark.asyncio
async def test_a_file_of_another_geometry_or_without_header_is_refused() -> None:
    memory = FakeMemory()
    await (await opened(memory)).store("id", b"body")
    with pytest.raises(ring.RingDamagedError, match="made with"):
        await Inbox.open(memory, ring.Geometry(slot_count=2, slot_bytes=8192))  # type: ignore[arg-type]
    memory.view[0:64] = bytes(64)
    with pytest.raises(ring.RingDamagedError, match="header is gone"):
        await opened(memory)
    memory.view[3] = 1
    with pytest.raises(ring.RingDamagedError, match="header is damaged"):
        await opened(memory)


@pytest.mark.asyncio
async def test_a_full_ring_overwrites_nothing_and_goes_on_when_events_are_consumed() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    for n in range(4):
        await inbox.store(f"id-{n}", b"%d" % n)
    before = bytes(memory.view)
    with pytest.raises(InboxFullError):
        await inbox.store("id-4", b"4")
    assert bytes(memory.view) == before
    await inbox.consume(2)
    assert await inbox.store("id-4", b"4") == (5, True)
    assert await inbox.store("id-5", b"5") == (6, True)
    with pytest.raises(InboxFullError):
        await inbox.store("id-6", b"6")
    assert await bodies(inbox) == [b"2", b"3", b"4", b"5"]
    assert await bodies(await opened(memory)) == [b"2", b"3", b"4", b"5"]


@pytest.mark.asyncio
async def test_the_ring_wraps_many_times() -> None:
    memory = FakeMemory()
    for n in range(1, 30):
        inbox = await opened(memory)
        assert await inbox.store(f"id-{n}", b"%d" % n) == (n, True)
        assert (await bodies(inbox))[-1] == b"%d" % n
        if n >= 2:
            await inbox.consume(n - 1)
    assert await bodies(await opened(memory)) == [b"29"]


@pytest.mark.asyncio
async def test_a_repeated_delivery_is_stored_once_also_after_a_restart_and_when_consumed() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    assert await inbox.store("id", b"body") == (1, True)
    assert await inbox.store("id", b"body") == (1, False)
    inbox = await opened(memory)
    assert await inbox.store("id", b"body") == (1, False)
    await inbox.consume(1)
    inbox = await opened(memory)
    assert await inbox.store("id", b"body") == (1, False)
    assert await bodies(inbox) == []
    with pytest.raises(IdReusedError):
        await inbox.store("id", b"another body")
    assert await inbox.store("", b"body") == (2, True)
    assert await inbox.store("", b"body") == (3, True)


@pytest.mark.asyncio
async def test_a_repeated_delivery_waits_until_the_first_is_durable() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    gate = memory.held[SMALL.slot_offset(1)] = asyncio.Event()
    first = asyncio.create_task(inbox.store("id", b"body"))
    second = asyncio.create_task(inbox.store("id", b"body"))
    _, waiting = await asyncio.wait({first, second}, timeout=0.05)
    assert waiting == {first, second}
    gate.set()
    assert (await first, await second) == ((1, True), (1, False))


@pytest.mark.asyncio
async def test_a_reader_and_a_consumer_stop_before_the_oldest_write_in_flight() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    gate = memory.held[SMALL.slot_offset(1)] = asyncio.Event()
    first = asyncio.create_task(inbox.store("a", b"a"))
    await asyncio.sleep(0)
    await inbox.store("b", b"b")
    assert await bodies(inbox) == []
    assert await inbox.read(1) is None
    with pytest.raises(NotDurableYetError):
        await inbox.consume(2)
    gate.set()
    await first
    assert await bodies(inbox) == [b"a", b"b"]


@pytest.mark.asyncio
async def test_a_client_that_goes_away_does_not_take_its_write_along() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    gate = memory.held[SMALL.slot_offset(1)] = asyncio.Event()
    gone = asyncio.create_task(inbox.store("id", b"body"))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.set()
    await inbox.aclose()
    assert await bodies(inbox) == [b"body"]
    assert await inbox.store("id", b"body") == (1, False)


@pytest.mark.asyncio
async def test_after_a_failed_write_nothing_is_acknowledged_any_more() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    await inbox.store("a", b"a")
    memory.error = OSError(5, "the disk gave up")
    with pytest.raises(InboxFailedError) as caught:
        await inbox.store("b", b"b")
    assert caught.value.__cause__ is memory.error is inbox.failed
    memory.error = None
    for event_id, body in (("b", b"b"), ("c", b"c"), ("a", b"a")):
        with pytest.raises(InboxFailedError):
            await inbox.store(event_id, body)
    with pytest.raises(InboxFailedError):
        await inbox.consume(1)
    assert await bodies(inbox) == [b"a"]


@pytest.mark.asyncio
async def test_a_mark_that_was_not_written_frees_no_slot() -> None:
    memory = FakeMemory()
    inbox = await opened(memory)
    for n in range(4):
        await inbox.store(str(n), b"")
    memory.error = OSError(5, "the disk gave up")
    with pytest.raises(InboxFailedError):
        await inbox.consume(4)
    assert inbox.consumed == 0


# ---- the judgement of the demo


def judged(doctor: Any = lambda listing, acknowledged: None) -> Verdict:
    posted = [Delivery(f"id-{n}", {}, b"body %d" % n) for n in range(4)]
    acknowledged = {f"id-{n}": n + 1 for n in range(3)}
    listing: list[dict[str, Any]] = [
        {"seq": n + 1, "id": d.event_id, "size": len(d.body), "sha256": d.sha256} for n, d in enumerate(posted)
    ]
    doctor(listing, acknowledged)
    return compare(posted, acknowledged, listing)


def test_an_event_that_was_never_answered_may_be_there() -> None:
    verdict = judged()
    assert verdict.last_line == "acknowledged=3 found=3 lost=0"
    assert (verdict.unanswered, verdict.unanswered_present, verdict.problems) == (1, 1, ())
    verdict = judged(lambda listing, _: listing.pop())
    assert (verdict.lost, verdict.unanswered, verdict.unanswered_present) == (0, 1, 0)


@pytest.mark.parametrize(
    ("doctor", "lost", "altered", "problems"),
    [
        (lambda listing, _: listing.pop(1), 1, 0, 0),
        (lambda listing, _: listing.clear(), 3, 0, 0),
        (lambda listing, _: listing[0].update(sha256="0" * 64), 1, 1, 0),
        (lambda listing, _: listing[0].update(size=1), 1, 1, 0),
        (lambda listing, _: listing[0].update(seq=9), 1, 1, 0),
        (lambda listing, _: listing[3].update(sha256="0" * 64), 0, 0, 1),
        (lambda listing, _: listing.append({**listing[0], "seq": 9}), 0, 0, 1),
        (lambda listing, _: listing.append({**listing[0], "seq": 9, "id": "stranger"}), 0, 0, 1),
    ],
)
def test_a_doctored_listing_is_noticed(doctor: Any, lost: int, altered: int, problems: int) -> None:
    verdict = judged(doctor)
    assert (verdict.lost, verdict.altered, len(verdict.problems)) == (lost, altered, problems)
    assert verdict.found + verdict.lost == verdict.acknowledged == 3


def test_deliveries_are_the_same_for_a_seed_and_have_many_sizes() -> None:
    made = list(deliveries(2000, seed=3))
    assert made == list(deliveries(2000, seed=3))
    assert len({d.event_id for d in made}) == len({d.body for d in made}) == 2000
    sizes = [len(d.body) for d in made]
    assert BODY_BYTES_MIN <= min(sizes) < 500
    assert 6000 < max(sizes) <= BODY_BYTES_MAX
    assert all(json.loads(d.body) for d in made)


def test_kills_fall_in_the_middle_and_in_order() -> None:
    for seed in range(50):
        after = [settled for settled, _ in kill_moments(1000, 4, random.Random(seed))]
        assert after == sorted(after)
        assert after[0] >= 300
        assert after[-1] <= 700


# ---- the server, over HTTP


@asynccontextmanager
async def serving(
    data: Path, slots: int = 16, module: str = "examples.webhook_inbox"
) -> AsyncIterator[aiohttp.ClientSession]:
    server = Server(module, data, slots)
    try:
        await server.start()
        async with aiohttp.ClientSession(server.url) as client:
            yield client
    finally:
        await server.stop()


async def posted(client: aiohttp.ClientSession, body: bytes, event_id: str | None = None) -> tuple[int, Any]:
    headers = {} if event_id is None else {"Idempotency-Key": event_id}
    async with client.post("/events", data=body, headers=headers) as response:
        return response.status, await response.json()


async def listed(client: aiohttp.ClientSession) -> list[Any]:
    async with client.get("/events", raise_for_status=True) as response:
        return [json.loads(line) async for line in response.content]


async def health(client: aiohttp.ClientSession) -> Any:
    async with client.get("/health") as response:
        return {"status": response.status, **await response.json()}


@pytest.fixture
def from_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.asyncio
@pytest.mark.usefixtures("from_root")
async def test_the_server_answers_as_documented(tmp_path: Path) -> None:
    async with serving(tmp_path / "ring", slots=3) as client:
        assert await posted(client, b"one", "id-1") == (201, {"seq": 1, "duplicate": False})
        assert await posted(client, b"one", "id-1") == (200, {"seq": 1, "duplicate": True})
        assert (await posted(client, b"other", "id-1"))[0] == 422
        assert (await posted(client, b"x", "i" * 129))[0] == 400
        assert (await posted(client, bytes(20_000)))[0] == 413
        assert await posted(client, b"two") == (201, {"seq": 2, "duplicate": False})
        assert await posted(client, b"", "id-3") == (201, {"seq": 3, "duplicate": False})
        async with client.post("/events", data=b"four") as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
        there = [(event["seq"], event["id"], event["size"]) for event in await listed(client)]
        assert there == [(1, "id-1", 3), (2, None, 3), (3, "id-3", 0)]
        async with client.get("/events/2") as response:
            assert await response.read() == b"two"
        async with client.get("/events/9") as response:
            assert response.status == 404
        async with client.delete("/events?through=9") as response:
            assert response.status == 409
        async with client.delete("/events") as response:
            assert response.status == 400
        async with client.delete("/events?through=1") as response:
            assert (response.status, await response.json()) == (200, {"consumed": 1})
        assert (await posted(client, b"four"))[0] == 201
        report = await health(client)
        assert (report["status"], report["failed"], report["pending"], report["consumed"]) == (200, None, 3, 1)
        assert report["durability"] in {"NONE", "UNKNOWN", "POWER_LOSS"}
    async with serving(tmp_path / "ring", slots=3) as client:
        assert [e["seq"] for e in await listed(client)] == [2, 3, 4]


@pytest.mark.asyncio
@pytest.mark.usefixtures("from_root")
async def test_a_second_process_on_the_same_file_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "ring") as client:
        second = Server("examples.webhook_inbox", tmp_path / "ring", 16)
        try:
            with pytest.raises(DemoError, match="in use by another process"):
                await second.start()
        finally:
            await second.stop()
        assert (await posted(client, b"still serving"))[0] == 201


@pytest.mark.asyncio
@pytest.mark.usefixtures("from_root")
async def test_a_record_damaged_on_disk_is_refused_and_counted(tmp_path: Path) -> None:
    data = tmp_path / "ring"
    async with serving(data) as client:
        for n in range(3):
            await posted(client, b"body %d" % n, f"id-{n}")
    with data.open("r+b") as file:
        file.seek(ring.Geometry(slot_count=16).slot_offset(2) + 40)
        file.write(b"?")
    async with serving(data) as client:
        assert [e["id"] for e in await listed(client)] == ["id-0", "id-2"]
        assert (await health(client))["torn"] == 1


@pytest.mark.asyncio
@pytest.mark.usefixtures("from_root")
async def test_after_a_failed_write_the_server_answers_503_and_goes_on_doing_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INBOX_FAULT", "eio")
    async with serving(tmp_path / "ring", module="tests.examples.lying_server") as client:
        assert [(await posted(client, b"body", f"id-{n}"))[0] for n in range(8)] == [201] * 3 + [503] * 5
        assert (await posted(client, b"body", "id-0"))[0] == 503
        report = await health(client)
        assert report["status"] == 503
        assert "gave up" in report["failed"]
        assert [e["id"] for e in await listed(client)] == ["id-0", "id-1", "id-2"]


# ---- the programs


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("kills", [1, 3])
def test_the_demo_loses_nothing(tmp_path: Path, kills: int) -> None:
    done = run("examples.demo", "--count", "400", "--kills", str(kills), "--dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    last = re.fullmatch(r"acknowledged=(\d+) found=(\d+) lost=0", done.stdout.splitlines()[-1])
    assert last is not None
    assert last[1] == last[2]
    assert 400 - 32 * kills <= int(last[1]) < 400
    assert list(tmp_path.iterdir()) == []


def test_the_demo_notices_a_server_that_acknowledges_without_storing(tmp_path: Path) -> None:
    module = "tests.examples.lying_server"
    done = run("examples.demo", "--count", "400", "--dir", str(tmp_path), "--server-module", module, INBOX_FAULT="lie")
    last = re.fullmatch(r"acknowledged=(\d+) found=(\d+) lost=(\d+)", done.stdout.splitlines()[-1])
    assert last is not None, done.stdout + done.stderr
    acknowledged, found, lost = map(int, last.groups())
    assert lost > 0
    assert found + lost == acknowledged
    assert done.returncode == 1


def test_the_demo_fails_when_the_server_fails(tmp_path: Path) -> None:
    module = "tests.examples.lying_server"
    done = run("examples.demo", "--count", "400", "--dir", str(tmp_path), "--server-module", module, INBOX_FAULT="eio")
    assert done.returncode == 1
    assert "the server answered 503" in done.stderr
    done = run("examples.demo", "--count", "400", "--dir", str(tmp_path), "--server-module", "examples.no_such_server")
    assert done.returncode == 1
    assert "No module named" in done.stderr


def test_the_adopted_memmap_is_persisted(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    done = run("examples.numpy_memmap", str(tmp_path / "readings"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "read back through a new mapping: as stored"
