"""What is answered, and when? The HTTP face of the inbox, on Starlette.

    POST   /events             201 when the event is durable, 200 for a repeated delivery of a durable one
    GET    /events             durable events that nobody has consumed, one JSON object per line
    GET    /events/{seq}       the body of one
    DELETE /events?through=N   consumed up to N: their slots may be used again
    GET    /health             durability, failure, statistics

When the ring is full, new events get 503 with Retry-After, and none is overwritten. After a failed write every POST
and DELETE gets 503 until the process is started again: what a failed sync has left behind is not known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import apmem2

from . import ring
from .inbox import IdReusedError, Inbox, InboxFailedError, InboxFullError, NotDurableYetError

# The headers in which providers send the id of a delivery, in the order in which they are believed. Without one a
# repeated delivery cannot be told from a new event, and both are stored.
ID_HEADERS = ("idempotency-key", "webhook-id", "x-github-delivery", "x-shopify-webhook-id")
FULL_RETRY_AFTER_S = 5


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Refuse a second process on the same file. The lock dies with its holder, so a kill leaves nothing behind."""
    descriptor = os.open(
        path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{path} is in use by another process: run one worker per file") from None
        yield
    finally:
        os.close(descriptor)


async def _body(request: Request, bytes_max: int) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > bytes_max:
            raise HTTPException(413, f"at most {bytes_max} bytes are taken")
        parts.append(part)
    return b"".join(parts)


def _event_id(request: Request) -> str:
    for name in ID_HEADERS:
        if value := request.headers.get(name):
            if len(value.encode()) > ring.ID_BYTES_MAX:
                raise HTTPException(400, f"{name} is longer than {ring.ID_BYTES_MAX} bytes")
            return value
    return ""


async def post_event(request: Request) -> Response:
    """Store one event; 2xx only after it is durable."""
    inbox: Inbox = request.app.state.inbox
    event_id = _event_id(request)
    body = await _body(request, inbox.geometry.body_bytes_max)
    seq, new = await inbox.store(event_id, body)
    # From here on the event survives a power cut: this is the first line that may say so.
    return JSONResponse({"seq": seq, "duplicate": not new}, status_code=201 if new else 200)


async def list_events(request: Request) -> Response:
    """All durable events that nobody has consumed; the hash is made of the mapped bytes, not of what was received."""
    inbox: Inbox = request.app.state.inbox

    async def lines() -> AsyncIterator[bytes]:
        async for record in inbox.events():
            line = {
                "seq": record.seq,
                "id": record.event_id or None,
                "size": len(record.body),
                "received_ns": record.received_ns,
                "sha256": hashlib.sha256(record.body).hexdigest(),
            }
            yield json.dumps(line).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/jsonl")


async def get_event(request: Request) -> Response:
    """The body of one event, as it was received."""
    record = await request.app.state.inbox.read(request.path_params["seq"])
    if record is None:
        raise HTTPException(404, "not there: never stored, not durable yet, or consumed")
    return Response(record.body, media_type="application/octet-stream")


async def consume_events(request: Request) -> Response:
    """Mark events as consumed; answered when the mark is durable."""
    inbox: Inbox = request.app.state.inbox
    try:
        through = int(request.query_params["through"])
    except (KeyError, ValueError):
        raise HTTPException(400, "say which: ?through=<sequence number>") from None
    await inbox.consume(through)
    return JSONResponse({"consumed": inbox.consumed})


async def health(request: Request) -> Response:
    """What an operator and a load balancer ask. 503 once a write has failed."""
    inbox: Inbox = request.app.state.inbox
    failed = inbox.failed
    report = {
        "durability": inbox.memory.durability.name,
        "failed": None if failed is None else f"{type(failed).__name__}: {failed}",
        "durable_seq": inbox.durable_seq,
        "consumed": inbox.consumed,
        "pending": inbox.pending,
        "slot_count": inbox.geometry.slot_count,
        "body_bytes_max": inbox.geometry.body_bytes_max,
        "torn": inbox.torn,
        "recovery_s": request.app.state.recovery_s,
        "statistics": _plain(apmem2.statistics()),
    }
    return JSONResponse(report, status_code=200 if failed is None else 503)


def _plain(snapshot: Any) -> Any:
    if dataclasses.is_dataclass(snapshot) and not isinstance(snapshot, type):
        return dataclasses.asdict(snapshot)
    return dict(snapshot)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def _answer(status: int, **headers: str) -> Any:
    async def handler(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=status, headers=headers)

    return handler


def create_app(path: Path, geometry: ring.Geometry, inbox_type: type[Inbox] = Inbox) -> Starlette:
    """The application on one ring file; the file is made, or recovered, before the first request is taken."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with _only_process(path):
            begun = time.perf_counter()
            async with apmem2.open(path, size=geometry.file_bytes) as memory:
                app.state.inbox = await inbox_type.open(memory, geometry)
                app.state.recovery_s = time.perf_counter() - begun
                try:
                    yield
                finally:
                    await app.state.inbox.aclose()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/events", post_event, methods=["POST"]),
            Route("/events", list_events, methods=["GET"]),
            Route("/events", consume_events, methods=["DELETE"]),
            Route("/events/{seq:int}", get_event, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _refuse,
            InboxFullError: _answer(503, **{"Retry-After": str(FULL_RETRY_AFTER_S)}),
            InboxFailedError: _answer(503),
            IdReusedError: _answer(422),
            NotDurableYetError: _answer(409),
        },
    )
