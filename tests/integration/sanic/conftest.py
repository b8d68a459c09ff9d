from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.sanic.child import create, serving
from tests.servers import SQLiteBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.sanic.child import Child


@pytest.fixture(scope="module")
async def store(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[SQLiteBackend]:
    """A SQLite file for all tests of a module; each uses numbers of its own."""
    async with SQLiteBackend(tmp_path_factory.mktemp("sanic")) as backend:
        await create(backend)
        yield backend


@pytest.fixture(scope="module")
async def site(
    store: SQLiteBackend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Child]:
    """The site in a single process, for all tests of a module."""
    async with serving(store.url, tmp_path_factory.mktemp("log")) as site:
        yield site
