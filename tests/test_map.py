"""`Map`: what it is, and what it refuses before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

import apmem2


@pytest.mark.asyncio
async def test_a_stored_and_persisted_byte_is_in_the_file(directory: Path) -> None:
    async with apmem2.open(directory / "a", size=5000) as m:
        assert len(m) == 5000
        m[4999] = 7
        await m.persist(4999, 1)
        assert (directory / "a").read_bytes()[4999] == 7
