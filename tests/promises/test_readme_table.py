"""The table "what happens" of the README: one test per row, and it says what for."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest
from httpx import ASGITransport, AsyncClient
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

import asgi_uow as uow
from asgi_uow import Database
from tests.support import ROOT

if TYPE_CHECKING:
    from starlette.requests import Request

    from tests.servers import SQLiteBackend

README = ROOT / "README.md"
HEAD = ["The request ends with", "The work is", "The client gets", "Hooks that run"]

PARENTS = "CREATE TABLE parents (id INTEGER PRIMARY KEY)"
ROWS = (
    "CREATE TABLE rows (parent_id INTEGER"
    " REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)"
)
CASES = {
    "a 2xx or 3xx response": ["200", "204", "303", "304"],
    "a 4xx or 5xx response": ["400", "404", "500", "503"],
    "an exception": ["exception"],
    "a COMMIT that fails": ["orphan"],
    "a disconnect that cancels the handler": ["disconnect"],
}


def table() -> list[list[str]]:
    """Read the rows of the README's only table, its head included."""
    lines = README.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


class Shop:
    """A Starlette application that ends a request in every way of the table."""

    def __init__(self, db: Database) -> None:
        self.hooks: list[str] = []
        self.inserted = asyncio.Event()
        self.app = Starlette(routes=[Route("/{ending}", self.endpoint)])
        self.app.add_middleware(uow.UnitOfWorkMiddleware, db)

    async def endpoint(self, request: Request) -> Response:
        for register in (uow.after_commit, uow.after_response, uow.after_rollback):
            register(self.hooks.append, register.__name__)
        ending: str = request.path_params["ending"]
        # Only COMMIT looks at the deferred foreign key: the INSERT succeeds.
        parent_id = 99 if ending == "orphan" else None
        await uow.current_session().execute(
            "INSERT INTO rows VALUES (:id)", id=parent_id
        )
        self.inserted.set()
        if ending == "exception":
            raise LookupError(ending)
        if ending == "disconnect":
            await asyncio.Event().wait()
        return Response(status_code=int(ending) if ending.isdigit() else 200)

    async def get(self, ending: str) -> str:
        """Send a request; tell the status, or "nothing" if none came."""
        transport = ASGITransport(self.app, raise_app_exceptions=False)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            request = asyncio.create_task(client.get(f"/{ending}"))
            await self.inserted.wait()
            if ending == "disconnect":
                request.cancel()  # as servers do whose client went away
            [response] = await asyncio.gather(request, return_exceptions=True)
        if isinstance(response, BaseException):
            assert isinstance(response, asyncio.CancelledError)
            return "nothing"
        return str(response.status_code)


def test_the_rows_of_the_table_are_the_ones_tested() -> None:
    """A row without a test, or a test without a row, is noticed."""
    head, _, *rows = table()
    assert HEAD == head
    assert list(CASES) == [row[0] for row in rows]


@pytest.mark.parametrize("ends_with", CASES)
async def test_what_happens(ends_with: str, sqlite: SQLiteBackend) -> None:
    """What the README says of this row is what the world outside sees."""
    [row] = [row for row in table() if row[0] == ends_with]
    _, work, answer, hooks = row
    await sqlite.execute(PARENTS, ROWS)
    for ending in CASES[ends_with]:
        await sqlite.execute("DELETE FROM rows")
        db = Database.from_url(sqlite.url)
        shop = Shop(db)

        status = await shop.get(ending)
        await db.dispose()

        count = await sqlite.scalar("SELECT count(*) FROM rows")
        assert work == ("kept" if count else "not kept")
        assert answer.replace("that response", ending) == status
        assert re.findall(r"`(\w+)`", hooks) == shop.hooks
