"""Webhook inboxes that do wrong on purpose, to show that the demo and the tests would notice.

`INBOX_FAULT=lie` (the default) acknowledges every fifth event without storing it, and lists it from memory, so that
only the death of the process brings it out. `INBOX_FAULT=eio` has a disk that fails after three writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from typing import Any, Self

from examples.webhook_inbox import ring
from examples.webhook_inbox.__main__ import serve
from examples.webhook_inbox.inbox import Inbox

WRITES_BEFORE_FAILURE = 4  # the header of the new file is the first


class LyingInbox(Inbox):
    """Acknowledges what it never stored."""

    def __init__(self, memory: Any, geometry: ring.Geometry) -> None:
        super().__init__(memory, geometry)
        self._kept: list[ring.Record] = []

    async def store(self, event_id: str, body: bytes) -> tuple[int, bool]:
        """Store, or say so."""
        if self._next % 5:
            return await super().store(event_id, body)
        seq, self._next = self._next, self._next + 1
        self._kept.append(ring.Record(seq, 0, event_id, body))
        return seq, True

    async def events(self) -> AsyncIterator[ring.Record]:
        """What was stored, and what was not."""
        async for record in super().events():
            yield record
        for record in self._kept:
            yield record


class FailingMemory:
    """A map whose disk gives up."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    async def memcpy(self, offset: int, data: bytes) -> None:
        """Copy; fail once after some writes, and work again from then on, as a disk behind a page cache would."""
        self._writes += 1
        if self._writes == WRITES_BEFORE_FAILURE + 1:
            raise OSError(errno.EIO, "the disk gave up")
        await self._memory.memcpy(offset, data)


class FailingInbox(Inbox):
    """An honest inbox on a failing disk."""

    @classmethod
    async def open(cls, memory: Any, geometry: ring.Geometry) -> Self:
        """Open it on the failing map."""
        return await super().open(FailingMemory(memory), geometry)  # type: ignore[arg-type]


if __name__ == "__main__":
    serve({"lie": LyingInbox, "eio": FailingInbox}[os.environ.get("INBOX_FAULT", "lie")])
