"""What are the bytes of the ring file? A header, two copies of the consumer's mark, and fixed slots.

Pure functions over buffers: nothing here waits, stores or syncs. All numbers are little-endian.

    page 0      header: magic, version, slot size, slot count, CRC32
    pages 1, 2  mark: serial, consumed sequence number, CRC32; written in turns, so that a torn one leaves the other
    page 4 ...  slots; the record with sequence number n lies in slot n % slot_count

A slot is whole pages, so a write that is cut short never has an acknowledged neighbour in its pages. A record is
believed only as a whole: its CRC32 covers the numbers, the id and the body. A torn record is refused. That loses
nothing that was promised, because an event is answered only after all of its record is durable; it also means
that the ring cannot tell a record torn by a crash (never answered) from one damaged later, so refused slots are
counted and reported, not hidden. A log with a durable mark can tell them apart; a simple ring cannot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_BYTES = 4096
VERSION = 1
ID_BYTES_MAX = 128

_HEADER = struct.Struct("<8sIII")
_HEADER_MAGIC = b"apm-ring"
_MARK = struct.Struct("<4s4xQQ")
_MARK_MAGIC = b"mark"
_MARK_OFFSETS = (PAGE_BYTES, 2 * PAGE_BYTES)
_RECORD = struct.Struct("<QQIH2x")
_RECORD_MAGIC = b"evt1"
_RECORD_PREFIX = struct.Struct("<4sI")
_CRC = struct.Struct("<I")
_SLOTS_OFFSET = 4 * PAGE_BYTES
RECORD_OVERHEAD_BYTES = _RECORD_PREFIX.size + _RECORD.size


class RingDamagedError(Exception):
    """The file is not a ring, or parts of it contradict each other: opening it would be a guess."""


class TornRecordError(Exception):
    """The slot holds something that is not a whole record."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a ring: fixed when the file is made, and checked against its header ever after."""

    slot_count: int = 4096
    slot_bytes: int = 3 * PAGE_BYTES

    def __post_init__(self) -> None:
        if self.slot_count < 1 or self.slot_count >= 1 << 32:
            raise ValueError(f"slot_count must be 1 to 2**32 - 1, not {self.slot_count}")
        if self.slot_bytes < PAGE_BYTES or self.slot_bytes % PAGE_BYTES or self.slot_bytes >= 1 << 32:
            raise ValueError(f"slot_bytes must be a multiple of {PAGE_BYTES} below 2**32, not {self.slot_bytes}")

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return _SLOTS_OFFSET + self.slot_count * self.slot_bytes

    @property
    def body_bytes_max(self) -> int:
        """The largest body that fits a slot whatever its id."""
        return self.slot_bytes - RECORD_OVERHEAD_BYTES - ID_BYTES_MAX

    def slot_offset(self, seq: int) -> int:
        """Where in the file the record with this sequence number lies."""
        return _SLOTS_OFFSET + (seq % self.slot_count) * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One event as it stands in its slot."""

    seq: int
    received_ns: int
    event_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the consumer has come: slots of records up to `consumed` may be used again."""

    serial: int
    consumed: int

    @property
    def offset(self) -> int:
        """The copy that this mark is written to; never the one that holds its predecessor."""
        return _MARK_OFFSETS[self.serial % len(_MARK_OFFSETS)]


def pack_header(geometry: Geometry) -> bytes:
    """The header of a new file."""
    head = _HEADER.pack(_HEADER_MAGIC, VERSION, geometry.slot_bytes, geometry.slot_count)
    return head + _CRC.pack(zlib.crc32(head))


def unpack_header(view: memoryview) -> Geometry | None:
    """The geometry that the file says it has; None where nothing was ever written."""
    head = bytes(view[: _HEADER.size + _CRC.size])
    if not any(head):
        return None
    fields, (crc,) = head[: _HEADER.size], _CRC.unpack(head[_HEADER.size :])
    magic, version, slot_bytes, slot_count = _HEADER.unpack(fields)
    if magic != _HEADER_MAGIC or zlib.crc32(fields) != crc:
        raise RingDamagedError("the header is damaged, or this is not a ring file")
    if version != VERSION:
        raise RingDamagedError(f"the file has format version {version}, this program knows {VERSION}")
    return Geometry(slot_count=slot_count, slot_bytes=slot_bytes)


