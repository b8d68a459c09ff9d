"""`Idempotency`: which keys count, whose they are, and what a repetition is told."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

import asgi_uow as uow
from asgi_uow import Database, Idempotency, Outcome, unit_of_work
from asgi_uow.errors import CommitFailedError, ConfigurationError
from asgi_uow.observers import UnitFinished
from tests.servers.backend import SQLiteBackend
from tests.support import shop
from tests.support.databases import (
    DATABASES,
    DRIVERS,
    checked_out,
    memory_database,
    on,
    shop_database,
)
from tests.support.keys import KEYS, Shop, create_table, is_replayed

if TYPE_CHECKING:
    from pathlib import Path

    from asgi_uow._asgi import Scope
    from tests.servers import Backend
    from tests.support.asgi import Response

pytestmark = on("aiosqlite")

PROBLEM = "application/problem+json"


@pytest.fixture(autouse=True)
async def _table(backend: Backend) -> None:
    await create_table(backend)


def problem(response: Response) -> str:
    """Give what a problem says, and see that it is one."""
    assert PROBLEM == response.headers["content-type"]
    said: dict[str, Any] = json.loads("".join(response.chunks))
    assert response.status == said["status"]
    detail = said["detail"]
    assert isinstance(detail, str)
    return detail


@on(*DRIVERS)
async def test_a_repetition_gets_the_response(db: Database, backend: Backend) -> None:
    """The work is done once; who asks again is told what the first was told."""
    site = Shop(db)
    first, *others = [await site.post() for _ in range(3)]

    assert 1 == site.runs
    assert [1] == await shop.items(backend)
    assert ["commit"] == site.hooks
    assert not is_replayed(first)
    assert all(map(is_replayed, others))
    for each in others:
        assert (first.status, first.chunks) == (each.status, each.chunks)
        assert first.headers == {
            name: value
            for name, value in each.headers.items()
            if name != "idempotency-replayed"
        }
    assert [0, 0] == checked_out(db)


@on(*DATABASES)
async def test_other_keys_are_other_requests(db: Database, backend: Backend) -> None:
    """A key that differs in one character, be it a capital or a space, is another."""
    site = Shop(db)
    for key in (b"key", b"Key", b"key.", b"ke y"):
        await site.post(key)

    assert 4 == site.runs
    assert [(4,)] == await backend.fetch(KEYS)


@on(*DATABASES)
@pytest.mark.parametrize("status", [409, 503])
async def test_what_was_rolled_back_is_done(
    db: Database, backend: Backend, status: int
) -> None:
    """An error keeps nothing, the key neither: a repetition runs."""
    site = Shop(db)
    site.status = status
    assert status == (await site.post()).status
    assert [] == await shop.items(backend)
    assert [(0,)] == await backend.fetch(KEYS)

    site.status = 201
    assert 201 == (await site.post()).status
    assert [2] == await shop.items(backend)
    assert ["rollback", "commit"] == site.hooks


async def test_an_exception_keeps_no_key(db: Database, backend: Backend) -> None:
    """What the handler raises leaves the application, and a repetition runs."""

    async def fail() -> None:
        raise LookupError

    site = Shop(db)
    site.before = fail
    assert isinstance((await site.post()).error, LookupError)
    site.before = None
    assert 201 == (await site.post()).status
    assert [2] == await shop.items(backend)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"path": "/other"}, "path"),
        ({"query_string": b"a=1"}, "path"),
        ({"method": "PATCH"}, "method"),
        ({"body": (b"other",)}, "body"),
        ({"body": (b"one", b"", b" more")}, "body"),
        ({"body": (b"on",)}, "body"),
    ],
)
async def test_a_key_of_another_request(
    db: Database, backend: Backend, change: dict[str, Any], word: str
) -> None:
    """The same key with another method, path, query or body is refused."""
    site = Shop(db)
    request: dict[str, Any] = {"body": (b"one",), **change}
    await site.post(body=(b"one",))
    response = await site.post(b"key", **request)

    assert 422 == response.status
    assert f"another {word}" in problem(response) or "method or path" in problem(
        response
    )
    assert [1] == await shop.items(backend)


async def test_several_databases(
    db: Database, backend: Backend, tmp_path: Path
) -> None:
    """The database with the key is the last to be committed: all keep it, or none."""
    folder = tmp_path / "other"
    folder.mkdir()
    async with SQLiteBackend(folder) as beside, shop_database(beside) as other:
        site = Shop(db, other)

        async def insert_orphan() -> None:
            await uow.current_session(other).execute(
                "INSERT INTO items VALUES (9, 404)"
            )

        site.before = insert_orphan
        response = await site.post()
        assert (500, ["rollback"]) == (response.status, site.hooks)
        assert 0 == await backend.scalar(KEYS)


async def test_the_last_statement_fails(db: Database, backend: Backend) -> None:
    """A key that cannot be marked as done is the error, and nothing is committed."""
    site = Shop(db)

    async def drop() -> None:
        await uow.current_session().execute("DROP TABLE idempotency_keys")

    site.before = drop
    response = await site.post()
    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)
    assert isinstance(response.error.__cause__, DBAPIError)
    assert ["rollback"] == site.hooks
    assert [] == await shop.items(backend)


async def test_the_same_body_in_other_parts(db: Database) -> None:
    """How a body is cut on its way does not matter."""
    site = Shop(db)
    await site.post(body=(b"on", b"e"))
    assert is_replayed(await site.post(body=(b"", b"one", b"")))


@pytest.mark.parametrize(
    "key", [b"", b" ", b'""', b"a" * 256, b"a" * 10_000, b"\xc3\xa4", b"a\nb", b"a\x00"]
)
async def test_a_malformed_key(db: Database, backend: Backend, key: bytes) -> None:
    """A key is 1 to 255 visible ASCII characters; else the request is not served."""
    site = Shop(db)
    response = await site.post(key)

    assert 400 == response.status
    assert "255" in problem(response)
    assert 0 == site.runs
    assert [(0,)] == await backend.fetch(KEYS)


async def test_a_key_sent_twice(db: Database) -> None:
    """Two headers, be they the same, are not one key."""
    site = Shop(db)
    assert 400 == (await site.post(b"key", (b"Idempotency-Key", b"key"))).status
    assert 0 == site.runs


async def test_longest_key(db: Database) -> None:
    """255 characters are a key."""
    site = Shop(db)
    assert 201 == (await site.post(b"a" * 255)).status
    assert is_replayed(await site.post(b"a" * 255))


async def test_a_quoted_key(db: Database) -> None:
    """The draft's string in quotes is the key inside of them."""
    site = Shop(db)
    await site.post(b'"a key"')
    assert is_replayed(await site.post(b"a key"))


