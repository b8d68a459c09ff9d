"""The servers, databases and proxies that the other tests look at the world with."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

import anyio.to_thread
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from tests.servers import (
    MariaDB,
    MariaDBBackend,
    PostgreSQL,
    PostgreSQLBackend,
    RecordingProxy,
    ServerError,
    eventually,
)
from tests.servers.pgbouncer import PgBouncer
from tests.servers.plugin import RunningServers, require, server_port
from tests.servers.process import free_port, is_free
from tests.servers.proxy import mysql_chunks, postgresql_chunks
from tests.support import ROOT
from tests.support.databases import DATABASES, DRIVERS, SERVERS, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from tests.servers import Backend, Server, ServerBackend, SQLiteBackend
    from tests.servers.proxy import Chunk

pytestmark = on(*DRIVERS)

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY)"
INSERT = "INSERT INTO t VALUES (1)"
COUNT = "SELECT count(*) FROM t"
CUT = (DBAPIError, OSError)  # asyncpg's own ConnectionError may come through


@pytest.fixture(params=[MariaDB, PostgreSQL])
def kind(request: pytest.FixtureRequest) -> type[Server]:
    """Each kind of server; one that is not there is skipped."""
    server_port(request.config, request.param.name)
    return request.param  # type: ignore[no-any-return]


BACKENDS: dict[type[Server], type[ServerBackend]] = {
    MariaDB: MariaDBBackend,
    PostgreSQL: PostgreSQLBackend,
}


@asynccontextmanager
async def client(url: str) -> AsyncGenerator[AsyncConnection, None]:
    """A connection as the library's users have one."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


# Servers


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_restart(kind: type[Server], end: str) -> None:
    """Committed rows are there after a restart, even after a crash."""
    with kind() as server:
        pid = server.pid
        async with BACKENDS[kind](server.port) as backend:
            await backend.execute(CREATE, INSERT)
            getattr(server, end)()
            assert is_free(server.port)
            await anyio.to_thread.run_sync(server.start)
            assert 1 == await backend.scalar(COUNT)
        assert pid != server.pid
    assert not server.folder.exists()


async def test_outlived_by_a_backend(postgresql_port: int) -> None:
    """PostgreSQL starts again as soon as the last process of its past is gone."""
    with PostgreSQL() as server:
        backend = PostgreSQLBackend(server.port)
        async with backend, client(backend.url) as connection:
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGSTOP)
            server.kill()
            async with asyncio.TaskGroup() as group:
                group.create_task(anyio.to_thread.run_sync(server.start))

                async def has_refused() -> bool:
                    return "still in use" in server.log()

                await eventually(True, has_refused)
                os.kill(pid, signal.SIGCONT)
            with pytest.raises(CUT):
                await connection.execute(text("SELECT 1"))
            await connection.invalidate()


def test_refuses_its_options(mariadb_port: int) -> None:
    """A server that does not start says why, and leaves nothing behind."""
    server = MariaDB("--no-such-option")
    with pytest.raises(ServerError, match="unknown option '--no-such-option'"):
        server.__enter__()
    assert not server.folder.exists()


def test_cannot_make_its_data(postgresql_port: int) -> None:
    """A server that cannot make its data folder says why."""
    server = PostgreSQL()
    server.data = server.folder / "log" / "data"
    with pytest.raises(ServerError, match="Not a directory"):
        server.__enter__()


def test_never_answers(mariadb_port: int) -> None:
    """A server that runs and does not answer is given up and ended."""

    class Mute(MariaDB):
        boot_seconds = 0.0

    server = Mute()
    with pytest.raises(ServerError):
        server.__enter__()
    assert server.pid is None


def test_does_not_stop(postgresql_port: int) -> None:
    """A server that does not stop in time is killed."""

    class Stubborn(PostgreSQL):
        stop_seconds = 0.01

    with Stubborn() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        server.stop()
        assert server.pid is None


class NotInstalled(MariaDB):
    binaries: ClassVar[tuple[str, ...]] = ("no-such-database-server",)


class BehindNothing(PgBouncer):
    binaries: ClassVar[tuple[str, ...]] = ()
    behind = "mariadb"