def pack_mark(mark: Mark) -> bytes:
    """One copy of the consumer's mark."""
    fields = _MARK.pack(_MARK_MAGIC, mark.serial, mark.consumed)
    return fields + _CRC.pack(zlib.crc32(fields))


def unpack_mark(view: memoryview) -> Mark:
    """The newest whole copy of the mark; a torn one is passed over in favour of its predecessor."""
    newest: Mark | None = None
    torn = 0
    for offset in _MARK_OFFSETS:
        raw = bytes(view[offset : offset + _MARK.size + _CRC.size])
        if not any(raw):
            continue
        magic, serial, consumed = _MARK.unpack(raw[: _MARK.size])
        if magic != _MARK_MAGIC or zlib.crc32(raw[: _MARK.size]) != _CRC.unpack(raw[_MARK.size :])[0]:
            torn += 1
        elif newest is None or serial > newest.serial:
            newest = Mark(serial, consumed)
    if newest is None and torn == len(_MARK_OFFSETS):
        # One crash tears one copy. Two torn copies are damage, and to start from 0 would deliver consumed events again.
        raise RingDamagedError("both copies of the consumer's mark are damaged")
    return newest or Mark(serial=0, consumed=0)


def pack_record(record: Record, geometry: Geometry) -> bytes:
    """The record as it is stored; ValueError where it does not fit a slot."""
    event_id = record.event_id.encode()
    if len(event_id) > ID_BYTES_MAX:
        raise ValueError(f"the id has {len(event_id)} bytes, at most {ID_BYTES_MAX} are stored")
    if len(record.body) > geometry.body_bytes_max:
        raise ValueError(f"the body has {len(record.body)} bytes, at most {geometry.body_bytes_max} fit a slot")
    fields = _RECORD.pack(record.seq, record.received_ns, len(record.body), len(event_id))
    covered = b"".join((fields, event_id, record.body))
    return _RECORD_PREFIX.pack(_RECORD_MAGIC, zlib.crc32(covered)) + covered


def unpack_record(slot: memoryview) -> Record | None:
    """The record in a slot, None where the slot was never used; TornRecordError for anything but a whole record.

    Lengths come from the medium, so they are bounded by the slot before they are used.
    """
    head = bytes(slot[:RECORD_OVERHEAD_BYTES])
    if not any(head):
        return None
    magic, crc = _RECORD_PREFIX.unpack_from(head)
    seq, received_ns, body_bytes, id_bytes = _RECORD.unpack_from(head, _RECORD_PREFIX.size)
    end = RECORD_OVERHEAD_BYTES + id_bytes + body_bytes
    if magic != _RECORD_MAGIC or id_bytes > ID_BYTES_MAX or end > len(slot):
        raise TornRecordError("not the head of a record")
    covered = bytes(slot[_RECORD_PREFIX.size : end])
    if zlib.crc32(covered) != crc:
        raise TornRecordError(f"record {seq} is torn")
    body_start = _RECORD.size + id_bytes
    return Record(seq, received_ns, covered[_RECORD.size : body_start].decode(), covered[body_start:])


def scan(view: memoryview, geometry: Geometry, first: int, last: int) -> Iterator[Record | TornRecordError]:
    """What lies in the slots `first` to `last` - 1; slots that were never used are passed over."""
    for index in range(first, last):
        offset = geometry.slot_offset(index)
        try:
            record = unpack_record(view[offset : offset + geometry.slot_bytes])
        except TornRecordError as torn:
            yield torn
            continue
        if record is not None:
            if record.seq % geometry.slot_count != index or record.seq == 0:
                raise RingDamagedError(f"slot {index} holds record {record.seq}, which belongs elsewhere")
            yield record
