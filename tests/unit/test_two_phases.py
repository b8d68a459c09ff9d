"""twophase=True: after PREPARE there is COMMIT PREPARED, or ROLLBACK PREPARED."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.util import await_only

from asgi_uow import Database, Outcome
from asgi_uow._databases.connection import Connection
from asgi_uow.errors import OutcomeUnknownError, PartialCommitError
from asgi_uow.observers import ReleaseFailed
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVER_DRIVERS, behind_proxy, checked_out, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

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
            Database.from_url(url) for url in (plain.engine.url, backend.url)
        )
        for each in (first, second):
            each.write_options = {**each.write_options, "twophase": True}
        yield first, second, proxy
        for each in (first, second):
            await each.dispose()


async def insert_into_both(first: Database, second: Database) -> None:
    await shop.insert(1, first)
    await shop.insert(2, second)


async def assert_nothing_is_left(backend: ServerBackend, *databases: Database) -> None:
    # MariaDB lists those of all its databases: others are tested at the same time.
    async def is_clean() -> bool:
        return not await backend.fetch(LISTED[backend.name])

    await eventually(True, is_clean)
    assert [0] * 2 * len(databases) == checked_out(*databases)


async def test_two_phases(backend: ServerBackend) -> None:
    """One database, or several, are prepared and committed on every server."""
    async with two_databases(backend) as (first, second, _):
        alone = await handle(lambda: shop.insert(3, first), first, hooks=True)
        both = await handle(lambda: insert_into_both(first, second), first, second)

        assert [200, 200] == [alone.status, both.status]
        assert ["commit"] == alone.hooks
        assert [1, 2, 3] == await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


async def test_nothing_is_asked_after_prepare(backend: ServerBackend) -> None:
    """The next that a server hears after PREPARE is COMMIT PREPARED."""
    async with two_databases(backend) as (first, _, proxy):
        first.resolve_unknown = backend.name == "postgresql"

        async def handler() -> None:
            await shop.insert(1, first)
            await first.write.connection()  # so the server is asked before COMMIT

        response = await handle(handler, first)

        assert 200 == response.status
        prepared = [is_prepare(each) for each in proxy.trips].index(True)
        assert is_commit(proxy.trips[prepared + 1].removeprefix("PREPARE "))
        await assert_nothing_is_left(backend, first)


@pytest.mark.parametrize("how", ["cut_before", "cut_after", "hold_answer"])
async def test_lost_answer_to_commit_prepared(backend: ServerBackend, how: str) -> None:
    """COMMIT PREPARED is tried again from aside: what was prepared is committed."""
    seconds = 1 if how == "hold_answer" else 30
    async with two_databases(backend) as (first, second, proxy):
        getattr(proxy, how)(is_commit)

        response = await handle(
            lambda: insert_into_both(first, second),
            first,
            second,
            hooks=True,
            commit_timeout=seconds,
        )

        assert 200 == response.status
        assert ["commit"] == response.hooks
        assert [1, 2] == await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


@pytest.mark.parametrize("how", ["cut_before", "cut_after"])
async def test_lost_answer_to_prepare(backend: ServerBackend, how: str) -> None:
    """A PREPARE without an answer: what was prepared is rolled back, from aside too."""
    async with two_databases(backend) as (first, second, proxy):
        getattr(proxy, how)(is_prepare)

        async def handler() -> None:
            await shop.insert(2, second)  # prepared first, and alive
            await shop.insert(1, first)

        response = await handle(handler, first, second, hooks=True)

        assert 503 == response.status
        assert ["rollback"] == response.hooks
        assert [] == await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


@pytest.mark.parametrize("several", [False, True])
async def test_server_that_is_gone_after_prepare(
    backend: ServerBackend, *, several: bool
) -> None:
    """What is prepared and cannot be reached is UNKNOWN; PARTIAL beside a commit."""
    async with two_databases(backend) as (first, second, proxy):

        def go(*_: object) -> None:
            proxy.freeze()

        event.listen(first.engine.sync_engine, "commit_twophase", go, once=True)

        async def handler() -> None:
            await shop.insert(1, first)
            if several:
                await shop.insert(2, second)

        response = await handle(handler, first, second, hooks=True, commit_timeout=1)

        kind = PartialCommitError if several else OutcomeUnknownError
        assert kind is type(response.error)
        assert "may still be prepared" in str(response.error)
        assert [] == response.hooks
        assert ([2] if several else []) == await shop.items(backend)
        proxy.thaw()
        xid = str(response.error).partition("'")[2].partition("'")[0]
        assert None is not await first.end_prepared(xid, 10, commit=True)
        assert 1 in await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


async def test_what_cannot_be_rolled_back_is_told(backend: ServerBackend) -> None:
    """A prepared transaction that has to be left is named to the observers."""
    async with two_databases(backend) as (first, second, proxy):

        def fail(*_: object) -> None:
            proxy.freeze()
            raise RuntimeError

        event.listen(second.engine.sync_engine, "prepare_twophase", fail, once=True)

        response = await handle(
            lambda: insert_into_both(first, second), first, second, commit_timeout=1
        )

        assert Outcome.ROLLED_BACK is response.unit.outcome
        [told] = [e for e in response.events.of(ReleaseFailed) if "_sa_" in e.operation]
        assert "it is prepared" == str(told.error)
        proxy.thaw()
        xid = told.operation.split("'")[1]
        assert None is not await first.end_prepared(xid, 10, commit=False)
        assert [] == await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


async def test_plain_database_is_committed_first(backend: ServerBackend) -> None:
    """What is not prepared may still fail: what is prepared is rolled back then."""
    async with two_databases(backend) as (first, second, proxy):
        first.write_options = {**first.write_options, "twophase": False}
        proxy.cut_before(lambda trip: trip == "COMMIT")

        async def handler() -> None:
            await shop.insert(2, second)
            await shop.insert(1, first)

        response = await handle(handler, second, first)

        assert Outcome.UNKNOWN is response.unit.outcome
        assert [] == await shop.items(backend)
        await assert_nothing_is_left(backend, first, second)


@on("asyncpg", "psycopg")  # MariaDB keeps it for who has prepared it
async def test_rolled_back_by_somebody_else(
    backend: ServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an operator has rolled back after PREPARE is not told to be committed."""
    rolled_back: list[str] = []

    async def roll_back(xid: str) -> None:
        await backend.execute(f"ROLLBACK PREPARED '{xid}'")
        rolled_back.append(xid)

    async with two_databases(backend) as (first, _, _):
        prepare = Connection._prepare_twophase_impl

        def prepare_and_lose(self: Connection, xid: str) -> None:
            prepare(self, xid)
            await_only(roll_back(xid))

        monkeypatch.setattr(Connection, "_prepare_twophase_impl", prepare_and_lose)
        lost = await handle(lambda: shop.insert(1, first), first, hooks=True)

        assert [500, []] == [lost.status, lost.hooks]
        assert rolled_back
        assert [] == await shop.items(backend)
        await assert_nothing_is_left(backend, first)
