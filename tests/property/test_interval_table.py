"""`IntervalTable` against a model that knows nothing but bytes: the set of those that are taken, and by whom."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from apmem2.core.registry import Interval, IntervalTable

TOP = 1 << 64
BASES = st.sampled_from([0, 1, 4096, (1 << 47) - 64, TOP - 256])
PLACES = st.integers(0, 120)
LENGTHS = st.integers(1, 24)


class Somebody:
    """Whoever an interval belongs to."""


SOMEBODY = Somebody()


def interval(address: int, length: int) -> Interval[Somebody]:
    return Interval(address, length, weakref.ref(SOMEBODY))


class AgainstBytes(RuleBasedStateMachine):
    """Whatever is added and taken out, the table and the bytes agree."""

    entries = Bundle("entries")

    @initialize(base=BASES)
    def begin(self, base: int) -> None:
        self.base = base
        self.table: IntervalTable[Somebody] = IntervalTable()
        self.taken: dict[int, Interval[Somebody]] = {}

    def model_lowest(self, address: int, length: int) -> Interval[Somebody] | None:
        hits = [self.taken[byte] for byte in range(address, address + length) if byte in self.taken]
        return min(hits, key=lambda hit: hit.address, default=None)

    @rule(target=entries, place=PLACES, length=LENGTHS)
    def add(self, place: int, length: int) -> object:
        wanted = interval(self.base + place, length)
        if self.model_lowest(wanted.address, length) is not None:
            with pytest.raises(AssertionError):
                self.table.add(wanted)
            return multiple()
        self.table.add(wanted)
        self.taken.update(dict.fromkeys(range(wanted.address, wanted.end), wanted))
        return wanted

    @rule(target=entries, behind=entries, length=LENGTHS)
    def add_touching(self, behind: Interval[Somebody], length: int) -> object:
        return self.add(behind.end - self.base, length)

    @rule(entry=consumes(entries))
    def remove(self, entry: Interval[Somebody]) -> None:
        there = self.taken.get(entry.address) is entry
        assert self.table.remove(entry) is there
        assert self.table.remove(entry) is False
        if there:
            for byte in range(entry.address, entry.end):
                del self.taken[byte]

    @rule(entry=entries)
    def an_equal_one_is_not_the_very_one(self, entry: Interval[Somebody]) -> None:
        assert self.table.remove(replace(entry)) is False

    @rule(place=PLACES, length=st.integers(-3, 130))
    def look(self, place: int, length: int) -> None:
        address = self.base + place
        assert self.table.lowest_overlapping(address, length) is self.model_lowest(address, length)

    @invariant()
    def the_same_entries_in_order(self) -> None:
        if hasattr(self, "table"):
            expected = sorted({entry.address: entry for entry in self.taken.values()}.items())
            assert list(self.table) == [entry for _, entry in expected]
            assert len(self.table) == len(expected)


AgainstBytes.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstBytes = AgainstBytes.TestCase


@given(place=PLACES, length=LENGTHS, other_place=PLACES, other_length=LENGTHS)
@settings(deadline=None)
def test_two_intervals_conflict_exactly_when_they_share_a_byte(
    place: int, length: int, other_place: int, other_length: int
) -> None:
    table: IntervalTable[Somebody] = IntervalTable()
    table.add(interval(place, length))
    shared = set(range(place, place + length)) & set(range(other_place, other_place + other_length))
    assert (table.lowest_overlapping(other_place, other_length) is not None) is bool(shared)


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_interval_is_refused(length: int) -> None:
    with pytest.raises(AssertionError):
        IntervalTable[Somebody]().add(interval(1, length))


def test_the_table_may_change_while_it_is_iterated() -> None:
    table: IntervalTable[Somebody] = IntervalTable()
    for place in range(0, 100, 10):
        table.add(interval(place, 5))
    for entry in table:
        assert table.remove(entry)
    assert len(table) == 0