def test_installation_is_tried() -> None:
    """A server that is not installed, and cannot be, has no port."""
    asked: list[type[Server]] = []
    servers = RunningServers({}, {"mariadb": NotInstalled}, asked.append)
    assert {"mariadb": None} == servers.ports()
    assert [NotInstalled] == asked


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_what_a_test_starts_by_itself(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    """It is installed; where it cannot be, tests are skipped, and in CI fail."""
    monkeypatch.setenv("CI", ci)
    asked: list[type[Server]] = []
    require(BehindNothing, asked.append)
    assert [] == asked
    with pytest.raises(outcome, match="mariadb is not installed"):
        require(NotInstalled, asked.append)
    assert [NotInstalled] == asked


def test_pooler_without_its_server() -> None:
    """A pooler that has no server to stand in front of has no port."""
    kinds: dict[str, type[Server]] = {"mariadb": NotInstalled, "pooler": BehindNothing}
    asked: list[type[Server]] = []
    servers = RunningServers({}, kinds, asked.append)
    assert {"mariadb": None, "pooler": None} == servers.ports()


def test_one_server_per_run(postgresql_port: int) -> None:
    """A server is started when first asked for, and once."""
    servers = RunningServers({})
    try:
        port = servers.port("postgresql")
        assert port == servers.port("postgresql")
        assert port is not None
        assert not is_free(port)
    finally:
        servers.stop()
    assert is_free(port)


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", "skipped"), ("true", "errors")], ids=["desk", "ci"]
)
def test_without_a_server(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str
) -> None:
    """Tests without their server are skipped and counted aloud; in CI they fail."""
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest(
        """
        import pytest
        from tests.servers.plugin import SERVERS, RunningServers

        pytest_plugins = ["tests.servers.plugin"]

        @pytest.hookimpl(trylast=True)
        def pytest_configure(config):
            missing = {"mariadb": None, "postgresql": None}
            config.stash[SERVERS] = RunningServers(missing)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.on("aiosqlite", "asyncmy", "asyncpg", "psycopg")
        async def test_any(backend): pass
        """
    )
    result = pytester.runpytest_inprocess("-o", "anyio_mode=auto")
    result.assert_outcomes(passed=1, **{outcome: 3})
    title = "*!!! 3 tests did not run: their database server is not installed !!!*"
    shown = any(line.strip("! ") == title.strip("*! ") for line in result.outlines)
    assert shown == (outcome == "skipped")


def test_databases_that_are_asked_for(pytester: pytest.Pytester) -> None:
    """`--db sqlite` runs what SQLite is enough for, and starts no server."""
    pytester.makeconftest("pytest_plugins = ['tests.servers.plugin']")
    pytester.makepyfile(
        """
        from tests.servers.plugin import server_port

        async def test_each(backend): pass
        async def test_one(mariadb): pass
        def test_without(): pass
        def test_late(pytestconfig): server_port(pytestconfig, "postgresql")
        """
    )
    result = pytester.runpytest_inprocess("-o", "anyio_mode=auto", "--db", "sqlite")
    result.assert_outcomes(passed=2, skipped=1, deselected=3)


def test_databases_behind_pgbouncer(pytester: pytest.Pytester) -> None:
    """`--db pgbouncer` has what runs on PostgreSQL run behind PgBouncer."""
    pytester.makeconftest("pytest_plugins = ['tests.servers.plugin']")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.on("aiosqlite", "asyncmy", "asyncpg", "psycopg", "asyncpg@1")
        async def test_each(backend):
            assert "transaction" == backend.options["pooler"]
            assert 1 == await backend.scalar("SELECT 1")

        @pytest.mark.direct
        async def test_direct(backend): pass
        async def test_one(postgresql): pass
        """
    )
    result = pytester.runpytest_inprocess("-o", "anyio_mode=auto", "--db", "pgbouncer")
    result.assert_outcomes(passed=2, deselected=7)


@pytest.mark.usefixtures("postgresql_port")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_run_is_interrupted(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A test run that is interrupted or terminated stops its servers."""
    pytester.makeconftest("pytest_plugins = ['tests.servers.plugin']")
    pytester.makepyfile(
        """
        import asyncio, pathlib, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def test_wait(postgresql):
            pathlib.Path("port.new").write_text(str(postgresql.port))
            pathlib.Path("port.new").rename("port")
            await asyncio.Event().wait()
        """
    )
    port = pytester.path / "port"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "pytest", "-o", "anyio_mode=auto"]
    with pytester.popen(command, stdin=subprocess.DEVNULL) as run:

        async def is_running() -> bool:
            return port.exists()

        try:
            await eventually(True, is_running, within=30)
        finally:
            run.send_signal(number)
            run.communicate(timeout=30)
    assert pytest.ExitCode.INTERRUPTED == run.returncode
    assert is_free(int(port.read_text()))


