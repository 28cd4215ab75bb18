"""What an opener returns: something that is awaited once, or entered once with `async with`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class Closeable(Protocol):
    """Whatever ends with `await x.aclose()`."""

    async def aclose(self) -> None:
        """Release it; idempotent."""
        ...


T = TypeVar("T", bound=Closeable)


class Opening(Generic[T]):
    """`x = await opener(...)`, or `async with opener(...) as x:`. Nothing happens before either."""

    __slots__ = ("_begin", "_name", "_opened")

    def __init__(self, name: str, begin: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._name = name
        self._begin: Callable[[], Coroutine[Any, Any, T]] | None = begin
        self._opened: T | None = None

    def _once(self) -> Coroutine[Any, Any, T]:
        begin, self._begin = self._begin, None
        if begin is None:
            raise RuntimeError(f"{self._name}(...) was awaited or entered already: call it again for another one")
        return begin()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._once().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._once()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.aclose()

    def __enter__(self) -> T:
        raise TypeError(f"{self._name}(...) is entered with `async with`, not with `with`")

    def __exit__(self, *_: object) -> None:
        """Never reached."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"{self._name}(...) has to be awaited or entered first: x = await {self._name}(...)")

    def __del__(self) -> None:
        if self._begin is not None:
            warnings.warn(f"{self._name}(...) was never awaited or entered", RuntimeWarning, source=self, stacklevel=2)
