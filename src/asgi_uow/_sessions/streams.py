"""Streaming results that take turns with everything else on their session."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncResult, AsyncScalarResult
from sqlalchemy.ext.asyncio.result import AsyncMappingResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

S = TypeVar("S", bound="Stream")

Fetch: TypeAlias = "Callable[[], Coroutine[object, object, object]]"
InTurn: TypeAlias = "Callable[[Fetch], Coroutine[object, object, object]]"
"""Makes a fetch once it is its turn."""


class Stream:
    """A mixin: every fetch waits for the call in flight on the session."""

    _real_result: Any
    fetchmany: Any
    in_turn: InTurn

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
        return _adopt(StreamScalarResult, super().scalars(index), self.in_turn)

    def mappings(self) -> StreamMappingResult:
        """Stream the rows as mappings."""
        return _adopt(StreamMappingResult, super().mappings(), self.in_turn)


class StreamScalarResult(Stream, AsyncScalarResult[Any]):
    """What `Session.stream_scalars()` gives."""


class StreamMappingResult(Stream, AsyncMappingResult):
    """What `mappings()` of a stream gives."""


def take_turns(result: AsyncResult[Any], in_turn: InTurn) -> StreamResult:
    """Give a stream like `result` that takes turns."""
    return _adopt(StreamResult, result, in_turn)


def _adopt(cls: type[S], plain: object, in_turn: InTurn) -> S:
    """Make a `cls` of SQLAlchemy's own result; constructors differ by version."""
    stream = cls.__new__(cls)
    for base in type(plain).__mro__:
        for name in getattr(base, "__slots__", ()):
            setattr(stream, name, getattr(plain, name))
    stream.__dict__.update(getattr(plain, "__dict__", {}))
    stream.in_turn = in_turn
    return stream


def _takes_turn(
    fetch: Callable[..., Coroutine[object, object, object]],
) -> Callable[..., Coroutine[object, object, object]]:
    @functools.wraps(fetch)
    async def call(self: Stream, *args: object) -> object:
        return await self.in_turn(functools.partial(fetch, self, *args))

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