# Databases


@on(*DATABASES)
async def test_empty(backend: Backend) -> None:
    """Each test has a database that nobody has used."""
    await backend.execute(CREATE)
    assert 0 == await backend.scalar(COUNT)


async def test_statements(backend: Backend) -> None:
    """What was executed is seen by the next connection; names are parameters."""
    await backend.execute(CREATE, INSERT, "INSERT INTO t VALUES (2)")
    assert [(2,)] == await backend.fetch("SELECT id FROM t WHERE id > :i", i=1)
    assert 2 == await backend.scalar(COUNT)


async def test_url(backend: Backend) -> None:
    """The URL names the driver and reaches the database of the test."""
    assert f"+{backend.driver}://" in backend.url
    await backend.execute(CREATE)
    async with client(backend.url) as connection:
        await connection.execute(text(INSERT))
        await connection.commit()
    assert 1 == await backend.scalar(COUNT)


async def test_open_transactions(backend: Backend) -> None:
    """Somebody else's transaction is open from its first statement to its end."""
    await backend.execute(CREATE)
    assert 0 == await backend.open_transactions()
    async with client(backend.url) as connection:
        for number in range(5):  # no cache answers
            await connection.execute(text(f"INSERT INTO t VALUES ({number})"))
            assert 1 == await backend.open_transactions()
            await connection.commit()
            assert 0 == await backend.open_transactions()


@on(*SERVERS)
async def test_open_read_transactions(backend: ServerBackend) -> None:
    """A transaction that only reads counts; other databases' ones do not."""
    await backend.execute(CREATE)
    other = type(backend)(backend.port)
    async with client(backend.url) as connection, other:
        await connection.execute(text(COUNT))
        assert 1 == await backend.open_transactions()
        assert 0 == await other.open_transactions()
        assert 0 == await other.connections()


async def test_open_aborted_transaction(postgresql: PostgreSQLBackend) -> None:
    """A transaction that PostgreSQL has aborted is open until it is rolled back."""
    async with client(postgresql.url) as connection:
        with pytest.raises(DBAPIError):
            await connection.execute(text("SELECT 1/0"))
        assert 1 == await postgresql.open_transactions()
        await connection.rollback()
        assert 0 == await postgresql.open_transactions()


async def test_ordinary_user(mariadb: MariaDBBackend) -> None:
    """On MariaDB tests are not the administrator, whom read_only does not bind."""
    async with client(mariadb.url) as connection:
        with pytest.raises(DBAPIError, match="Access denied"):
            await connection.execute(text("SET GLOBAL read_only = 1"))


@on(*SERVERS)
async def test_kill_connections(backend: ServerBackend) -> None:
    """The server has ended the connections of others when the call returns."""
    async with client(backend.url) as connection:
        await connection.execute(text("SELECT 1"))
        assert 1 == await backend.connections()
        await backend.kill_connections()
        assert 0 == await backend.connections()
        with pytest.raises(CUT):
            await connection.execute(text("SELECT 1"))
        await connection.invalidate()


@on(*SERVERS)
async def test_dropped_while_in_use(backend: ServerBackend) -> None:
    """A database goes away at the end, whatever is open in it."""
    other = type(backend)(backend.port)
    async with AsyncExitStack() as stack:
        async with other:
            await other.execute(CREATE)
            connection = await stack.enter_async_context(client(other.url))
            await connection.execute(text(INSERT))
        await connection.invalidate()
    with pytest.raises(Exception, match=r"does not exist|Unknown database"):
        await other.scalar("SELECT 1")


