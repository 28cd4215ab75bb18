"""How is long work cut into pieces? So that it can be watched and cancelled, and keeps nobody else waiting for long.

Each piece is a job of its own, asked for when the one before has ended: small work on the same file joins the round
in between. What a piece costs depends on how much of it is dirty or cached, which nobody knows before; so pieces grow
while they are quick and shrink when they are not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import perf_counter

PIECE = 8 << 20  # bytes; work that is not longer is not cut
PIECE_MAX = 1 << 30
_QUICK_S = 0.002  # a piece that took less is followed by one twice as long
_SLOW_S = 0.02  # one that took more by one half as long

Progress = Callable[[int, int], None]
"""Called on the loop after each piece, with the bytes done and all bytes. An exception ends the work there."""


async def in_pieces(
    offset: int,
    size: int,
    work: Callable[[int, int], Awaitable[None] | None],
    on_progress: Progress | None,
    *,
    grow: bool = True,
) -> None:
    """Do work(offset, size) piece by piece, in ascending order. grow: no, when its end is not the end of the work."""
    done, piece = 0, PIECE
    while done < size:
        length = min(piece, size - done)
        began = perf_counter()
        pending = work(offset + done, length)
        if pending is not None:
            await pending
        took = perf_counter() - began
        if grow and took < _QUICK_S:
            piece = min(piece * 2, PIECE_MAX)
        elif took > _SLOW_S:
            piece = max(piece // 2, PIECE)
        done += length
        if on_progress is not None:
            on_progress(done, size)
