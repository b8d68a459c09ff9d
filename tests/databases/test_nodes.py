"""Several addresses of one database: one that takes writes is used, until it fails."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

import asgi_uow as uow
from asgi_uow import Database, Retry, errors
from tests.servers import MariaDBBackend, eventually
from tests.servers.plugin import require
from tests.servers.process import MariaDB
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import SERVER_DRIVERS, checked_out, on
from tests.support.writes import driver_connection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from tests.servers import ServerBackend

WHERE = "SELECT @@port"
READ_ONLY = "SET GLOBAL read_only = {}"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[MariaDB, MariaDB]]:
    """Two that nobody else uses: they are read-only for a while."""
    require(MariaDB)
    with closing(MariaDB()) as one, closing(MariaDB()) as other:
        one.start()
        other.start()
        yield one, other


@pytest.fixture
def mariadb_port(servers: tuple[MariaDB, MariaDB]) -> int:
    """The port of the first one."""
    return servers[0].port


@pytest.fixture
def other_server(servers: tuple[MariaDB, MariaDB]) -> MariaDB:
    """The second one."""
    return servers[1]


@asynccontextmanager
async def two_nodes(
    mariadb: MariaDBBackend, other_server: MariaDB, **options: Any
) -> AsyncGenerator[tuple[Database, MariaDBBackend, MariaDBBackend]]:
    """A database on two servers, each with a shop; the first is read-only."""
    other = MariaDBBackend(other_server.port)
    other.database = mariadb.database
    other._own_url = other.admin_url + other.database
    async with other:
        urls = [mariadb.url, mariadb.url.replace(str(mariadb.port), str(other.port))]
        db = Database.from_url(urls, **options)
        try:
            for each in (mariadb, other):
                await shop.create(each)
            await mariadb.execute(READ_ONLY.format("ON"))
            yield db, mariadb, other
        finally:
            for each in (mariadb, other):
                await each.execute(READ_ONLY.format("OFF"))
            await db.dispose()


async def places(db: Database) -> set[object]:
    """Tell which servers the sessions of a unit use."""
    async with db:
        return {await db.read.scalar(WHERE), await db.write.scalar(WHERE)}


@on("asyncmy")
async def test_the_one_that_takes_writes(
    mariadb: MariaDBBackend, other_server: MariaDB
) -> None:
    """Writes and reads go to one server, though another comes first and answers."""
    async with two_nodes(mariadb, other_server) as (db, first, second):
        assert {second.port} == await places(db)
        async with db:
            await shop.insert(1)
        assert [1] == await shop.items(second)
        assert [] == await shop.items(first)


@on("asyncmy")
async def test_a_switchover(mariadb: MariaDBBackend, other_server: MariaDB) -> None:
    """When the server has become read-only, the next unit has the other one."""
    async with two_nodes(mariadb, other_server) as (db, first, second):
        assert {second.port} == await places(db)
        await second.execute(READ_ONLY.format("ON"))
        await first.execute(READ_ONLY.format("OFF"))
        response = await handle(lambda: shop.insert(1), db)
        assert 503 == response.status
        assert {first.port} == await places(db)
        await second.execute(READ_ONLY.format("OFF"))
        assert {first.port} == await places(db)  # nobody goes back without a reason
        assert [0, 0] == checked_out(db)


@on("asyncmy")
async def test_a_switchover_with_retry(
    mariadb: MariaDBBackend, other_server: MariaDB
) -> None:
    """With `Retry` the client does not notice."""
    async with two_nodes(mariadb, other_server) as (db, first, second):
        assert {second.port} == await places(db)
        await second.execute(READ_ONLY.format("ON"))
        await first.execute(READ_ONLY.format("OFF"))
        retry = Retry(backoff=0.001)
        response = await handle(lambda: shop.insert(1), db, retry=retry)
        assert 200 == response.status
        assert [1] == await shop.items(first)


@on("asyncmy")
async def test_an_answer_that_is_doubted(
    mariadb: MariaDBBackend, other_server: MariaDB
) -> None:
    """A server that says it is not ready, and is, is used on new connections."""
    async with two_nodes(mariadb, other_server) as (db, first, second):
        assert {second.port} == await places(db)
        await first.execute(READ_ONLY.format("OFF"))
        await second.execute(
            "CREATE TRIGGER not_ready BEFORE INSERT ON items FOR EACH ROW"
            " SIGNAL SQLSTATE '08S01' SET MYSQL_ERRNO = 1047"
        )
        async with db:
            before = await driver_connection(db.read)
        response = await handle(lambda: shop.insert(1), db)
        assert 503 == response.status
        async with db:
            assert before is not await driver_connection(db.read)
        assert {second.port} == await places(db)


@on("asyncmy")
async def test_a_write_on_the_read_session(
    mariadb: MariaDBBackend, other_server: MariaDB
) -> None:
    """A mistake of one handler has nobody connect anew."""
    async with two_nodes(mariadb, other_server) as (db, _, second):
        async with db:
            with pytest.raises(errors.ReadOnlySessionError):
                await db.read.execute("INSERT INTO items (id) VALUES (1)")
            before = await driver_connection(db.write)
        async with db:
            assert before is await driver_connection(db.write)
        assert {second.port} == await places(db)


@on(*SERVER_DRIVERS)
async def test_a_frozen_server_and_a_deadline(backend: ServerBackend) -> None:
    """One that does not answer is left, also by requests that do not wait for it."""
    await shop.create(backend)
    async with backend.proxy() as first, backend.proxy() as second:
        db = Database.from_url([backend.through(each.port) for each in (first, second)])
        first.freeze()
        try:
            slow = await handle(lambda: shop.insert(1), db, deadline=1.5)
            assert 503 == slow.status
            quick = await handle(lambda: shop.insert(2), db, deadline=1.5)
            assert 200 == quick.status
        finally:
            first.thaw()
            first.cut()
        await db.dispose()
        assert [2] == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_cancelled_while_it_is_asked(backend: ServerBackend) -> None:
    """A connection of which it is not known yet whether it takes writes is closed."""
    await shop.create(backend)
    async with backend.proxy() as first, backend.proxy() as second:
        db = Database.from_url([backend.through(each.port) for each in (first, second)])
        asked = first.hold_answer(lambda trip: "recovery" in trip or "_only" in trip)
        asking = asyncio.create_task(handle(lambda: shop.insert(1), db))
        await asked.fired.wait()
        asking.cancel()
        asked.release()
        await asyncio.wait([asking])
        await eventually(0, backend.connections)
        async with db:
            await shop.insert(2)
        await db.dispose()
        assert [2] == await shop.items(backend)


def test_what_a_url_says() -> None:
    """Each server is told what its own URL says, and what holds for all."""
    urls = ["mysql://ann:secret@h1:3307/shop?unix_socket=/here", "mysql://bob@h2/shop"]
    db = Database.from_url(urls, connect_args={"connect_timeout": 2})
    nodes: Any = vars(db.engine.sync_engine)["nodes"]
    for node, (user, port) in enumerate([("ann", 3307), ("bob", None)]):
        cparams: Any = db.engine.dialect.create_connect_args(db.engine.url)[1]
        cparams["connect_timeout"] = 2
        entry = SimpleNamespace(info={"asgi_uow.node": (node, 0)})
        nodes.direct(entry, [], cparams)
        assert (user, port) == (cparams["user"], cparams.get("port"))
        assert (node == 0) == ("unix_socket" in cparams)
        assert 2 == cparams["connect_timeout"]


@on("asyncmy")
async def test_none_takes_writes(
    mariadb: MariaDBBackend, other_server: MariaDB
) -> None:
    """Where none does, that is an outage, and it is over as soon as one does again."""
    async with two_nodes(mariadb, other_server) as (db, first, second):
        await second.execute(READ_ONLY.format("ON"))
        response = await handle(lambda: shop.insert(1), db)
        assert 503 == response.status
        assert "none of the addresses takes writes" in str(response.error)
        await second.execute(READ_ONLY.format("OFF"))
        assert {second.port} == await places(db)
        assert [] == await shop.items(first)


@on(*SERVER_DRIVERS)
async def test_one_that_cannot_be_reached(backend: ServerBackend) -> None:
    """Connections go to the next address, with what a listener gives for it."""
    seen: list[int] = []
    await shop.create(backend)
    async with backend.proxy() as first, backend.proxy() as second:
        urls = [backend.through(each.port) for each in (first, second)]
        db = Database.from_url(urls)

        @event.listens_for(db.engine.sync_engine, "do_connect")
        def note(_: object, __: object, ___: object, options: dict[str, Any]) -> None:
            seen.append(int(options["port"]))

        async with db:
            await shop.insert(1)
        assert {first.port} == set(seen)
        await first.__aexit__()
        async with db:
            await shop.insert(2)
        assert second.port == seen[-1]
        assert [1, 2] == await shop.items(backend)
        await db.dispose()


@on(*SERVER_DRIVERS)
async def test_no_address_answers(backend: ServerBackend) -> None:
    """What the last of them says is raised."""
    async with backend.proxy() as first, backend.proxy() as second:
        urls = [backend.through(each.port) for each in (first, second)]
    db = Database.from_url(urls)
    response = await handle(lambda: shop.insert(1), db)
    assert 503 == response.status
    assert isinstance(response.error, OperationalError | OSError)
    await db.dispose()


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "url must be a URL, or a list of URLs"),
        (["mysql://h/d", "postgres://h/d"], "servers of one database"),
        (["postgres://h/d", "postgresql+psycopg://h/d"], "with one driver"),
        (["sqlite:///a.db", "sqlite:///b.db"], "servers of one database"),
        (7, "url must be a URL, or a list of URLs"),
        (["postgres://h/d", "postgres://i/d"], "not with resolve_unknown"),
    ],
)
def test_what_cannot_be(urls: Any, message: str) -> None:
    """Addresses that cannot be of one database are refused."""
    with pytest.raises(errors.ConfigurationError, match=message):
        Database.from_url(urls, resolve_unknown=True)


def test_one_in_a_list() -> None:
    """A list of one is that one."""
    assert "sqlite+aiosqlite:///a.db" == Database.from_url(["sqlite:///a.db"]).name
    assert uow.in_unit_of_work() is False
