"""Requests that met a conflict, over sockets: uvicorn is the server."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn

from asgi_uow._entrypoints.exchange import Again
from tests.integration.frameworks.case import Case
from tests.integration.frameworks.facts.replays import FORM, Form
from tests.integration.frameworks.matrix import FRAMEWORKS
from tests.servers import eventually
from tests.servers.process import HOST
from tests.support.conflicts import prepare_conflicts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from asgi_uow._asgi import ASGIApp, Receive, Scope, Send
    from tests.integration.frameworks.site import Adapter
    from tests.servers import SQLiteBackend


@asynccontextmanager
async def on_uvicorn(app: ASGIApp) -> AsyncGenerator[httpx.AsyncClient, None]:
    """Serve an application on a free port, inside what knows who is logged in."""

    async def with_user(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["user"] = "ann"
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(with_user, HOST, 0, log_config=None))
    serving = asyncio.create_task(server.serve())

    async def is_started() -> bool:
        return server.started or serving.done()

    try:
        await eventually(expected=True, probe=is_started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        await serving


def with_a(fact: str) -> list[Adapter]:
    return [each for each in FRAMEWORKS if fact not in each.lacks]


def name(framework: Adapter) -> str:
    return framework.name


@pytest.mark.parametrize("answers", [False, True], ids=["raised", "answered"])
@pytest.mark.parametrize("framework", with_a("replayed"), ids=name)
async def test_forms(
    framework: Adapter,
    sqlite: SQLiteBackend,
    caplog: pytest.LogCaptureFixture,
    *,
    answers: bool,
) -> None:
    """A client on a socket has one answer, the last; nobody logs how others ended."""
    async with Case.prepare(framework, sqlite) as case:
        await prepare_conflicts(sqlite, case.db)
        form = Form(case, 1 + answers, answers=answers)
        async with on_uvicorn(form.app()) as client:
            response = await client.post("/forms/7", **FORM)
            await form.check(response.status_code, response.text)
    assert Again.__name__ not in caplog.text


@pytest.mark.parametrize("framework", with_a("replayed_mount"), ids=name)
async def test_mounts(framework: Adapter, sqlite: SQLiteBackend) -> None:
    """So it has from an application that is mounted in another one."""
    async with Case.prepare(framework, sqlite) as case:
        await prepare_conflicts(sqlite, case.db)
        form = Form(case, 1, answers=False)
        async with on_uvicorn(form.mounted("/mounted")) as client:
            response = await client.post("/mounted/forms/7", **FORM)
            await form.check(response.status_code, response.text)
