"""Outcomes that the answer to COMMIT does not tell: in doubt, and how it is settled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from asgi_uow import CausalReads, Database, Outcome
from asgi_uow.errors import OutcomeUnknownError
from asgi_uow.observers import CommitFailed, ReleaseFailed, UnitFinished
from tests.servers.process import free_port
from tests.support import shop
from tests.support.asgi import Response, handle
from tests.support.databases import SERVERS, behind_proxy, checked_out, is_commit, on

if TYPE_CHECKING:
    from tests.servers import Backend, PostgreSQLBackend, ServerBackend


async def insert_1() -> None:
    await shop.insert(1)


@on(*SERVERS)
@pytest.mark.parametrize(
    "how", ["cut_after", "cut_before", "garble_answer", "hold_answer"]
)
async def test_lost_answer_to_commit_is_unknown(
    backend: ServerBackend, how: str
) -> None:
    """COMMIT without an answer: plain 500, no hook of either kind, no connection."""
    seconds = 0.2 if how == "hold_answer" else 30
    async with behind_proxy(backend) as (db, proxy):
        getattr(proxy, how)(is_commit)

        response = await handle(insert_1, db, hooks=True, commit_timeout=seconds)

        assert 500 == response.status
        assert "retry-after" not in response.headers
        assert isinstance(response.error, OutcomeUnknownError)
        assert "was not seen; it may or may not have been kept" in str(response.error)
        assert Outcome.UNKNOWN is response.unit.outcome
        assert [] == response.hooks
        assert [0, 0] == checked_out(db)
        assert ([] if how == "cut_before" else [1]) == await shop.items(backend)
        kinds = [type(each) for each in response.events.results]
        assert [CommitFailed, UnitFinished] == [
            kind for kind in kinds if kind is not ReleaseFailed
        ]


@on("asyncpg")
async def test_server_that_says_it_does_not_know(
    db: Database, backend: PostgreSQLBackend
) -> None:
    """SQLSTATE 40003 at COMMIT is UNKNOWN, although the connection lives."""
    await backend.execute(
        "CREATE FUNCTION doubt() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'who knows' USING ERRCODE = '40003'; END $$",
        "CREATE CONSTRAINT TRIGGER doubt AFTER INSERT ON items"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doubt()",
    )

    response = await handle(insert_1, db)

    assert 500 == response.status
    assert isinstance(response.error, OutcomeUnknownError)
    assert [0, 0] == checked_out(db)


@on("aiosqlite", *SERVERS)
async def test_cancelled_inside_commit(db: Database, backend: Backend) -> None:
    """What is raised inside COMMIT without an answer leaves its outcome in doubt."""

    def cancel(_: object) -> None:
        raise asyncio.CancelledError

    event.listen(db.engine.sync_engine, "commit", cancel, once=True)

    response = Response()
    with pytest.raises(asyncio.CancelledError):
        await handle(insert_1, db, hooks=True, into=response)

    assert Outcome.UNKNOWN is response.unit.outcome
    error = response.events.only(CommitFailed).error
    assert OutcomeUnknownError is type(error)
    assert "prepared" not in str(error)
    assert [] == response.hooks == response.types
    assert [0, 0] == checked_out(db)
    assert [] == await shop.items(backend)


# Settled by asking


@on("asyncpg", "psycopg")
@pytest.mark.parametrize("how", ["cut_after", "cut_before"])
async def test_unknown_is_resolved_on_postgresql(
    backend: PostgreSQLBackend, how: str
) -> None:
    """resolve_unknown: a lost answer is settled by asking for the transaction id."""
    async with behind_proxy(backend, resolve_unknown=True) as (db, proxy):
        getattr(proxy, how)(is_commit)

        response = await handle(insert_1, db, hooks=True)

        kept = how == "cut_after"
        outcome = Outcome.COMMITTED if kept else Outcome.ROLLED_BACK
        assert outcome is response.unit.outcome
        assert (200 if kept else 503) == response.status
        assert ["commit" if kept else "rollback"] == response.hooks
        assert ([1] if kept else []) == await shop.items(backend)
        assert [0, 0] == checked_out(db)


async def test_resolved_commit_is_seen_by_the_next_request(
    postgresql: PostgreSQLBackend,
) -> None:
    """A client whose COMMIT was found to be kept is told what it has to see."""
    options = {"read_urls": [postgresql.url], "resolve_unknown": True}
    async with behind_proxy(postgresql, **options) as (db, proxy):
        proxy.cut_after(is_commit)
        causal_reads = CausalReads("a secret of many bytes")

        response = await handle(insert_1, db, causal_reads=causal_reads)

        assert 200 == response.status
        assert response.cookie


@on("aiosqlite")
async def test_resolved_commit_goes_on_with_the_next_database(
    db: Database, backend: Backend, postgresql: PostgreSQLBackend
) -> None:
    """A COMMIT found to be kept is followed by those of the other databases."""
    async with behind_proxy(postgresql, resolve_unknown=True) as (first, proxy):
        proxy.cut_after(is_commit)

        async def handler() -> None:
            await shop.insert(1)
            await shop.insert(2, db)

        response = await handle(handler, first, db)

        assert 200 == response.status
        assert [1] == await shop.items(postgresql)
        assert [2] == await shop.items(backend)
        assert [0, 0, 0, 0] == checked_out(first, db)


async def test_outcome_while_the_server_is_away(postgresql: PostgreSQLBackend) -> None:
    """A server that cannot be asked leaves the outcome unknown, when time is up."""
    url = postgresql.through(free_port())
    db = Database.from_url(url, resolve_unknown=True)
    assert await db.settle(None, "1@never", 0.2) is None
    await db.dispose()


@on("asyncpg", "psycopg")
async def test_what_became_of_a_transaction(db: Database) -> None:
    """A COMMIT is proved by its id and the life of the server that gave it."""
    async with db:
        await shop.insert(1)
        transaction = str(await db.write.scalar(db.facts.TRANSACTION_ID or ""))
    number = transaction.partition("@")[0]

    assert await db.settle(None, transaction, 30) is True
    assert await db.settle(None, f"{number}@another life", 30) is None
