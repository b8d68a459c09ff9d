"""The core of the tests, unchanged, in sandboxes.

`python -m pytest -p tests.integration.testing.conformance FILES`: every database with a
shop is in a sandbox from when it is made to its end, and what a test looks at by
`backend` it sees through the sandbox. Tests that cannot run there are in
`left_out.toml`.
"""

from __future__ import annotations

import tomllib
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

pytest.register_assert_rewrite("tests.servers", "tests.support")  # before conftest.py

from asgi_uow import idempotency_table  # noqa: E402
from asgi_uow.testing import sandbox  # noqa: E402
from tests.servers import plugin  # noqa: E402
from tests.support import databases, keys  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from asgi_uow import Database
    from tests.servers import Backend
    from tests.servers.backend import Row

LEFT_OUT: dict[str, dict[str, list[str]]] = tomllib.loads(
    Path(__file__).with_name("left_out.toml").read_text()
)
shop_database, create_table = databases.shop_database, keys.create_table


class Inside:
    """What a backend answers while its database is in a sandbox."""

    def __init__(self, db: Database, box: sandbox) -> None:
        self.engine = db.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._box = box

    async def fetch(self, sql: str, **params: object) -> list[Row]:
        async with self.engine.connect() as connection:
            result = await connection.execute(sa.text(sql), params)
            return [tuple(row) for row in result] if result.returns_rows else []

    async def execute(self, *statements: str) -> None:
        for each in statements:
            await self.fetch(each)

    async def open_transactions(self) -> int:
        shared = set(self._box._connections.values())
        return sum(each.holder is not None for each in shared)


@asynccontextmanager
async def shop_in_sandbox(
    backend: Backend, *args: Any, **options: Any
) -> AsyncGenerator[Database]:
    async with shop_database(backend, *args, **options) as db, sandbox(db) as box:
        inside, before = Inside(db, box), vars(backend).copy()
        answers = ("fetch", "execute", "open_transactions")
        vars(backend).update({name: getattr(inside, name) for name in answers})
        vars(backend)["inside"] = inside
        try:
            yield db
        finally:
            vars(backend).clear()
            vars(backend).update(before)


async def create_table_in_sandbox(
    backend: Backend, name: str = "idempotency_keys"
) -> None:
    inside: Inside | None = vars(backend).get("inside")
    if inside is None or backend.name == "mariadb":
        await create_table(backend, name)
        return
    metadata = sa.MetaData()
    idempotency_table(metadata, name)
    async with inside.engine.connect() as connection:
        await connection.run_sync(metadata.create_all)


plugin.DATABASES = databases.DRIVERS  # type: ignore[assignment]
# Before any test module imports them by name.
databases.shop_database = shop_in_sandbox
keys.create_table = create_table_in_sandbox


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what is listed, by file, test and, where need be, driver."""
    listed = {
        f"{file}::{test}"
        for files in LEFT_OUT.values()
        for file, tests in files.items()
        for test in tests
    }
    left_out = [item for item in items if listed & set(_names(item))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _names(item: pytest.Item) -> list[str]:
    test = item.nodeid.removeprefix("tests/").partition("[")[0]
    params = getattr(getattr(item, "callspec", None), "params", {})
    return [test, f"{test}[{params.get('backend')}]"]
