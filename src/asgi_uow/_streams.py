"""Streaming results that take turns with everything else on their session."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncResult, AsyncScalarResult
from sqlalchemy.ext.asyncio.result import AsyncMappingResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from ._turn import Turn


S = TypeVar("S", bound="Stream")


class Stream:
    """A mixin: every fetch waits for the call in flight on the session."""

    _real_result: Any
    fetchmany: Any
    turn: Callable[[], Turn]

    @property
    def is_open(self) -> bool:
        """Whether rows may still be on their way; one read to its end is closed."""
        closed: bool = self._real_result._soft_closed  # noqa: SLF001  # no other way
        return not closed

    async def partitions(self, size: int | None = None) -> AsyncIterator[Sequence[Any]]:
        """Iterate through lists of `size` rows."""
        while rows := await self.fetchmany(size):
            yield rows


class StreamResult(Stream, AsyncResult[Any]):
    """What `Session.stream()` gives."""

    def scalars(self, index: Any = 0) -> StreamScalarResult:
        """Stream one column of every row."""
        return _adopt(StreamScalarResult, super().scalars(index), self.turn)

    def mappings(self) -> StreamMappingResult:
        """Stream the rows as mappings."""
        return _adopt(StreamMappingResult, super().mappings(), self.turn)


class StreamScalarResult(Stream, AsyncScalarResult[Any]):
    """What `Session.stream_scalars()` gives."""


class StreamMappingResult(Stream, AsyncMappingResult):
    """What `mappings()` of a stream gives."""


def take_turns(result: AsyncResult[Any], turn: Callable[[], Turn]) -> StreamResult:
    """Give a stream like `result` that takes turns."""
    return _adopt(StreamResult, result, turn)


def _adopt(cls: type[S], plain: object, turn: Callable[[], Turn]) -> S:
    """Make a `cls` of SQLAlchemy's own result; constructors differ by version."""
    stream = cls.__new__(cls)
    for base in type(plain).__mro__:
        for name in getattr(base, "__slots__", ()):
            setattr(stream, name, getattr(plain, name))
    stream.__dict__.update(getattr(plain, "__dict__", {}))
    stream.turn = turn
    return stream


def _takes_turn(
    fetch: Callable[..., Coroutine[object, object, object]],
) -> Callable[..., Coroutine[object, object, object]]:
    @functools.wraps(fetch)
    async def call(self: Stream, *args: object) -> object:
        async with self.turn():
            return await fetch(self, *args)

    return call


for _class in (StreamResult, StreamScalarResult, StreamMappingResult):
    for _name in (
        "__anext__",
        "all",
        "close",
        "fetchall",
        "fetchmany",
        "fetchone",
        "first",
        "freeze",
        "one",
        "one_or_none",
        "scalar",
        "scalar_one",
        "scalar_one_or_none",
    ):
        if hasattr(_class, _name):
            setattr(_class, _name, _takes_turn(getattr(_class, _name)))
