"""twophase=True: after PREPARE there is COMMIT PREPARED, or ROLLBACK PREPARED."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from asgi_uow import Database, Outcome
from asgi_uow.errors import OutcomeUnknownError, PartialCommitError
from asgi_uow.observers import ReleaseFailed
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVER_DRIVERS, behind_proxy, checked_out, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import RecordingProxy, ServerBackend

pytestmark = on(*SERVER_DRIVERS)
LISTED = {
    "mariadb": "XA RECOVER",
    "postgresql": "SELECT gid FROM pg_prepared_xacts"
    " WHERE database = current_database()",
}


def is_prepare(trip: str) -> bool:
    return trip.startswith(("XA PREPARE", "PREPARE TRANSACTION"))


def is_commit(trip: str) -> bool:
    return trip.startswith(("XA COMMIT", "COMMIT PREPARED"))


@asynccontextmanager
async def two_databases(
    backend: ServerBackend,
) -> AsyncGenerator[tuple[Database, Database, RecordingProxy]]:
    """One database twice, the first time behind a proxy."""
    async with behind_proxy(backend) as (plain, proxy):
        first, second = (
            Database.from_url(url, **{}) for url in (plain.engine.url, backend.url)
        )
        for each in (first, second):
            each.write_options = {**each.write_options, "twophase": True}
        yield first, second, proxy
        for each in (first, second):
            await each.dispose()
