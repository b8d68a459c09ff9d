"""Plain SQL with named parameters, and streams that share their session with others.

`Any` stands where SQLAlchemy's own signatures have it.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncResult, AsyncScalarResult, AsyncSession
from sqlalchemy.ext.asyncio.result import AsyncMappingResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from sqlalchemy import Executable
    from sqlalchemy.engine import Result, ScalarResult
    from sqlalchemy.engine.interfaces import _CoreAnyExecuteParams
    from sqlalchemy.sql.selectable import TypedReturnsRows
    from sqlalchemy.util.typing import TupleAny
    from typing_extensions import TypeVarTuple

    Ts = TypeVarTuple("Ts")
    Params: TypeAlias = _CoreAnyExecuteParams | None
    Call: TypeAlias = Callable[..., Coroutine[object, object, object]]
    Execute: TypeAlias = Callable[[], Coroutine[Any, Any, AsyncResult[*TupleAny]]]

T = TypeVar("T")
S = TypeVar("S", bound="Stream")

OPTIONS = frozenset({"execution_options", "bind_arguments"})
"""Named arguments that are no parameters: they go on to SQLAlchemy."""


def _coerce(
    statement: Executable | str, params: Params, named: dict[str, Any]
) -> dict[str, Any]:
    """Give statement, parameters and options as SQLAlchemy takes them."""
    options = {key: named.pop(key) for key in OPTIONS & named.keys()} if named else {}
    if named and params is not None:
        message = "Pass the parameters as a mapping or by name, not both."
        raise TypeError(message)
    sql = text(statement) if isinstance(statement, str) else statement
    return {"statement": sql, "params": named or params, **options}


class StatementSession(AsyncSession):
    """SQLAlchemy's `AsyncSession` that also takes strings."""

    open_stream: Callable[[Execute], Coroutine[Any, Any, AsyncResult[*TupleAny]]]
    """Gives what `stream()` returns; a subclass decides."""

    @overload
    async def execute(
        self, statement: TypedReturnsRows[*Ts], params: Params = None, **named: object
    ) -> Result[*Ts]: ...
    @overload
    async def execute(
        self, statement: Executable | str, params: Params = None, **named: object
    ) -> Result[*TupleAny]: ...
    async def execute(self, statement: Any, params: Any = None, **named: Any) -> Any:
        """Execute a statement, or plain SQL with named parameters."""
        return await super().execute(**_coerce(statement, params, named))

    @overload
    async def scalar(
        self, statement: TypedReturnsRows[T], params: Params = None, **named: object
    ) -> T | None: ...
    @overload
    async def scalar(
        self, statement: Executable | str, params: Params = None, **named: object
    ) -> Any: ...
    # SQLAlchemy has one overload more, for a bug of mypy.
    async def scalar(self, statement: Any, params: Any = None, **named: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the first column of the first row, or None."""
        return await super().scalar(**_coerce(statement, params, named))

    @overload
    async def scalars(
        self, statement: TypedReturnsRows[T], params: Params = None, **named: object
    ) -> ScalarResult[T]: ...
    @overload
    async def scalars(
        self, statement: Executable | str, params: Params = None, **named: object
    ) -> ScalarResult[Any]: ...
    async def scalars(self, statement: Any, params: Any = None, **named: Any) -> Any:
        """Give the first column of every row."""
        return await super().scalars(**_coerce(statement, params, named))

    @overload
    async def stream(
        self, statement: TypedReturnsRows[*Ts], params: Params = None, **named: object
    ) -> AsyncResult[*Ts]: ...
    @overload
    async def stream(
        self, statement: Executable | str, params: Params = None, **named: object
    ) -> AsyncResult[*TupleAny]: ...
    async def stream(self, statement: Any, params: Any = None, **named: Any) -> Any:
        """Execute and stream the rows through a server-side cursor."""
        coerced = _coerce(statement, params, named)
        return await self.open_stream(functools.partial(super().stream, **coerced))

    @overload
    async def stream_scalars(
        self, statement: TypedReturnsRows[T], params: Params = None, **named: object
    ) -> AsyncScalarResult[T]: ...
    @overload
    async def stream_scalars(
        self, statement: Executable | str, params: Params = None, **named: object
    ) -> AsyncScalarResult[Any]: ...
    async def stream_scalars(
        self, statement: Executable | str, params: Params = None, **named: Any
    ) -> AsyncScalarResult[Any]:
        """Stream the first column of every row."""
        return await super().stream_scalars(**_coerce(statement, params, named))


class Stream:
    """A mixin: every fetch waits for the call in flight on the session."""

    fetchmany: Any
    serialize: Call
    """Makes a fetch once no other call is in flight."""

    async def partitions(self, size: int | None = None) -> AsyncIterator[Sequence[Any]]:
        """Iterate through lists of `size` rows."""
        while rows := await self.fetchmany(size):
            yield rows


class StreamResult(Stream, AsyncResult[Any]):
    """What `Session.stream()` gives."""

    def scalars(self, index: Any = 0) -> StreamScalarResult:
        return adopt(StreamScalarResult, super().scalars(index), self.serialize)

    def mappings(self) -> StreamMappingResult:
        return adopt(StreamMappingResult, super().mappings(), self.serialize)


class StreamScalarResult(Stream, AsyncScalarResult[Any]):
    """What `Session.stream_scalars()` gives."""


class StreamMappingResult(Stream, AsyncMappingResult):
    """What `mappings()` of a stream gives."""


def adopt(cls: type[S], plain: object, serialize: Call) -> S:
    """Make a `cls` of SQLAlchemy's own result; constructors differ by version."""
    stream = cls.__new__(cls)
    for base in type(plain).__mro__:
        for name in getattr(base, "__slots__", ()):  # `__dict__` is one
            setattr(stream, name, getattr(plain, name))
    stream.serialize = serialize
    return stream


def _waits(fetch: Call) -> Call:
    @functools.wraps(fetch)
    async def call(self: Stream, *args: object) -> object:
        return await self.serialize(functools.partial(fetch, self, *args))

    return call


for _class in (StreamResult, StreamScalarResult, StreamMappingResult):
    for _name, _method in inspect.getmembers(_class, inspect.iscoroutinefunction):
        setattr(_class, _name, _waits(_method))
