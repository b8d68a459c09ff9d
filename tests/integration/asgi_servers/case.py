"""What the facts about servers have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeAlias

from tests.integration.asgi_servers.child import Child, running
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.integration.asgi_servers.servers import ASGIServer
    from tests.servers import SQLiteBackend

    Check: TypeAlias = Callable[[Child], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class ServerFact:
    """What has to be so; `ends_server`: it needs a server of its own."""

    check: Check
    ends_server: bool

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def sentence(self) -> str:
        assert self.check.__doc__ is not None
        return self.check.__doc__

    async def hold(self, server: ASGIServer, backend: SQLiteBackend) -> None:
        """Raise unless it is so."""
        await shop.create(backend)
        async with running(server, backend) as child:
            await self.check(child)


FACTS: list[ServerFact] = []


def fact(check: Check) -> Check:
    """State a fact about a server that goes on."""
    FACTS.append(ServerFact(check, ends_server=False))
    return check


def ending_fact(check: Check) -> Check:
    """State a fact about how a server ends."""
    FACTS.append(ServerFact(check, ends_server=True))
    return check