async def test_sqlite_file_is_removed(sqlite: SQLiteBackend) -> None:
    """A database file goes away at the end, with what belongs to it."""
    async with sqlite:
        await sqlite.execute("PRAGMA journal_mode=WAL", CREATE)
        assert sqlite.path.exists()
    assert [] == list(sqlite.path.parent.iterdir())


@on(*SERVERS)
async def test_through(backend: ServerBackend) -> None:
    """The URL through a proxy differs by the port alone."""
    here = backend.url.replace(f":{backend.port}/", ":1/")
    assert here == backend.through(1)


async def test_sqlite_has_no_port(sqlite: SQLiteBackend) -> None:
    """There is no proxy to a file."""
    with pytest.raises(ValueError, match="SQLite has no server"):
        sqlite.through(1)


async def test_not_eventually() -> None:
    """Waiting for a fact ends, and fails if it does not come true."""

    async def two() -> int:
        return 2

    with pytest.raises(AssertionError):
        await eventually(1, two, within=0.01)


# Proxies


def is_commit(trip: str) -> bool:
    return trip == "COMMIT"


@asynccontextmanager
async def table_behind(
    backend: ServerBackend, *, delay_ms: float = 0
) -> AsyncGenerator[tuple[RecordingProxy, AsyncConnection], None]:
    """A proxy, and a client of it that has connected."""
    await backend.execute(CREATE)
    async with (
        backend.proxy(delay_ms=delay_ms) as proxy,
        client(backend.through(proxy.port)) as connection,
    ):
        await connection.rollback()
        proxy.clear()
        yield proxy, connection


@on(*SERVERS)
async def test_trips(backend: ServerBackend) -> None:
    """The proxy records what the client sends and waits for."""
    async with table_behind(backend) as (proxy, connection):
        await connection.execute(text(INSERT))
        await connection.commit()
        expected = {
            "mariadb": [INSERT, "COMMIT"],
            "postgresql": ["BEGIN", f"PREPARE {INSERT}", INSERT, "COMMIT"],
        }
        assert expected[backend.name] == proxy.trips
        assert 1 == proxy.connections


async def test_psycopg_trips(postgresql: PostgreSQLBackend) -> None:
    """psycopg prepares nothing at first: the statement is one trip."""
    backend = PostgreSQLBackend(postgresql.port, "psycopg")
    async with backend, table_behind(backend) as (proxy, connection):
        await connection.execute(text(INSERT))
        await connection.commit()
        assert ["BEGIN", INSERT, "COMMIT"] == proxy.trips


@on(*SERVERS)
async def test_cut_before(backend: ServerBackend) -> None:
    """A trip that is cut before the server has no effect; the others go on."""
    async with table_behind(backend) as (proxy, connection):
        rule = proxy.cut_before(is_commit)
        await connection.execute(text(INSERT))
        assert not rule.fired.is_set()
        with pytest.raises(CUT):
            await connection.commit()
        assert rule.fired.is_set()
        assert 0 == await backend.scalar(COUNT)
        await connection.invalidate()


@on(*SERVERS)
async def test_cut_after(backend: ServerBackend) -> None:
    """A trip that is cut after the server has its effect, the client an error."""
    async with table_behind(backend) as (proxy, connection):
        rule = proxy.cut_after(is_commit)
        await connection.execute(text(INSERT))
        with pytest.raises(CUT):
            await connection.commit()
        assert rule.fired.is_set()
        assert 1 == await backend.scalar(COUNT)
        await connection.invalidate()


@on(*SERVERS)
async def test_rules_fire_once(backend: ServerBackend) -> None:
    """After a cut the next connection passes."""
    async with backend.proxy() as proxy:
        url = backend.through(proxy.port)
        proxy.cut_before(lambda trip: trip == "SELECT 42")
        async with client(url) as connection:
            with pytest.raises(CUT):
                await connection.execute(text("SELECT 42"))
            await connection.invalidate()
        async with client(url) as connection:
            assert 42 == await connection.scalar(text("SELECT 42"))
        assert proxy.connections >= 2


