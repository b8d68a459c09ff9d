"""Waiting on a replica for what was committed on the primary."""

from __future__ import annotations

from asyncio import create_task
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from asgi_uow.database import Database
from tests.integration.cluster.conftest import KINDS, on_cluster
from tests.servers.backend import eventually
from tests.servers.plugin import server_port
from tests.support.private import _before_header, _covers, _kind, position, wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from tests.integration.cluster.servers import Cluster
    from tests.servers.backend import MariaDBBackend, SQLiteBackend
    from tests.servers.proxy import RecordingProxy

LONG = 20.0  # seconds that no test takes
DRIVERS = [("mariadb", "asyncmy"), ("postgresql", "asyncpg"), ("postgresql", "psycopg")]
FAR = {"mariadb": "0-1-99999999", "postgresql": "FFFFFF/0"}
GARBAGE = [
    "",
    "x",
    "0-1",
    "0-1-1,",
    "0-1-1;0-2-2",
    "9999999999-1-1",
    "0-1-99999999999999999999",
    "0/",
    "0/G",
    "0/123456789",
    "0/1\n",
    "' OR 1",
    "\0",
    "\ud800",
    "٣/٣",
    "9" * 5000,
]
ASKED = {"mariadb": "MASTER_GTID_WAIT", "postgresql": "pg_last_wal_replay_lsn"}


@dataclass
class Place:
    """A database on a cluster, and connections as units of work have them."""

    cluster: Cluster
    kind: str
    db: Database
    writer: AsyncConnection
    """Of the read engine on the primary."""
    replica: AsyncConnection
    proxy: RecordingProxy
    """Before the replica."""

    async def insert(self, *settings: str) -> None:
        """Commit one more row."""
        async with self.db.engine.begin() as connection:
            for setting in settings:
                await connection.execute(text(setting))
            await connection.execute(text("INSERT INTO t VALUES (1)"))

    async def count(self) -> object:
        """The number of rows on the replica."""
        return (await self.replica.execute(text("SELECT count(*) FROM t"))).scalar()

    async def reached(self, seconds: float = LONG) -> bool:
        """Wait for what is committed now."""
        where = await position(self.writer)
        assert where
        return await wait_for(self.replica, where, seconds)


@asynccontextmanager
async def on_place(
    request: pytest.FixtureRequest, kind: str, driver: str
) -> AsyncGenerator[Place, None]:
    """An empty table on a cluster; the connections have been in use before."""
    async with on_cluster(request, kind) as cluster:
        await cluster.backend.execute("CREATE TABLE t (id INTEGER)")
        await cluster.wait_until_applied()
        there = cluster.at(cluster.replicas[0], driver)
        async with there.proxy() as proxy:
            db = Database(
                create_async_engine(cluster.at(cluster.primary, driver).url),
                readers=[create_async_engine(there.through(proxy.port))],
            )
            async with (
                db.read_engine.connect() as writer,
                db.readers[0].connect() as replica,
            ):
                place = Place(cluster, kind, db, writer, replica, proxy)
                assert await place.reached()
                yield place
            await db.dispose()


@pytest.fixture(params=DRIVERS, ids=[driver for _, driver in DRIVERS])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """A primary and a replica through each driver in turn."""
    async with on_place(request, *request.param) as place:
        yield place


# Waiting


async def test_fresh(place: Place) -> None:
    """After the wait the replica has the row, time after time."""
    for number in range(1, 101):
        await place.insert()
        assert await place.reached()
        assert number == await place.count()


async def test_late(place: Place) -> None:
    """A replica that is late has an old state, and says so; later it has the row."""
    await place.cluster.stop_applier(0)
    await place.insert()
    assert not await place.reached(0)
    assert not await place.reached(0.1)
    assert not await place.reached(-1)
    assert 0 == await place.count()
    await place.cluster.start_applier(0)
    assert await place.reached()
    assert 1 == await place.count()


async def test_applied_while_waiting(place: Place) -> None:
    """A wait ends when the replica has applied what it waits for."""
    await place.cluster.stop_applier(0)
    await place.insert()
    place.proxy.clear()
    waiting = create_task(place.reached())

    async def has_asked() -> bool:
        return any(ASKED[place.kind] in trip for trip in place.proxy.trips)

    await eventually(True, has_asked)
    await place.cluster.start_applier(0)
    assert await waiting
    assert 1 == await place.count()


