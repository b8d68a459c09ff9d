"""A database with readers, and the requests that it gets."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from asgi_uow import CausalReads, UnitOfWorkMiddleware, current_read_session
from tests.servers.process import free_port
from tests.support import shop
from tests.support.asgi import Handler, Response, endpoint, http_scope, request
from tests.support.databases import shop_database
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from asgi_uow import Database
    from asgi_uow.observers import Event
    from tests.servers import Backend


class Site:
    """A database with readers, and the requests that it gets."""

    def __init__(self, db: Database, causal_reads: CausalReads | None = None) -> None:
        self.db = db
        self.causal_reads = causal_reads
        self.events = Events()
        self.found: list[object] = []

    async def read(self) -> None:
        self.found.append(await current_read_session().scalar(shop.COUNT))

    async def get(self) -> Response:
        return await self.send(self.read)

    async def send(
        self, handler: Handler, status: int = 200, *, cookie: bytes = b""
    ) -> Response:
        """Have a handler answer a client that has a cookie."""
        app = UnitOfWorkMiddleware(
            endpoint(handler, status),
            self.db,
            observers=[self.events],
            causal_reads=self.causal_reads,
        )
        headers = [(b"cookie", cookie)] if cookie else []
        return await request(app, scope=http_scope(scheme="https", headers=headers))

    def told(self, kind: type[Event]) -> int:
        return len(self.events.of(kind))

    def used(self) -> list[bool]:
        """Has each reader connected ever?"""
        return [
            bool(reader.sync_engine.pool.checkedin())  # type: ignore[attr-defined]
            for reader in self.db.readers
        ]


def down(backend: Backend) -> str:
    """The URL of a server that is not there."""
    if backend.name == "sqlite":
        return "sqlite:////nowhere/at/all.db"
    return backend.through(free_port())


@asynccontextmanager
async def site_with(
    backend: Backend,
    *urls: str,
    causal_reads: CausalReads | None = None,
    **options: Any,
) -> AsyncGenerator[Site]:
    async with shop_database(backend, read_urls=urls, **options) as db:
        yield Site(db, causal_reads)


def prolong_pauses(db: Database) -> None:
    """Let none end during the test, however slow the machine is."""
    for replica in db.replicas:
        replica.open_until += 3600 * replica.failures
