"""apmem2: an asyncio program keeps state in mapped memory, and knows when that state is safe.

`await m.persist(...)` returns when the bytes would survive a power cut, and the event loop never stops for it.
Importing starts no thread and opens no descriptor.
"""

from apmem2.core.config import Settings, configure
from apmem2.core.errors import (
    AccessError,
    ClosedError,
    CorruptionError,
    DirectoryError,
    DurabilityWarning,
    ErrorCode,
    FileAccessError,
    ForkedError,
    FormatVersionError,
    GranularityNotSupportedError,
    InvalidSourceError,
    LockedError,
    LogBusyError,
    LogFullError,
    MapFailedError,
    MappingExistsError,
    MissingFileError,
    NotMappedError,
    OpenError,
    OtherFileError,
    OutOfMemoryError,
    OutOfRangeError,
    ParentError,
    PersistError,
    PmemError,
    PoolError,
    PrivateMemoryError,
    ReplicationError,
    SizeMismatchError,
    TrimmedError,
)
from apmem2.core.granularity import Durability, Granularity, MemFlags, Protection, Sharing
from apmem2.core.making import map_from_existing, map_new, open
from apmem2.core.mapping import Map, find, mappings
from apmem2.core.source import Source
from apmem2.core.statistics import JobStatistics, Statistics, statistics

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "ClosedError",
    "CorruptionError",
    "DirectoryError",
    "Durability",
    "DurabilityWarning",
    "ErrorCode",
    "FileAccessError",
    "ForkedError",
    "FormatVersionError",
    "Granularity",
    "GranularityNotSupportedError",
    "InvalidSourceError",
    "JobStatistics",
    "LockedError",
    "LogBusyError",
    "LogFullError",
    "Map",
    "MapFailedError",
    "MappingExistsError",
    "MemFlags",
    "MissingFileError",
    "NotMappedError",
    "OpenError",
    "OtherFileError",
    "OutOfMemoryError",
    "OutOfRangeError",
    "ParentError",
    "PersistError",
    "PmemError",
    "PoolError",
    "PrivateMemoryError",
    "Protection",
    "ReplicationError",
    "Settings",
    "Sharing",
    "SizeMismatchError",
    "Source",
    "Statistics",
    "TrimmedError",
    "configure",
    "find",
    "map_from_existing",
    "map_new",
    "mappings",
    "open",
    "statistics",
]
