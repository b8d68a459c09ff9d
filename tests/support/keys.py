"""Requests with an idempotency key, and the table that the keys are in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import asgi_uow as uow
from asgi_uow import Database, Idempotency, UnitOfWorkMiddleware, idempotency_table
from tests.support import shop
from tests.support.asgi import Client, Response, respond
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from tests.servers import Backend

KEYS = "SELECT count(*) FROM idempotency_keys"


async def create_table(backend: Backend, name: str = "idempotency_keys") -> None:
    """Make the table as a user does, with `create_all`."""
    metadata = sa.MetaData()
    idempotency_table(metadata, name)
    engine = create_async_engine(backend.url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


class Shop:
    """An application that inserts an item for each request it sees, and counts them."""

    def __init__(
        self,
        db: Database,
        *others: Database,
        app: Callable[[Shop], ASGIApp] | None = None,
        idempotency: Idempotency | None = None,
        **options: Any,
    ) -> None:
        self.runs = 0
        self.units: list[uow.UnitOfWork] = []
        self.hooks: list[str] = []
        self.events = Events()
        self.before: Callable[[], Awaitable[object]] | None = None
        self.status = 201
        self.app = UnitOfWorkMiddleware(
            self.serve if app is None else app(self),
            db,
            *others,
            idempotency=idempotency or Idempotency(),
            observers=[self.events.append],
            **options,
        )

    async def work(self) -> None:
        """Insert an item; the hooks tell what became of it."""
        self.runs += 1
        self.units.append(uow.current_unit_of_work())
        uow.after_commit(self.hooks.append, "commit")
        uow.after_rollback(self.hooks.append, "rollback")
        await shop.insert(self.runs)
        if self.before is not None:
            await self.before()

    async def serve(self, _: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await self.work()
        await respond(send, self.status, b"item %d" % self.runs)

    async def post(
        self, key: bytes | None = b"key", *more: tuple[bytes, bytes], **request: Any
    ) -> Response:
        """Send a request with a key, or with none."""
        keys = [] if key is None else [(b"idempotency-key", key)]
        request = {"method": "POST", "headers": [*keys, *more], **request}
        return await Client(self.app).request(**request)


def is_replayed(response: Response) -> bool:
    return response.headers.get("idempotency-replayed") == "true"
