"""The database of the tests, and clients of the application."""

from __future__ import annotations

import asyncio
import socket
from threading import Thread
from typing import TYPE_CHECKING

import pytest
import uvicorn
from httpx import ASGITransport, AsyncClient

from asgi_uow.testing import SandboxMiddleware

from .app import Base, app, db

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asgi_uow import Database


async def create_tables() -> None:
    async with db.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.fixture(scope="session")
def uow_database() -> Database:
    """Override the plugin's: the application's database, with its tables."""
    asyncio.run(create_tables())
    return db


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run no test on Trio, which SQLAlchemy does not know; anyio's plugin asks."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _always(uow_sandbox: object) -> None:
    """Have every test in a sandbox, also those that do not ask for one."""


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    """A client without a server, which gets the 500 in the place of the exception."""
    transport = ASGITransport(app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Start a real server in this process, and give its address."""
    config = uvicorn.Config(SandboxMiddleware(app), log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()