async def test_a_missing_key(db: Database) -> None:
    """Where a key is required, a request without one is refused; a GET needs none."""
    site = Shop(db, idempotency=Idempotency(required=True))
    assert "Idempotency-Key" in problem(response := await site.post(None))
    assert 400 == response.status
    assert 201 == (await site.post(None, method="GET")).status


async def test_methods_without_keys(db: Database) -> None:
    """A key counts for the methods that are named, in whatever case."""
    site = Shop(db, idempotency=Idempotency(methods=["put"]))
    for _ in range(2):
        await site.post()
    assert 2 == site.runs
    await site.post(method="PUT")
    assert is_replayed(await site.post(method="PUT"))


async def test_another_header(db: Database) -> None:
    """The header may have another name."""
    site = Shop(db, idempotency=Idempotency(header="X-Request"))
    _, second = [await site.post(None, (b"x-request", b"a")) for _ in range(2)]
    assert is_replayed(second)


async def test_whose_keys_these_are(db: Database, backend: Backend) -> None:
    """Nobody gets the answer of another tenant, also not by a clever name."""

    def account(scope: Scope) -> str:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        return headers[b"account"].decode()

    site = Shop(db, idempotency=Idempotency(scope=account))
    for who, key in ((b"1", b"2"), (b"12", b"3"), (b"1", b"23"), (b"2", b"2")):
        response = await site.post(key, (b"account", who))
        assert not is_replayed(response)
    assert is_replayed(await site.post(b"23", (b"account", b"1")))
    assert [1, 2, 3, 4] == await shop.items(backend)


async def test_a_scope_that_is_no_string(db: Database, backend: Backend) -> None:
    """None would be everybody's; it is an error of the application."""
    site = Shop(db, idempotency=Idempotency(scope=lambda _: None))  # type: ignore[arg-type, return-value]
    assert isinstance((await site.post()).error, TypeError)
    assert 0 == site.runs
    assert [(0,)] == await backend.fetch(KEYS)


@on(*DATABASES)
async def test_another_table(db: Database, backend: Backend) -> None:
    """The table may have another name."""
    await create_table(backend, "keys_of_ours")
    site = Shop(db, idempotency=Idempotency(table="keys_of_ours"))
    await site.post()
    assert is_replayed(await site.post())
    assert [(0,)] == await backend.fetch(KEYS)


