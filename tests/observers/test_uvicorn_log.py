"""What the log of a server says of a COMMIT that failed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_uow import Database, UnitOfWorkMiddleware
from docs.examples.shop.__main__ import listening
from tests.support import shop
from tests.support.databases import on

if TYPE_CHECKING:
    import pytest

pytestmark = on("aiosqlite")


async def order(_: Any) -> PlainTextResponse:
    await shop.insert_orphan()
    return PlainTextResponse("ok")


async def test_one_line_and_one_traceback(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours is one line that names the request; the traceback is uvicorn's, once."""
    unit_of_work = Middleware(UnitOfWorkMiddleware, db)
    app = Starlette(routes=[Route("/orders/{n}", order)], middleware=[unit_of_work])
    async with listening(app) as (address, _), httpx.AsyncClient() as client:
        response = await client.get(f"{address}/orders/7?token=secret")
    assert 500 == response.status_code
    errors = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert ["asgi_uow", "uvicorn.error"] == [each.name for each in errors]
    ours, servers = map(logging.Formatter().format, errors)
    assert "GET /orders/{n}, rolled back, cause commit_failed, driver code SQL" in ours
    assert 'File "' not in ours
    assert "Traceback" in servers
    assert "secret" not in ours + servers