async def test_one_round_trip(place: Place) -> None:
    """Where the replica is up to date, the wait is one question."""
    await place.insert()
    assert await place.reached()
    place.proxy.clear()
    assert await place.reached()
    assert 1 == len(place.proxy.trips)


async def test_pauses(request: pytest.FixtureRequest) -> None:
    """PostgreSQL is asked again and again, less often the longer it takes."""
    async with on_place(request, "postgresql", "asyncpg") as place:
        place.proxy.clear()
        assert not await wait_for(place.replica, FAR["postgresql"], 0.5)
        assert 1 < len(place.proxy.trips) < 20  # every 1 ms would be 500 times


async def test_one_round_trip_on_the_writer(place: Place) -> None:
    """To ask for the position is one question."""
    there = place.cluster.at(place.cluster.primary, place.db.engine.driver)
    async with there.proxy() as proxy:
        engine = create_async_engine(there.through(proxy.port))
        db = Database(engine)
        async with db.read_engine.connect() as connection:
            first = await position(connection)
            proxy.clear()
            assert first == await position(connection)
            assert 1 == len(proxy.trips)
        await db.dispose()


async def test_unflushed(request: pytest.FixtureRequest) -> None:
    """A commit that PostgreSQL has not flushed yet is waited for as well."""
    async with on_place(request, "postgresql", "asyncpg") as place:
        await place.insert("SET LOCAL synchronous_commit = off")
        assert await place.reached()
        assert 1 == await place.count()


# Servers that need not wait


async def test_primary(place: Place) -> None:
    """The primary has what it has committed."""
    await place.insert()
    where = await position(place.writer)
    assert where
    assert await wait_for(place.writer, where, LONG)