@on(*SERVERS)
async def test_hold_answer(backend: ServerBackend) -> None:
    """While an answer is held the server has done its work, the client waits."""
    async with table_behind(backend) as (proxy, connection):
        hold = proxy.hold_answer(is_commit)
        await connection.execute(text(INSERT))
        commit = asyncio.create_task(connection.commit())
        await hold.answered.wait()
        assert hold.fired.is_set()
        assert 1 == await backend.scalar(COUNT)
        assert not commit.done()
        hold.release()
        await commit


@on(*SERVERS)
async def test_cut_while_held(backend: ServerBackend) -> None:
    """A held answer that is cut never comes."""
    async with table_behind(backend) as (proxy, connection):
        hold = proxy.hold_answer(is_commit)
        await connection.execute(text(INSERT))
        commit = asyncio.create_task(connection.commit())
        await hold.answered.wait()
        proxy.cut()
        with pytest.raises(CUT):
            await commit
        await connection.invalidate()


@on(*SERVERS)
async def test_delay(backend: ServerBackend) -> None:
    """A delayed trip takes the delay twice: there and back."""
    async with table_behind(backend, delay_ms=10) as (_, connection):
        start = time.monotonic()
        await connection.execute(text("SELECT 1"))
        assert time.monotonic() - start >= 0.02


async def test_server_is_down() -> None:
    """A proxy to a server that is down closes the connection."""
    async with RecordingProxy("mariadb", free_port()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert b"" == await reader.read()
        writer.close()
        await writer.wait_closed()


def mysql(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


def postgresql_message(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + (len(payload) + 4).to_bytes(4) + payload


STARTUP = [b"\0\0\0\x08\x04\xd2\x16\x2f", b"\0\0\0\x09\0\3\0\0\0"]
PARSE = postgresql_message(b"P", b"s\0SELECT 1;\0\0\0")
BIND = postgresql_message(b"B", b"\0s\0\0\0\0\0\0\0")
EXECUTE = postgresql_message(b"E", b"\0\0\0\0\0")
FLUSH, SYNC = postgresql_message(b"H"), postgresql_message(b"S")
TERMINATE = postgresql_message(b"X")


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        ([mysql(1, b"login"), mysql(3, b"password")], [None, None]),
        ([mysql(0, b"\x03SELECT 1;")], ["SELECT 1"]),
        ([mysql(0, b"\x0e")], ["PING"]),
        ([mysql(0, b"\x02test")], ["INIT_DB test"]),
        ([mysql(0, b"\x16SELECT ?")], ["PREPARE SELECT ?"]),
        ([mysql(0, b"\x09")], ["COM_9"]),
        ([mysql(0, b"\x01")], [None]),
    ],
)
async def test_mysql_protocol(packets: list[bytes], expected: list[str | None]) -> None:
    """Command packets are trips; logging in and saying goodbye are not."""
    assert list(zip(packets, expected, strict=True)) == await parse(
        mysql_chunks, packets
    )


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([postgresql_message(b"p", b"password\0")], [None]),
        ([postgresql_message(b"Q", b"COMMIT;\0")], ["COMMIT"]),
        ([PARSE + BIND + EXECUTE + SYNC], ["SELECT 1"]),
        ([PARSE + FLUSH, BIND + EXECUTE + SYNC], ["PREPARE SELECT 1", "SELECT 1"]),
        (
            [PARSE + SYNC, BIND + BIND + SYNC],
            ["PREPARE SELECT 1", "SELECT 1; SELECT 1"],
        ),
        ([SYNC, TERMINATE], ["SYNC", None]),
        ([FLUSH], [None]),
    ],
)
async def test_postgresql_protocol(
    messages: list[bytes], expected: list[str | None]
) -> None:
    """Query, Sync and Flush are trips; what they wait for gives the name."""
    chunks = await parse(postgresql_chunks, STARTUP + messages)
    assert [(data, None) for data in STARTUP] == chunks[:2]
    assert list(zip(messages, expected, strict=True)) == chunks[2:]


async def parse(
    chunks: Callable[[asyncio.StreamReader], AsyncIterator[Chunk]], data: list[bytes]
) -> list[Chunk]:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join(data))
    reader.feed_eof()
    found: list[Chunk] = []
    with suppress(asyncio.IncompleteReadError):  # after the last one
        async for chunk in chunks(reader):
            found.append(chunk)  # noqa: PERF401 - kept when reading ends
    return found
