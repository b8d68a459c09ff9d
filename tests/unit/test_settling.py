"""Outcomes that the row of a key settles, on every database."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import asgi_uow as uow
from asgi_uow import (
    Database,
    Idempotency,
    Outcome,
    Retry,
    UnitOfWorkMiddleware,
    unit_of_work,
)
from asgi_uow._databases.keys import Claim, table_of
from asgi_uow.errors import (
    CommitFailedError,
    OutcomeUnknownError,
    PartialCommitError,
    UnitOfWorkClosedError,
)
from asgi_uow.observers import CommitFailed, RetryScheduled
from tests.servers.process import free_port
from tests.support import shop
from tests.support.asgi import handle
from tests.support.cockroach import cockroach
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    is_commit,
    on,
)
from tests.support.keys import KEYS, Shop, create_table, is_replayed

if TYPE_CHECKING:
    from tests.servers import Backend, MariaDBBackend, PostgreSQLBackend, ServerBackend

CLAIM = Claim.of(table_of("idempotency_keys"), "http:", "key", b"POST", b"/", b"")
LOST = ["cut_after", "cut_before", "garble_answer"]


async def insert_1() -> None:
    await shop.insert(1)


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("how", LOST)
async def test_a_lost_answer_is_settled(backend: ServerBackend, how: str) -> None:
    """There, the client gets its response; not there, it may come again."""
    await create_table(backend)
    async with behind_proxy(backend) as (db, proxy):
        getattr(proxy, how)(is_commit)
        site = Shop(db)
        first = await site.post()

        kept = how != "cut_before"
        assert (Outcome.COMMITTED if kept else Outcome.ROLLED_BACK) is site.units[
            0
        ].outcome
        assert (201 if kept else 503) == first.status
        assert ["commit" if kept else "rollback"] == site.hooks
        second = await site.post()
        assert 201 == second.status
        assert kept == is_replayed(second)
        assert 1 == len(await shop.items(backend))
        assert [(1,)] == await backend.fetch(KEYS)
        assert [0, 0] == checked_out(db)


@on(*SERVER_DRIVERS)
async def test_what_is_proven_gone_is_replayed(backend: ServerBackend) -> None:
    """With `Retry` the client sees nothing of a COMMIT that was lost."""
    await create_table(backend)
    async with behind_proxy(backend) as (db, proxy):
        proxy.cut_before(is_commit)
        site = Shop(db, retry=Retry(backoff=0.001))
        assert 201 == (await site.post()).status
        assert ["rollback", "commit"] == site.hooks
        assert [2] == await shop.items(backend)
        assert 1 == len(site.events.of(RetryScheduled))


@on("asyncmy", "aiosqlite")
async def test_a_job_is_settled_too(db: Database, backend: Backend) -> None:
    """What breaks COMMIT off before it is sent is a rollback that is certain."""
    await create_table(backend)

    def fail(_: object) -> None:
        raise OSError

    event.listen(db.engine.sync_engine, "commit", fail, once=True)
    failing = unit_of_work(db, key="job")
    with pytest.raises(CommitFailedError):
        async with failing:
            await shop.insert(1)
    assert Outcome.ROLLED_BACK is failing.unit.outcome
    async with unit_of_work(db, key="job") as unit:
        assert not unit.replayed


@on("asyncmy")
@pytest.mark.parametrize("how", LOST)
async def test_unknown_is_resolved_by_a_mark(backend: ServerBackend, how: str) -> None:
    """resolve_unknown: what has no key leaves a row of its own."""
    await create_table(backend)
    async with behind_proxy(backend, resolve_unknown=True) as (db, proxy):
        getattr(proxy, how)(is_commit)
        response = await handle(insert_1, db, hooks=True)

        kept = how != "cut_before"
        assert (200 if kept else 503) == response.status
        assert ["commit" if kept else "rollback"] == response.hooks
        assert ([1] if kept else []) == await shop.items(backend)
        assert [(int(kept),)] == await backend.fetch(KEYS)


class Broken(BaseException):
    """What a framework may raise anywhere."""


@on("asyncmy")
async def test_the_look_itself_breaks_off(backend: ServerBackend) -> None:
    """Then nothing is known, and no success is forwarded: not a second one either."""
    await create_table(backend)
    sent: list[Any] = []
    breaks: list[bool] = []

    def connect(*_: object) -> None:
        if breaks:
            raise Broken

    async def receive() -> Any:
        raise NotImplementedError

    async def send(message: Any) -> None:
        sent.append(message)  # pragma: no cover  # nothing is

    async def app(_: object, __: object, send: Any) -> None:
        await insert_1()
        breaks.append(True)
        with suppress(Broken):
            await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.start", "status": 200})

    async with behind_proxy(backend, resolve_unknown=True) as (db, proxy):
        event.listen(db.engine.sync_engine, "do_connect", connect)
        proxy.cut_after(is_commit)
        middleware = UnitOfWorkMiddleware(app, db)
        with pytest.raises(UnitOfWorkClosedError):
            await middleware({"type": "http", "method": "POST"}, receive, send)
    assert [] == sent


@on("aiosqlite", resolve_unknown=True)
async def test_unknown_is_resolved_on_sqlite(db: Database, backend: Backend) -> None:
    """What was broken off inside COMMIT is found to be rolled back."""
    await create_table(backend)

    def cancel(_: object) -> None:
        raise asyncio.CancelledError

    event.listen(db.engine.sync_engine, "commit", cancel, once=True)
    cancelled = unit_of_work(db)
    with pytest.raises(asyncio.CancelledError):
        async with cancelled:
            await shop.insert(1)
    assert Outcome.ROLLED_BACK is cancelled.unit.outcome
    async with db as unit:
        await shop.insert(2)
    assert Outcome.COMMITTED is unit.outcome
    assert [2] == await shop.items(backend)
    assert 1 == await Idempotency(keep=0.0).delete_expired(db) + 1


@on("asyncpg")
@pytest.mark.parametrize("how", LOST)
async def test_unknown_is_resolved_on_cockroachdb(
    backend: ServerBackend, how: str
) -> None:
    """It has no ids to ask for; a row does it."""
    await create_table(backend)
    await shop.create(backend)
    async with backend.proxy() as proxy:
        url = cockroach(backend.through(proxy.port))
        db = Database.from_url(url, resolve_unknown=True)
        getattr(proxy, how)(is_commit)
        response = await handle(insert_1, db)
        assert (503 if how == "cut_before" else 200) == response.status
        await db.dispose()


@on("asyncmy")
@pytest.mark.parametrize("how", ["cut_after", "cut_before"])
async def test_ddl_is_no_proof(backend: ServerBackend, how: str) -> None:
    """DDL has kept the key alone; that all is done is said as the last thing."""
    await create_table(backend)
    async with behind_proxy(backend) as (db, proxy):
        site = Shop(db)

        async def alter() -> None:
            await uow.current_session().execute("CREATE TABLE made (id INTEGER)")
            await shop.insert(100)

        site.before = alter
        getattr(proxy, how)(is_commit)
        response = await site.post()
        kept = how == "cut_after"
        outcomes = {Outcome.COMMITTED} if kept else {Outcome.UNKNOWN, Outcome.PARTIAL}
        assert (201 if kept else 500) == response.status
        assert site.units[0].outcome in outcomes
        assert ["commit"] * kept == site.hooks
        assert ([1, 100] if kept else [1]) == await shop.items(backend)


@on("asyncmy")
@pytest.mark.parametrize("how", ["a statement", "a procedure"])
async def test_what_kept_the_key_alone(
    db: Database, backend: ServerBackend, how: str
) -> None:
    """A job whose key was kept, and not all of its work, is not called done."""
    await create_table(backend)
    await backend.execute("CREATE PROCEDURE keeps() CREATE TABLE made (id INTEGER)")
    ddl = "CREATE TABLE made (id INTEGER)" if how == "a statement" else "CALL keeps()"

    async def job() -> None:
        async with unit_of_work(db, key="job"):
            await uow.current_session().execute(ddl)
            raise LookupError

    with pytest.raises((LookupError, OutcomeUnknownError, PartialCommitError)):
        await job()
    with pytest.raises(PartialCommitError, match="who had this key before"):
        await job()
    assert not uow.in_unit_of_work()


@on("asyncmy")
async def test_a_procedure_leaves_no_proof(backend: ServerBackend) -> None:
    """What it has kept unseen is not all: the outcome of the rest stays unknown."""
    await create_table(backend)
    await backend.execute(
        "CREATE PROCEDURE keeps() BEGIN COMMIT; INSERT INTO items (id) VALUES (9); END"
    )
    async with behind_proxy(backend) as (db, proxy):
        site = Shop(db)
        site.before = lambda: uow.current_session().execute("CALL keeps()")
        proxy.cut_before(is_commit)
        response = await site.post()
        assert 500 == response.status
        assert site.units[0].outcome in {Outcome.UNKNOWN, Outcome.PARTIAL}
        assert [] == site.hooks


@on("asyncpg")
@pytest.mark.parametrize("breaks", ["the other", "the key's"])
async def test_the_key_commits_last(
    db: Database, backend: PostgreSQLBackend, other: Database, breaks: str
) -> None:
    """A repetition is told of success only if every database has kept the work."""
    await create_table(backend)
    broken = other if breaks == "the other" else db

    def fail(_: object) -> None:
        raise OSError

    event.listen(broken.engine.sync_engine, "commit", fail, once=True)
    site = Shop(db, other)

    async def both() -> None:
        await shop.insert(site.runs, other)

    site.before = both
    response = await site.post()
    outcome = site.units[0].outcome
    assert 500 <= response.status
    assert [(0,)] == await backend.fetch(KEYS)
    assert [] == await shop.items(backend)
    if breaks == "the other":
        assert outcome in {Outcome.ROLLED_BACK, Outcome.UNKNOWN}
    else:
        assert Outcome.PARTIAL is outcome
        assert isinstance(site.events.only(CommitFailed).error, PartialCommitError)


@on(*DRIVERS)
async def test_an_open_transaction_is_waited_for(
    db: Database, backend: Backend
) -> None:
    """As long as it may still commit nobody says that it was rolled back."""
    await create_table(backend)
    engine = create_async_engine(backend.url, poolclass=NullPool)
    async with engine.connect() as connection:
        if backend.driver == "aiosqlite":
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        await connection.execute(CLAIM.insert(db.facts))
        assert await db.settle(None, CLAIM, 0.4) is None
        await connection.rollback()
        assert await db.settle(None, CLAIM, 30) is False
        await connection.execute(CLAIM.insert(db.facts))
        await connection.execute(CLAIM.update())
        await connection.commit()
    assert await db.settle(None, CLAIM, 30) is True
    assert [(1,)] == await backend.fetch(KEYS)


async def test_a_server_that_is_away(mariadb: MariaDBBackend) -> None:
    """It is asked until the time is over; the outcome stays unknown."""
    db = Database.from_url(mariadb.through(free_port()), resolve_unknown=True)
    assert await db.settle(None, CLAIM, 0.2) is None
    await db.dispose()


@on(*DRIVERS)
async def test_the_row_of_another(db: Database, backend: Backend) -> None:
    """That the key was used does not say that this transaction was kept."""
    await create_table(backend)
    site = Shop(db)
    await site.post()
    assert await db.settle(None, CLAIM, 30) is False
    assert is_replayed(await site.post())


@on(*DRIVERS)
async def test_what_a_look_has_left(db: Database, backend: Backend) -> None:
    """A row that was left by a look which broke off is nobody's: the key is free."""
    await create_table(backend)
    await backend.execute(
        "INSERT INTO idempotency_keys (id, request, run, created)"
        f" VALUES ('{CLAIM.id}', '{CLAIM.request}', '', {-int(time.time())})"
    )
    site = Shop(db)
    assert 201 == (await site.post()).status
    assert is_replayed(await site.post())
    assert 1 == site.runs
