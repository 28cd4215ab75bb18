"""The words of the model: how fine a range can be made durable, and how a file is mapped. Numbers are libpmem2's."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Granularity(IntEnum):
    """The unit in which stores become durable, finest first."""

    BYTE = 0
    """A store that is visible is durable: the caches are inside the power-fail domain (eADR), or nothing is."""
    CACHE_LINE = 1
    """Cache-line flushes and a fence, without the kernel: persistent memory mapped with MAP_SYNC."""
    PAGE = 2
    """msync or a synchronous write, in whole pages: everything else."""


class Sharing(IntEnum):
    """Who sees the stores: the file and all who map it, or nobody else."""

    SHARED = 0
    PRIVATE = 1


class Protection(IntFlag):
    """What may be done with the memory of a map."""

    NONE = 0
    EXEC = 1 << 29
    READ = 1 << 30
    WRITE = 1 << 31


class MemFlags(IntFlag):
    """How `memcpy`, `memmove` and `memset` go about it. 0: durable on return.

    NODRAIN: visible and accepted on return, durable after the next `drain`. NOFLUSH: only visible; a later `persist` of
    the range makes it durable; wins over the others. The rest are hints for persistent memory and change nothing else:
    NONTEMPORAL and WC stream past the cache, TEMPORAL and WB go through it.
    """

    NODRAIN = 1 << 0
    NONTEMPORAL = 1 << 1
    TEMPORAL = 1 << 2
    WC = 1 << 3
    WB = 1 << 4
    NOFLUSH = 1 << 5


class Durability(IntEnum):
    """What a completed persist of a map means."""

    NONE = 0
    """Lost at a power cut: tmpfs, private and anonymous memory, hugetlbfs, an overlay mounted volatile."""
    UNKNOWN = 1
    """Cannot be seen from here: network and FUSE file systems, barriers off, a forced granularity."""
    POWER_LOSS = 2
    """Survives a power cut, on a device that honours a flush."""
