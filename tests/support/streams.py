"""Enough rows to stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.databases import shop_database

if TYPE_CHECKING:
    from tests.servers import Backend

ROWS = 300
SELECT = "SELECT id FROM items ORDER BY id"


async def fill(backend: Backend) -> None:
    async with shop_database(backend) as db, db:
        numbers = [{"id": number} for number in range(ROWS)]
        await db.write.execute("INSERT INTO items (id) VALUES (:id)", numbers)
