"""Several addresses of one writer: all connections go to one that takes writes."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only, greenlet_spawn

from asgi_uow._concurrency import bounded
from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from asgi_uow._databases.known import Database

NODE = "asgi_uow.node"
ASK_SECONDS = 3.0
LONG_SECONDS = 1.0  # for connecting; who gives up then leaves the address to nobody
NO = {"0", "FALSE", "OFF"}  # as servers answer


class Nodes:
    """The addresses, and the one in use: by all, so that nobody reads an older state.

    Another one is used once the server there takes connections and writes, while the
    one in use does not. Nobody goes back without such a reason.
    """

    def __init__(self, engines: Sequence[sa.Engine], facts: Database | None) -> None:
        kinds = {(e.dialect.name, e.dialect.driver, e.url.database) for e in engines}
        if facts is None or facts.SINGLE_WRITER or len(kinds) > 1:
            message = "Several URLs have to name servers of one database, with one "
            message += "driver: those of a cluster, or of a primary and its standbys."
            raise ConfigurationError(message)
        self._facts = facts
        self._places = [each.dialect.create_connect_args(each.url) for each in engines]
        self._used = self.doubts = 0

    def connect(self, create: Callable[[Any], Any], entry: Any) -> Any:
        """Connect to the address in use, or to the next one that takes writes."""
        error: Exception = ConnectionError("none of the addresses takes writes")
        first, count = self._used, len(self._places)
        for node in [(first + each) % count for each in range(count)]:
            entry.info[NODE], began = (node, self.doubts), time.monotonic()
            try:
                dbapi = create(entry)
                self._check(dbapi)
            except Exception as failed:  # noqa: BLE001  # raised if all others fail
                error = failed if node == first else error
            except BaseException:
                # A server that is gone does not answer; the next one may.
                if time.monotonic() - began > LONG_SECONDS and node == self._used:
                    self._used = (node + 1) % count
                raise
            else:
                self._used = node
                return dbapi
        raise error

    def direct(self, entry: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        """Have a driver connect to the address that was chosen."""
        first = self._places[0][1]
        own = {k: v for k, v in options.items() if k not in first or first[k] != v}
        arguments[:], place = self._places[entry.info[NODE][0]]
        options.clear()
        options.update({**place, **own})

    def is_left(self, info: dict[Any, Any]) -> bool:
        """Tell whether a connection is of another address, or of before a doubt."""
        now = self._used, self.doubts
        return bool(info.get(NODE, now) != now)

    def _check(self, dbapi: Any) -> None:
        try:
            asking = greenlet_spawn(self._takes_writes, dbapi)
            takes_writes = await_only(bounded(asking, ASK_SECONDS))
        except BaseException:
            dbapi.terminate() if hasattr(dbapi, "terminate") else dbapi.close()
            raise
        if not takes_writes:
            dbapi.close()
            message = "none of the addresses takes writes"
            raise ConnectionError(message)

    def _takes_writes(self, dbapi: Any) -> bool:
        with closing(dbapi.cursor()) as cursor:
            cursor.execute(self._facts.IS_READ_ONLY)
            [refuses] = cursor.fetchone()
        dbapi.rollback()
        return str(refuses).upper() in NO
