"""Several addresses of one writer: all connections go to one that takes writes."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only, greenlet_spawn

from asgi_uow._concurrency import bounded
from asgi_uow._databases.driver_errors import means
from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa
    from sqlalchemy.engine.interfaces import ExceptionContext

    from asgi_uow._databases.known import Database

NODE = "asgi_uow.node"
NODES = "asgi_uow.nodes"
ASK_SECONDS = 3.0


class Nodes:
    """The addresses, and the one in use: by all, so that nobody reads an older state.

    One that fails is left alone until all others have failed too; it is used again
    only if it takes writes then.
    """

    def __init__(self, engines: Sequence[sa.Engine], facts: Database | None) -> None:
        if facts is None or facts.SINGLE_WRITER or len({*map(_kind, engines)}) > 1:
            message = "Several URLs have to name servers of one database, with one "
            message += "driver: those of a cluster, or of a primary and its standbys."
            raise ConfigurationError(message)
        self.url = engines[0].url
        self._facts = facts
        self._places = [each.dialect.create_connect_args(each.url) for each in engines]
        self._used = 0

    def connect(self, create: Callable[[Any], Any], entry: Any) -> Any:
        """Connect to the address in use, or to the next one that takes writes."""
        error: Exception = ConnectionError("none of the addresses takes writes")
        for _ in self._places:
            node = entry.info[NODE] = self._used
            try:
                dbapi = create(entry)
                asking = greenlet_spawn(self._takes_writes, dbapi)
                if await_only(bounded(asking, ASK_SECONDS)):
                    return dbapi
            except Exception as failed:  # noqa: BLE001  # raised if all others fail
                error = failed
            self.leave(node)
        raise error

    def direct(self, entry: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        """Have a driver connect to the address that was chosen."""
        arguments[:], place = self._places[entry.info[NODE]]
        options.update(place)

    def is_left(self, info: dict[Any, Any]) -> bool:
        """Tell whether another address is used now than that of a connection."""
        return bool(info.get(NODE, self._used) != self._used)

    def leave(self, node: int) -> None:
        if node == self._used:
            self._used = (node + 1) % len(self._places)

    def _takes_writes(self, dbapi: Any) -> bool:
        try:
            with closing(dbapi.cursor()) as cursor:
                cursor.execute(self._facts.IS_READ_ONLY)
                [refuses] = cursor.fetchone()
            dbapi.rollback()
        except BaseException:
            dbapi.close()
            raise
        if refuses:
            dbapi.close()
        return not refuses


def hear(nodes: Nodes | None, context: ExceptionContext) -> None:
    """Leave an address that answers, but that it takes no writes (any more)."""
    connection, error = context.connection, context.original_exception
    if nodes is None or connection is None or connection.invalidated:
        return
    refuses = means(error, "unavailable") and not context.is_disconnect
    if NODE in connection.info and (refuses or means(error, "demoted")):
        context.is_disconnect = True
        nodes.leave(connection.info[NODE])


def _kind(engine: sa.Engine) -> tuple[str, str]:
    return engine.dialect.name, engine.dialect.driver
