"""The fixtures of more than one file; the databases are in `tests.servers.plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.databases import shop_database
from tests.support.site import Site, site_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asgi_uow import Database
    from tests.servers import Backend, MariaDBBackend


@pytest.fixture
async def db(
    request: pytest.FixtureRequest, backend: Backend
) -> AsyncIterator[Database]:
    """A database on `backend` with an empty shop, and the options of `on()`."""
    options: dict[str, Any] = {}
    for mark in request.node.iter_markers("on"):  # the closest one first
        options = {**mark.kwargs, **options}
    async with shop_database(backend, **options) as db:
        yield db


@pytest.fixture
async def other(mariadb: MariaDBBackend) -> AsyncIterator[Database]:
    """A second database with an empty shop, on `mariadb`."""
    async with shop_database(mariadb) as other:
        yield other


@pytest.fixture
async def site(backend: Backend) -> AsyncIterator[Site]:
    """A database with one reader, which is the server of the writer."""
    async with site_with(backend, backend.url) as site:
        yield site
