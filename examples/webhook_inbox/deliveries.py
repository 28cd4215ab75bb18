"""What does a provider send? Deliveries with unique ids and many sizes, made from the samples in `payloads/`.

A sample names the header that carries the id of the delivery and, where there is one, the list that makes such a
body long or short in real life (commits of a push, lines of an invoice). The samples are made up after the public
documentation of the providers. Stripe sends its id only inside the body; the samples do what a gateway does and
copy it into `Idempotency-Key`. The same seed gives the same deliveries.
"""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

PAYLOADS = Path(__file__).with_name("payloads")
BODY_BYTES_MIN = 200
BODY_BYTES_MAX = 8192
_EPOCH = datetime(2024, 6, 20, 12, 0, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request as a provider would send it."""

    event_id: str
    headers: dict[str, str]
    body: bytes

    @property
    def sha256(self) -> str:
        """What the body must hash to wherever it is found again."""
        return hashlib.sha256(self.body).hexdigest()


def deliveries(count: int, seed: int) -> Iterator[Delivery]:
    """`count` deliveries, each with an id and a body of its own."""
    samples = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PAYLOADS.glob("*.json"))]
    chance = random.Random(seed)
    for number in range(count):
        yield _delivery(chance.choice(samples), number, chance)


def _delivery(sample: dict[str, Any], number: int, chance: random.Random) -> Delivery:
    event_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    body = dict(sample["body"])
    if sample["repeat"]:
        # Sizes of real deliveries are many small ones and a few large ones.
        target = int(chance.triangular(BODY_BYTES_MIN, BODY_BYTES_MAX, BODY_BYTES_MIN))
        (item,) = body[sample["repeat"]]
        times = max(1, (target - _filled_bytes(body)) // _filled_bytes(item))
        body[sample["repeat"]] = [json.loads(_filled(_encode(item).decode(), "", n, chance)) for n in range(times)]
    text = _filled(_encode(body).decode(), event_id, number, chance)
    headers = {"Content-Type": "application/json", **sample["headers"], sample["id_header"]: event_id}
    return Delivery(event_id, headers, text.encode())


def _filled(text: str, event_id: str, number: int, chance: random.Random) -> str:
    time = (_EPOCH + timedelta(seconds=number)).isoformat().replace("+00:00", "Z")
    filled = text.replace("%ID%", event_id).replace("%N%", str(number)).replace("%TIME%", time)
    while "%HEX%" in filled:
        filled = filled.replace("%HEX%", f"{chance.getrandbits(160):040x}", 1)
    return filled


def _filled_bytes(body: Any) -> int:
    text = _encode(body)
    return len(text) + 1 + text.count(b"%ID%") * 32 + text.count(b"%HEX%") * 35 + text.count(b"%TIME%") * 14


def _encode(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
