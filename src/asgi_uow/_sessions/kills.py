"""Stopping a statement on its server, from another connection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from anyio import current_effective_deadline

from asgi_uow._concurrency import run_to_completion
from asgi_uow._databases.known import driver_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy import Connection
    from sqlalchemy.engine import Engine


class Kills:
    """What stops the statements in flight on the connections of one session.

    MySQL goes on with a statement that was cancelled, locks and all, although the
    connection is gone. So does PostgreSQL if an anyio scope was cancelled: its drivers
    tell the server, but are cancelled at that too.
    """

    __slots__ = ("_found",)

    def __init__(self) -> None:
        """Know of none yet."""
        self._found: list[tuple[Connection, str]] = []

    def add(self, connection: Connection) -> None:
        """Remember how a statement on `connection` can be stopped."""
        kill = driver_of(connection.dialect).cancel_sql
        if kill is not None:
            statement = kill(connection.connection.driver_connection)
            self._found.append((connection, statement))

    def take(self) -> list[tuple[Engine, str]]:
        """Give, once, what stops statements on the connections that are held."""
        found, self._found = self._found, []
        # One that was given back may be running somebody else's statement.
        held = [each for each in found if not each[0].closed]
        return [(connection.engine, statement) for connection, statement in held]


async def stop(
    kills: list[tuple[Engine, str]],
    run_aside: Callable[[Engine, str], Coroutine[object, object, None]],
) -> None:
    """Stop those of which the driver does not tell the server; see `Kills`."""
    in_cancelled_scope = current_effective_deadline() == -math.inf
    for engine, statement in kills:
        if in_cancelled_scope or not driver_of(engine.dialect).cancels_on_server:
            await run_to_completion(run_aside(engine, statement))