@pytest.mark.parametrize(("kind", "driver"), DRIVERS)
async def test_promoted(pytestconfig: pytest.Config, kind: str, driver: str) -> None:
    """A replica that has become the primary does not wait for what it wrote itself."""
    server_port(pytestconfig, kind)
    promote = {
        "mariadb": ("STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only = OFF"),
        "postgresql": ("SELECT pg_promote()",),
    }
    write = {
        "mariadb": ("CREATE DATABASE d", "DROP DATABASE d"),
        "postgresql": ("CREATE TABLE t (id INTEGER)", "DROP TABLE t"),
    }
    async with KINDS[kind]() as cluster:
        backend = cluster.kind(cluster.replicas[0].port, driver)
        engine = create_async_engine(backend.admin_url, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            for statement in promote[kind] + write[kind]:
                await connection.execute(text(statement))
            where = await position(connection)
            assert where
            assert await wait_for(connection, where, LONG)
        await engine.dispose()


async def test_garbage(place: Place) -> None:
    """What is no position is never reached, and the connection goes on."""
    for garbage in GARBAGE:
        assert not await wait_for(place.replica, garbage, LONG), garbage
        assert 0 == await place.count()
    assert await place.reached()


async def test_of_another_kind(place: Place) -> None:
    """A position that another kind of database gave is never reached."""
    for kind, far in FAR.items():
        seconds = 0 if kind == place.kind else LONG
        assert not await wait_for(place.replica, far, seconds)
    assert await place.reached()


async def test_statement_limit(request: pytest.FixtureRequest) -> None:
    """A limit of MariaDB's that is shorter than the wait ends it, and no more."""
    async with on_place(request, "mariadb", "asyncmy") as place:
        await place.replica.execute(text("SET max_statement_time = 0.1"))
        assert not await wait_for(place.replica, FAR["mariadb"], LONG)
        assert await place.reached()


async def test_failure(place: Place) -> None:
    """A server that fails is no late server: the error is SQLAlchemy's own."""
    await place.cluster.stop_applier(0)
    await place.insert()
    rule = place.proxy.cut_before(lambda trip: ASKED[place.kind] in trip)
    with pytest.raises(DBAPIError) as failed:
        await place.reached()
    assert rule.fired.is_set()
    assert failed.value.connection_invalidated


# Positions


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("fill", ["page", "segment"])
async def test_full_page(
    request: pytest.FixtureRequest, driver: str, fill: str
) -> None:
    """PostgreSQL's position behind a header is not reached; the one before it is."""
    async with on_place(request, "postgresql", driver) as place:

        async def was_reached() -> list[object]:
            await {"page": fill_page, "segment": fill_segment}[fill](place)
            behind = await place.cluster.backend.scalar(
                "SELECT CAST(pg_current_wal_insert_lsn() AS text)"
            )
            before = await position(place.writer)
            return [
                str(behind)[-3:],
                str(before)[-3:],
                await wait_for(place.replica, str(before), 2),
                await wait_for(place.replica, str(behind), 0),
            ]

        header = {"page": "018", "segment": "028"}[fill]
        # Again if the server has just written something by itself.
        await eventually([header, "000", True, False], was_reached, within=LONG)


async def fill_segment(place: Place) -> None:
    """Write until a segment of PostgreSQL's log is full."""
    await place.insert()
    await place.cluster.backend.execute("SELECT pg_switch_wal()")


async def fill_page(place: Place) -> None:
    """Fill this page of PostgreSQL's log and the next, to the last byte.

    What is not text: 24 bytes of page header, 56 of the message, 40 of its COMMIT.
    """
    left = "8192 - CAST((pg_current_wal_insert_lsn() - '0/0') % 8192 AS integer)"
    size = f"{left} + 8192 - 24 - 56 - 40"
    await place.cluster.backend.execute(
        f"SELECT pg_logical_emit_message(true, '', repeat('x', {size}))"
    )


@pytest.mark.parametrize(
    ("lsn", "expected"),
    [
        ("0/3000028", "0/3000000"),
        ("0/3000018", "0/3000018"),
        ("0/3000030", "0/3000030"),
        ("0/3002018", "0/3002000"),
        ("0/3002028", "0/3002028"),
        ("0/3002020", "0/3002020"),
        ("0/3002000", "0/3002000"),
        ("0/28", "0/0"),
        ("1A/FFFFE018", "1A/FFFFE000"),
        ("1A/FF000028", "1A/FF000000"),
        ("1A/FF001018", "1A/FF001018"),
    ],
)
def test_before_header(lsn: str, expected: str) -> None:
    """Only a position that is exactly behind the header of its page moves."""
    assert expected == _before_header(lsn, 8192, 16 * 1024 * 1024)


@pytest.mark.parametrize(
    ("reached", "wanted", "expected"),
    [
        ("0-1-5", "0-1-5", True),
        ("0-1-5", "0-1-4", True),
        ("0-1-5", "0-1-6", False),
        ("0-1-10", "0-1-9", True),
        ("0-2-6", "0-1-5", True),
        ("", "0-1-1", False),
        ("0-1-5", "1-1-1", False),
        ("0-1-5,1-1-1", "1-1-1", True),
        ("0-1-5,1-1-1", "0-1-5,1-1-2", False),
        ("0-1-5,1-1-1", "1-1-1,0-1-4", True),
    ],
)
def test_covers(reached: str, wanted: str, expected: bool) -> None:
    """Every domain must be there; in one, only the sequence number counts."""
    assert expected == _covers(reached, wanted)


async def test_no_binary_log(mariadb: MariaDBBackend) -> None:
    """A MariaDB without a binary log has no position."""
    await mariadb.execute("CREATE TABLE t (id INTEGER)", "INSERT INTO t VALUES (1)")
    engine = create_async_engine(mariadb.url)
    async with engine.connect() as connection:
        assert await position(connection) is None
    await engine.dispose()


async def test_sqlite(sqlite: SQLiteBackend) -> None:
    """SQLite has no position, and nothing to wait for."""
    engine = create_async_engine(sqlite.url)
    async with engine.connect() as connection:
        assert await position(connection) is None
        assert not await wait_for(connection, "0-1-1", LONG)
        assert not await wait_for(connection, "0/1", LONG)
    await engine.dispose()


def test_mysql() -> None:
    """MySQL is told from MariaDB, whatever the URL calls it."""
    assert "mysql" == _kind(mysql.dialect())
    assert "mariadb" == _kind(mysql.dialect(is_mariadb=True))