@on("asyncpg")
async def test_a_table_in_a_schema(db: Database, backend: Backend) -> None:
    """A name with a point is that of a table in a schema."""
    await backend.execute("CREATE SCHEMA apart")
    await backend.execute(
        "CREATE TABLE apart.done (LIKE idempotency_keys INCLUDING ALL)"
    )
    site = Shop(db, idempotency=Idempotency(table="apart.done"))
    await site.post()
    assert is_replayed(await site.post())


@on(*DATABASES)
async def test_a_table_that_is_missing(db: Database, backend: Backend) -> None:
    """The error says which table, and what makes it."""
    site = Shop(db, idempotency=Idempotency(table="nowhere"))
    error = (await site.post()).error
    assert "idempotency_table(metadata)" in "".join(getattr(error, "__notes__", ()))
    assert [] == await shop.items(backend)


@on("asyncpg", pool_size=1, max_overflow=0, pool_timeout=0.01)
async def test_a_pool_that_is_empty(db: Database) -> None:
    """That has nothing to do with a table, and nobody is told so."""
    async with db:
        await shop.insert(50)
        response = await Shop(db).post()
    assert isinstance(response.error, PoolTimeoutError)
    assert "idempotency_table" not in "".join(response.error.__notes__)


async def test_in_memory() -> None:
    """A database in memory has keys too."""
    metadata = sa.MetaData()
    uow.idempotency_table(metadata)
    async with memory_database() as db:
        async with db.engine.begin() as connection:
            await connection.run_sync(shop.Base.metadata.create_all)
            await connection.run_sync(metadata.create_all)
        site = Shop(db)
        await site.post()
        assert is_replayed(await site.post())


@on(*DATABASES)
async def test_what_observers_see(db: Database) -> None:
    """A repetition is a unit that was rolled back on purpose; `.replayed` says why."""
    site = Shop(db)
    for _ in range(2):
        await site.post()
    first, second = site.events.of(UnitFinished)
    assert Outcome.COMMITTED is first.outcome
    assert Outcome.ROLLED_BACK is second.outcome
    units = [each.unit for each in (first, second)]
    assert [False, True] == [
        isinstance(each, uow.UnitOfWork) and each.replayed for each in units
    ]


@on(*DATABASES)
async def test_delete_expired(db: Database, backend: Backend) -> None:
    """What is older than `keep` seconds goes, in as many batches as it takes."""
    site = Shop(db)
    for key in (b"old", b"new"):
        await site.post(key)
    old = int(time.time()) - 90_000
    for start in (0, 600):
        rows = ", ".join(
            f"('{n:064}', '', '', {old})" for n in range(start, start + 600)
        )
        await backend.execute(
            f"INSERT INTO idempotency_keys (id, request, run, created) VALUES {rows}"
        )
    assert 1200 == await Idempotency().delete_expired(db)
    assert 0 == await Idempotency().delete_expired(db)
    assert [(2,)] == await backend.fetch(KEYS)
    await backend.execute(f"UPDATE idempotency_keys SET created = {old}")
    assert 2 == await Idempotency(keep=86_400).delete_expired(db)
    assert not is_replayed(await site.post(b"old"))


async def test_delete_expired_inside_a_unit(db: Database) -> None:
    """It has units of its own, also inside another that has written nothing yet."""
    async with unit_of_work(db):
        assert 0 == await Idempotency().delete_expired(db)


async def test_delete_expired_of_nothing() -> None:
    """It takes a `Database`."""
    with pytest.raises(TypeError, match="Database"):
        await Idempotency().delete_expired("sqlite://")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"header": ""},
        {"header": "a b"},
        {"header": "kéy"},
        {"header": None},
        {"methods": "POST"},
        {"required": "yes"},
        {"scope": "tenant"},
        {"scope": asyncio.sleep},
        {"max_body": -1},
        {"wait": -1},
        {"keep": None},
        {"table": ""},
        {"table": 1},
    ],
)
async def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    """They are refused where they are given."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Idempotency(**options)


async def test_idempotency_that_is_none(db: Database) -> None:
    """The class in the place of an object is refused by the middleware."""
    for wrong in (Idempotency, True, "Idempotency-Key"):
        with pytest.raises(ConfigurationError, match="idempotency must be"):
            uow.UnitOfWorkMiddleware(Shop(db).serve, db, idempotency=wrong)  # type: ignore[arg-type]
