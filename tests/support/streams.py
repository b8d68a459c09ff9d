"""Clients of streamed responses, and enough rows to stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_uow import Database
from tests.support import shop
from tests.support.asgi import START, http_scope

if TYPE_CHECKING:
    from asgi_uow._asgi import ASGIApp, Message
    from tests.servers import Backend

ROWS = 300
SELECT = "SELECT id FROM items ORDER BY id"


async def fill(backend: Backend) -> None:
    await shop.create(backend)
    db = Database.from_url(backend.url)
    async with db:
        numbers = [{"id": number} for number in range(ROWS)]
        await db.write.execute("INSERT INTO items (id) VALUES (:id)", numbers)
    await db.dispose()


def checked_out(db: Database) -> list[int]:
    pools = [engine.sync_engine.pool for engine in (db.engine, *db.readers)]
    return [pool.checkedout() for pool in pools]  # type: ignore[attr-defined]


class Client:
    """Takes what is sent to it, the first piece and then the others."""

    def __init__(self, method: str = "GET", path: str = "/") -> None:
        self.scope = http_scope(method=method, path=path)
        self.start: Message = {}
        self.pieces = 0

    async def call(self, app: ASGIApp) -> int:
        await app(self.scope, self.receive, self.send)
        return int(self.start["status"])

    async def receive(self) -> Message:
        raise NotImplementedError  # a server of spec 2.4 is not asked

    async def send(self, message: Message) -> None:
        if message["type"] == START:
            self.start = message
        elif message.get("more_body"):
            self.pieces += 1
            await self.take(self.pieces)

    async def take(self, number: int, /) -> None:
        """Be given a piece of the body; as quick as can be."""
