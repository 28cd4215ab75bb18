"""Which ranges of this process's memory are maps? An interval table, and the async lock around its check.

The table is pure and synchronous; intervals are half-open and by byte: touching is allowed, everything else is a
conflict (libpmem2's rule). The lock is one for all loops and threads: asyncio's belong to one loop. It is fair; nobody
blocks a thread in it; its waiters are woken in their own loop, and a cancelled waiter passes its turn on.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedDict

from apmem2.core.runtime import Waiter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Interval(Generic[T]):
    """[address, address + length) and who it belongs to."""

    address: int
    length: int
    owner: weakref.ref[Any]

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.address + self.length


class IntervalTable(Generic[T]):
    """Disjoint half-open intervals. Every operation takes O(log n). No locks, no I/O."""

    def __init__(self) -> None:
        self._by_address: SortedDict[int, Interval[T]] = SortedDict()

    def __len__(self) -> int:
        return len(self._by_address)

    def lowest_overlapping(self, address: int, length: int) -> Interval[T] | None:
        """The overlapping interval with the lowest address, or None. An empty range overlaps nothing."""
        if length <= 0:
            return None
        table = self._by_address
        after = table.bisect_right(address)
        if after:
            before: Interval[T] = table.peekitem(after - 1)[1]
            if before.end > address:
                return before
        if after < len(table):
            following: Interval[T] = table.peekitem(after)[1]
            if following.address < address + length:
                return following
        return None

    def add(self, interval: Interval[T]) -> None:
        """Put it in. The caller has seen that nothing overlaps it; a bug in that must not pass."""
        if interval.length <= 0 or self.lowest_overlapping(interval.address, interval.length) is not None:
            raise AssertionError("an interval that overlaps another, or is empty")
        self._by_address[interval.address] = interval

    def remove(self, interval: Interval[T]) -> bool:
        """Take that very interval out; False when it is not there (any more)."""
        if self._by_address.get(interval.address) is not interval:
            return False
        del self._by_address[interval.address]
        return True

    def __iter__(self) -> Any:
        return iter(list(self._by_address.values()))


class FairLock:
    """A lock for coroutines of any loop in any thread, first come first served. `async with lock:`."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards the two below; held for moments, never across an await
        self._held = False
        self._queue: deque[Waiter] = deque()
        # Who was closed instead of cancelled (None: the holder). A collection closes coroutines at any moment, also
        # while this very thread has the mutex: that only leaves a note here, read as soon as the mutex is free.
        self._collected: deque[Waiter | None] = deque()

    async def __aenter__(self) -> None:
        waiter: Waiter | None = None
        with self._mutex:
            if self._held:
                waiter = Waiter()
                self._queue.append(waiter)
            self._held = True
        self._read_notes()
        if waiter is None:
            return
        try:
            await waiter.wait()
        except GeneratorExit:
            self._collected.append(waiter)
            self._read_notes()
            raise
        except BaseException:
            self._give_up(waiter)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:
            self._collected.append(None)
            self._read_notes()
        else:
            self._pass_on()

    def _read_notes(self) -> None:
        while self._collected and self._mutex.acquire(blocking=False):
            self._mutex.release()  # free, so this thread is not in the middle of anything
            try:
                waiter = self._collected.popleft()
            except IndexError:
                return
            if waiter is None:
                self._pass_on()
            else:
                self._give_up(waiter)

    def _give_up(self, waiter: Waiter) -> None:
        """It will not come: out of the queue, or, when it has been given its turn already, that goes on."""
        with self._mutex:
            granted = waiter not in self._queue
            if not granted:
                self._queue.remove(waiter)
        if granted:
            self._pass_on()
        self._read_notes()

    def _pass_on(self) -> None:
        """The turn goes to whoever waits longest and is still there; it stays held all the while."""
        waiter: Waiter | None = None
        while waiter is None or not waiter.wake():
            with self._mutex:
                if not self._queue:
                    self._held = False
                    break
                waiter = self._queue.popleft()
        self._read_notes()


class Registry(Generic[T]):
    """The maps of this process. `lock` is held around a check that has to wait; every method is a plain call."""

    def __init__(self) -> None:
        self.lock = FairLock()
        self._mutex = threading.Lock()  # guards the table; held for moments
        self._table: IntervalTable[T] = IntervalTable()
        # Entries whose map was collected: a collection can come at any moment, also in the middle of a table operation
        # on the same thread, so it only leaves a note here.
        self._gone: deque[Interval[T]] = deque()

    def _clean(self) -> None:  # mutex held
        while self._gone:
            self._table.remove(self._gone.popleft())

    def overlapping(self, address: int, length: int) -> Interval[T] | None:
        """The lowest entry that overlaps the range."""
        with self._mutex:
            self._clean()
            return self._table.lowest_overlapping(address, length)

    def add(self, owner: T, address: int, length: int) -> Interval[T] | None:
        """Register the range unless something overlaps it: the new entry, or None."""
        with self._mutex:
            self._clean()
            if self._table.lowest_overlapping(address, length) is not None:
                return None
            interval: Interval[T] = Interval(address, length, weakref.ref(owner))
            self._table.add(interval)
            return interval

    def remove(self, interval: Interval[T]) -> bool:
        """Take an entry out; False when it is gone already."""
        with self._mutex:
            self._clean()
            return self._table.remove(interval)

    def forget(self, interval: Interval[T]) -> None:
        """The owner is being collected. Safe at any moment."""
        self._gone.append(interval)

    def find(self, address: int, length: int) -> T | None:
        """The lowest owner whose range overlaps."""
        while True:
            interval = self.overlapping(address, length)
            if interval is None:
                return None
            owner: T | None = interval.owner()
            if owner is not None:
                return owner
            self.remove(interval)

    def owners(self) -> list[T]:
        """All owners by address."""
        with self._mutex:
            self._clean()
            found = [interval.owner() for interval in self._table]
        return [owner for owner in found if owner is not None]
