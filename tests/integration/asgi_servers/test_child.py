"""A server that does not start, or a fact that does not hold, leaves no process."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING

import pytest

from tests.integration.asgi_servers.child import running
from tests.integration.asgi_servers.servers import SERVERS
from tests.servers import eventually
from tests.servers.process import is_free
from tests.support import shop

if TYPE_CHECKING:
    from tests.servers import SQLiteBackend

[HYPERCORN] = [server for server in SERVERS if server.name == "hypercorn"]


async def test_server_does_not_start(sqlite: SQLiteBackend) -> None:
    """What it has written is in the error."""

    def command(_: object) -> list[str]:
        return ["no_such_server"]

    missing = dataclasses.replace(HYPERCORN, command=command)
    with pytest.raises(AssertionError, match="No module named no_such_server"):
        async with running(missing, sqlite):
            raise NotImplementedError


async def test_fact_does_not_hold(sqlite: SQLiteBackend) -> None:
    """The server is killed at once."""
    await shop.create(sqlite)
    context = running(HYPERCORN, sqlite)
    child = await context.__aenter__()
    error = ZeroDivisionError()
    assert not await context.__aexit__(type(error), error, None)
    assert -signal.SIGKILL == child.process.returncode

    async def is_closed() -> bool:
        return is_free(child.port)

    await eventually(expected=True, probe=is_closed)
