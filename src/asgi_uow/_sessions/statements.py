"""Plain SQL with named parameters, wherever SQLAlchemy takes a statement.

`Any` stands where SQLAlchemy's own signatures have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import EMPTY_DICT

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.engine import Result, ScalarResult
    from sqlalchemy.engine.interfaces import _CoreAnyExecuteParams
    from sqlalchemy.ext.asyncio import AsyncResult, AsyncScalarResult
    from sqlalchemy.orm._typing import OrmExecuteOptionsParameter
    from sqlalchemy.orm.session import _BindArguments
    from sqlalchemy.sql.selectable import TypedReturnsRows
    from sqlalchemy.util.typing import TupleAny
    from typing_extensions import TypeVarTuple

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")


def _executable(statement: Executable | str) -> Executable:
    return text(statement) if isinstance(statement, str) else statement


def _parameters(
    params: _CoreAnyExecuteParams | None,
    named: dict[str, object],
) -> _CoreAnyExecuteParams | None:
    if not named:
        return params
    if params is not None:
        message = "Pass the parameters as a mapping or by name, not both."
        raise TypeError(message)
    return named


class TextSession(AsyncSession):
    """SQLAlchemy's `AsyncSession` that also takes strings."""

    async def before_stream(self) -> None:
        """Be told that `stream()` was called; for a subclass."""

    def watch(self, stream: AsyncResult[*TupleAny]) -> AsyncResult[*TupleAny]:
        """Give what `stream()` returns; a subclass decides."""
        raise NotImplementedError

    @overload
    async def execute(
        self,
        statement: TypedReturnsRows[*Ts],
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> Result[*Ts]: ...

    @overload
    async def execute(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> Result[*TupleAny]: ...

    async def execute(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> Result[*TupleAny]:
        """Execute a statement, or plain SQL with named parameters."""
        return await super().execute(
            _executable(statement),
            _parameters(params, named),
            execution_options=execution_options,
            bind_arguments=bind_arguments,
        )

    @overload
    async def scalar(
        self,
        statement: TypedReturnsRows[T],
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> T | None: ...

    @overload
    async def scalar(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> Any: ...

    # SQLAlchemy has one overload more, for a bug of mypy.
    async def scalar(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> Any:
        """Give the first column of the first row, or None."""
        return await super().scalar(
            _executable(statement),
            _parameters(params, named),
            execution_options=execution_options,
            bind_arguments=bind_arguments,
        )

    @overload
    async def scalars(
        self,
        statement: TypedReturnsRows[T],
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> ScalarResult[T]: ...

    @overload
    async def scalars(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> ScalarResult[Any]: ...

    async def scalars(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> ScalarResult[Any]:
        """Give the first column of every row."""
        return await super().scalars(
            _executable(statement),
            _parameters(params, named),
            execution_options=execution_options,
            bind_arguments=bind_arguments,
        )

    @overload
    async def stream(
        self,
        statement: TypedReturnsRows[*Ts],
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncResult[*Ts]: ...

    @overload
    async def stream(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncResult[*TupleAny]: ...

    async def stream(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncResult[*TupleAny]:
        """Execute and stream the rows through a server-side cursor."""
        await self.before_stream()
        stream = await super().stream(
            _executable(statement),
            _parameters(params, named),
            execution_options=execution_options,
            bind_arguments=bind_arguments,
        )
        return self.watch(stream)

    @overload
    async def stream_scalars(
        self,
        statement: TypedReturnsRows[T],
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncScalarResult[T]: ...

    @overload
    async def stream_scalars(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = ...,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncScalarResult[Any]: ...

    async def stream_scalars(
        self,
        statement: Executable | str,
        params: _CoreAnyExecuteParams | None = None,
        *,
        execution_options: OrmExecuteOptionsParameter = EMPTY_DICT,
        bind_arguments: _BindArguments | None = None,
        **named: object,
    ) -> AsyncScalarResult[Any]:
        """Stream the first column of every row."""
        return await super().stream_scalars(
            _executable(statement),
            _parameters(params, named),
            execution_options=execution_options,
            bind_arguments=bind_arguments,
        )
