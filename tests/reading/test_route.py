"""Replicas as an application sees them; the servers here only play their part.

What needs servers that replicate is in tests/integration/cluster.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import DeadlineExceededError, ReadOnlySessionError
from asgi_uow.observers import (
    LoggingObserver,
    ReaderBehind,
    ReaderFailed,
    ReaderRestored,
)
from tests.servers import SQLiteBackend
from tests.servers.process import HOST
from tests.support import shop
from tests.support.asgi import BODY, START, serve
from tests.support.databases import DATABASES, DRIVERS, SERVERS, checked_out, on
from tests.support.private import (
    LONGEST_PAUSE,
    READ_FROM_WRITER,
    Replica,
    by_free_connections,
    code_of,
)
from tests.support.site import Site, down, prolong_pauses, site_with

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from asgi_uow._asgi import Receive, Scope, Send
    from asgi_uow.observers import Event
    from tests.servers.backend import (
        Backend,
        MariaDBBackend,
        PostgreSQLBackend,
        ServerBackend,
    )

pytestmark = on(*DRIVERS)

CAUSAL = uow.CausalReads("a secret of the tests, long enough")


async def test_reads_from_a_reader(site: Site) -> None:
    """The read session uses the reader, and not the read engine of the writer."""
    assert 200 == (await site.get()).status
    assert [0] == site.found
    assert [True] == site.used()
    assert 0 == site.db.read_engine.sync_engine.pool.checkedin()  # type: ignore[attr-defined]
    assert [0, 0] == checked_out(site.db)


async def test_a_deadline(backend: Backend) -> None:
    """A read on a replica ends with its unit's; that says nothing about the replica."""
    async with site_with(backend, backend.url, pool_size=1, max_overflow=0) as site:
        [replica] = site.db.readers
        async with replica.connect():
            with pytest.raises(DeadlineExceededError):
                async with uow.unit_of_work(site.db, deadline=0.3):
                    await site.db.read.scalar(shop.COUNT)
        assert site.db.replicas[0].is_healthy
        async with uow.unit_of_work(site.db, deadline=30):
            assert 0 == await site.db.read.scalar(shop.COUNT)


@on(*DATABASES)
async def test_moves_on_when_a_reader_is_down(backend: ServerBackend) -> None:
    """A reader that cannot be reached is done without, and left alone for a while."""
    async with site_with(backend, down(backend), backend.url) as site:
        for _ in range(8):
            assert 200 == (await site.get()).status
            prolong_pauses(site.db)
        assert 1 >= site.told(ReaderFailed)
        assert [0, 0, 0] == checked_out(site.db)


@on(*SERVERS)
@pytest.mark.parametrize(
    "options", [{"poolclass": NullPool}, {"pool_size": 1, "max_overflow": 0}]
)
async def test_a_reader_that_does_not_answer(
    backend: ServerBackend, options: dict[str, Any]
) -> None:
    """It is waited for once, whatever its pool, and then left alone."""
    with socket.create_server((HOST, 0)) as silent:
        url = backend.through(silent.getsockname()[1])
        async with site_with(backend, url, **options) as site:
            assert 200 == (await site.get()).status
            assert 1 == site.told(ReaderFailed)
            assert [0] == site.found


@on(*DATABASES)
async def test_no_reader_is_up(backend: ServerBackend) -> None:
    """Without a reader the writer's server is read, by all sessions of the unit."""
    async with site_with(backend, down(backend)) as site:

        async def handler() -> None:
            await site.read()
            await site.read()
            async with uow.parallel_read() as session:
                site.found.append(await session.scalar(shop.COUNT))

        assert 200 == (await site.send(handler)).status
        assert 1 == site.told(ReaderFailed)
        assert [0, 0, 0] == site.found
        # The next request does not even try.
        prolong_pauses(site.db)
        assert 200 == (await site.get()).status
        assert 1 == site.told(ReaderFailed)


@on(*SERVERS)
async def test_tried_by_one_request(backend: ServerBackend) -> None:
    """When the pause is over one request tries; a cancelled one lets the next try."""
    with socket.create_server((HOST, 0)) as silent:
        url = backend.through(silent.getsockname()[1])
        async with site_with(backend, url) as site:
            [replica] = site.db.replicas
            replica.failures = 1
            trying = asyncio.Event()

            def note(*_: object) -> None:
                trying.set()

            event.listen(replica.engine.sync_engine, "do_connect", note)
            task = asyncio.create_task(site.get())
            await trying.wait()
            assert 200 == (await site.get()).status
            assert not task.done()
            task.cancel()
            await asyncio.wait((task,))
            assert replica.is_healthy
            assert [0] == site.found
            assert 0 == site.told(ReaderFailed)
            assert [0, 0] == checked_out(site.db)


async def test_used_again(site: Site) -> None:
    """A reader that is up again when its pause is over is used, and that is told."""
    [replica] = site.db.replicas
    assert replica.trip() is not None
    assert replica.trip() is None
    await site.get()
    assert [False] == site.used()
    replica.open_until = 0.0
    await site.get()
    assert [True] == site.used()
    assert 1 == site.told(ReaderRestored)
    assert 0 == replica.failures


async def test_pauses(backend: Backend) -> None:
    """Each pause may be twice as long as the one before, up to half a minute."""
    replica = Replica(create_async_engine(backend.url, poolclass=NullPool))
    assert 0 == replica.free
    pauses = set()
    for longest in (0.5, 1, 2, 4, 8, 16, *[LONGEST_PAUSE] * 2000):
        replica.open_until = 0.0
        seconds = replica.trip()
        assert seconds is not None
        assert longest / 2 <= seconds <= longest
        pauses.add(seconds)
    assert len(pauses) > 1000  # no two processes come back at the same moment


async def test_the_least_busy_first(sqlite: SQLiteBackend) -> None:
    """Readers are tried in the order of the connections they have to give."""
    busy, idle, open_ended = (
        Replica(create_async_engine(sqlite.url, pool_size=2, max_overflow=more))
        for more in (0, 0, -1)
    )
    async with busy.engine.connect():
        assert [open_ended, idle, busy] == by_free_connections([busy, idle, open_ended])
        open_ended.trip()
        assert [idle, busy] == by_free_connections([busy, idle, open_ended])
    for replica in (busy, idle, open_ended):
        await replica.engine.dispose()


async def test_errors_of_statements_are_no_outage(site: Site) -> None:
    """What the server says about a statement is the handler's to see."""

    async def handler() -> None:
        await uow.current_read_session().execute("SELECT nothing FROM nowhere")

    response = await site.send(handler)
    assert response.error is not None
    assert 0 == site.told(ReaderFailed)


async def test_wrong_password(postgresql: PostgreSQLBackend) -> None:
    """A reader that refuses the login is a mistake, not an outage: it is raised."""
    url = postgresql.url.replace("postgres@", "nobody_knows_me@")
    async with site_with(postgresql, url) as site:
        response = await site.get()
    assert response.error is not None
    assert 0 == site.told(ReaderFailed)


async def test_lost_during_the_first_read(site: Site, backend: Backend) -> None:
    """A reader that is lost before it has answered is done without."""
    engine = site.db.readers[0].sync_engine
    lost = backend.name != "sqlite"
    statements: list[str] = []

    def lose(*args: Any) -> None:
        statements.append(args[2])
        raise ConnectionResetError

    event.listen(engine, "before_cursor_execute", lose)
    response = await site.get()

    assert 200 == response.status
    assert [shop.COUNT] == statements
    assert 1 == site.told(ReaderFailed)
    assert lost or [0] == site.found


async def test_lost_after_a_read(site: Site) -> None:
    """Once something was read nobody else is asked: it might not go together."""
    engine = site.db.readers[0].sync_engine

    async def handler() -> None:
        await site.read()

        def lose(*_: object) -> None:
            raise ConnectionResetError

        event.listen(engine, "before_cursor_execute", lose)
        await site.read()

    response = await site.send(handler)

    assert 503 == response.status
    assert 0 == site.told(ReaderFailed)


async def test_lost_by_two_tasks(site: Site) -> None:
    """A task that is late to lose the reader goes where the other one has read."""
    both, one_has_read = asyncio.Event(), asyncio.Event()
    order = iter((both, one_has_read))

    def lose(*_: object) -> None:
        awaited = next(order)
        if awaited is one_has_read:
            both.set()
        await_only(awaited.wait())
        raise ConnectionResetError

    async def read() -> None:
        async with uow.parallel_read() as session:
            site.found.append(await session.scalar(shop.COUNT))
            prolong_pauses(site.db)
            one_has_read.set()

    event.listen(site.db.readers[0].sync_engine, "before_cursor_execute", lose)
    response = await site.send(lambda: asyncio.gather(read(), read()))

    assert 200 == response.status
    assert [0, 0] == site.found
    assert 1 == site.told(ReaderFailed)
    assert 0 == site.told(ReaderRestored)


async def test_in_the_way_everywhere(postgresql: PostgreSQLBackend) -> None:
    """A read that each replica stops ends on the writer; none is tried twice."""
    await postgresql.execute(
        "CREATE FUNCTION conflict() RETURNS integer LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"
    )
    async with site_with(postgresql, postgresql.url, postgresql.url) as site:
        asked: list[str] = []

        def note(connection: Connection, *_: object) -> None:
            asked.append(names[connection.engine])

        engines = (site.db.read_engine, *site.db.readers)
        servers = zip(engines, ("writer", "a", "b"), strict=True)
        names = {engine.sync_engine: name for engine, name in servers}
        for engine in names:
            event.listen(engine, "before_cursor_execute", note)

        async def handler() -> None:
            await uow.current_read_session().execute("SELECT conflict()")

        response = await site.send(handler)

    assert "40001" == code_of(response.error)
    assert ["a", "b", "writer"] == [*sorted(asked[:2]), *asked[2:]]
    assert 0 == site.told(ReaderFailed)


async def test_after_a_write(site: Site) -> None:
    """Reads after a write are the writer's, in the transaction and after it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        await site.read()
        uow.after_commit(site.read)
        await send({"type": START, "status": 200, "headers": []})
        await site.read()
        await send({"type": BODY, "body": b""})

    response = await serve(app, site.db)
    assert response.error is None
    assert [1, 1, 1] == site.found
    assert [False] == site.used()


async def test_each_does_its_own(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Reads go to the replica, which refuses writes; writes to the writer."""
    await shop.create(backend)
    await backend.execute("INSERT INTO items (id) VALUES (1)")
    replica = create_async_engine(backend.url)
    async with SQLiteBackend(tmp_path_factory.mktemp("writer")) as writer:
        await shop.create(writer)
        db = Database(create_async_engine(writer.url), readers=[replica])
        async with db as unit:
            assert [1] == (await db.read.scalars(shop.SELECT)).all()
            with pytest.raises(ReadOnlySessionError):
                await db.read.execute("DELETE FROM items")
            assert unit.session() is db.write
            await shop.insert(2)
        assert (replica,) == db.readers
        await db.dispose()
        assert [1] == await shop.items(backend)
        assert [2] == await shop.items(writer)


# Causal reads


def cookie(positions: dict[str, str], causal_reads: uow.CausalReads = CAUSAL) -> bytes:
    """Make a cookie as a response would set it."""
    _, value = causal_reads.response_header(positions, secure=False)
    return value.partition(b";")[0]


async def insert_one() -> None:
    await shop.insert(1)


async def test_stamped(backend: Backend) -> None:
    """The response to a write carries a token, on https a secure one."""
    async with site_with(backend, backend.url, causal_reads=CAUSAL) as site:
        response = await site.send(insert_one)
    assert response.cookie.startswith(b"asgi_uow=")
    assert "Secure" in response.headers["set-cookie"]


async def test_what_was_known_before(sqlite: SQLiteBackend) -> None:
    """A new token keeps what the client's last one says of other databases."""
    async with site_with(sqlite, sqlite.url, causal_reads=CAUSAL) as site:
        response = await site.send(insert_one, cookie=cookie({"another": "0/1"}))
    expected = {"another": "0/1", CAUSAL.names(site.db)[0]: READ_FROM_WRITER}
    assert expected == CAUSAL.positions([(b"cookie", response.cookie)])


async def test_not_stamped(backend: Backend) -> None:
    """Neither a read nor work that was not kept is stamped; forced work is."""

    async def insert_by_force() -> None:
        await shop.insert(2)
        uow.force_commit()

    async with site_with(backend, backend.url, causal_reads=CAUSAL) as site:
        assert b"" == (await site.send(site.read)).cookie
        assert b"" == (await site.send(insert_one, 409)).cookie
        assert b"" != (await site.send(insert_by_force, 403)).cookie


async def test_nothing_to_wait_for(backend: Backend) -> None:
    """Without replicas there is no token, and no connection that one waits for."""
    options = {"pool_size": 1, "max_overflow": 0}
    async with (
        site_with(backend, causal_reads=CAUSAL, **options) as site,
        site.db.read_engine.connect(),
    ):
        assert b"" == (await site.send(insert_one)).cookie


async def test_read_with_a_token(backend: Backend) -> None:
    """The next read waits for the position, or goes to the writer's server."""
    async with site_with(backend, backend.url, causal_reads=CAUSAL) as site:
        token = (await site.send(insert_one)).cookie

        async def read_twice() -> None:
            await site.read()
            await site.read()

        response = await site.send(read_twice, cookie=token)

        assert 200 == response.status
        assert [1, 1] == site.found
        # A PostgreSQL that is no replica has what it has; the others give no position.
        assert [backend.name == "postgresql"] == site.used()


async def test_too_far_behind(postgresql: PostgreSQLBackend) -> None:
    """A reader that does not get there in time is done without, and that is told."""
    async with site_with(postgresql, postgresql.url, causal_reads=CAUSAL) as site:
        nonsense = cookie({CAUSAL.names(site.db)[0]: "nonsense"})
        assert 200 == (await site.send(site.read, cookie=nonsense)).status
    assert 1 == site.told(ReaderBehind)
    assert [0] == site.found


async def test_hooks_see_what_their_request_must_see(
    postgresql: PostgreSQLBackend,
) -> None:
    """A hook that reads waits for what the client has written before."""
    async with site_with(postgresql, postgresql.url, causal_reads=CAUSAL) as site:

        async def handler() -> None:
            uow.after_commit(site.read)

        nonsense = cookie({CAUSAL.names(site.db)[0]: "nonsense"})
        assert 200 == (await site.send(handler, cookie=nonsense)).status
    assert 1 == site.told(ReaderBehind)
    assert [0] == site.found


async def test_one_wait_for_all_readers(mariadb: MariaDBBackend) -> None:
    """The seconds are for all readers together: the second is only asked."""
    causal = uow.CausalReads("a secret of the tests, long enough", wait=0.05)
    waits: list[str] = []

    def note(*args: Any) -> None:
        waits.extend(["wait"] * ("GTID_WAIT" in args[2]))

    async with site_with(
        mariadb, mariadb.url, mariadb.url, causal_reads=causal
    ) as site:
        for reader in site.db.readers:
            event.listen(reader.sync_engine, "before_cursor_execute", note)
        far = cookie({CAUSAL.names(site.db)[0]: "0-1-99999999"})
        response = await site.send(site.read, cookie=far)
        assert 200 == response.status
    assert 2 == site.told(ReaderBehind)
    assert ["wait"] == waits
    assert [0] == site.found


async def test_position_that_cannot_be_learnt(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """A write stays a success; the client then reads from the writer's server."""
    async with site_with(backend, backend.url, causal_reads=CAUSAL) as site:
        engine = site.db.read_engine.sync_engine

        def refuse(*_: object) -> None:
            raise ConnectionRefusedError

        async with site.db.engine.connect():  # the writer has a connection already
            event.listen(engine, "do_connect", refuse)
        token = (await site.send(insert_one)).cookie
        event.remove(engine, "do_connect", refuse)
        assert 200 == (await site.send(site.read, cookie=token)).status
        assert [1] == site.found
        assert [False] == site.used()
    assert "was not learnt" in caplog.text


# Among others


async def test_concurrent_choices(backend: Backend) -> None:
    """Requests at once share out the readers' connections; none is left in use."""
    async with site_with(backend, backend.url, backend.url) as site:
        responses = await asyncio.gather(*(site.get() for _ in range(10)))
        assert {200} == {response.status for response in responses}
        assert [True, True] == site.used()
        assert [0, 0, 0] == checked_out(site.db)


async def test_the_write_session_has_no_route(backend: Backend) -> None:
    """What is written goes to the writer whatever the readers are."""
    async with site_with(backend, down(backend)) as site:

        async def handler() -> None:
            await uow.current_session().execute("INSERT INTO items (id) VALUES (1)")

        assert 200 == (await site.send(handler)).status
        assert 0 == site.told(ReaderFailed)
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize(
    ("told", "level", "words"),
    [
        (ReaderFailed("replica", OSError("s3cret"), 0.5), "WARNING", "left alone"),
        (ReaderRestored("replica"), "INFO", "used again"),
        (ReaderBehind("replica", 1.0), "DEBUG", "was behind"),
    ],
)
def test_logged(
    told: Event, level: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What becomes of readers is in the log, and no message of the driver is."""
    caplog.set_level("DEBUG", "asgi_uow")
    LoggingObserver()(told)
    [record] = caplog.records
    assert level == record.levelname
    assert words in record.getMessage()
    assert "s3cret" not in caplog.text


async def test_calls_without_a_connection(site: Site) -> None:
    """What reads nothing goes nowhere, and fixes no server for the reads to come."""
    async with site.db as unit:
        await unit.read_session(site.db).flush()
        assert 1 == await site.db.read.run_sync(lambda _: 1)


@on(*SERVERS)
async def test_calls_without_a_connection_on_the_writer(backend: ServerBackend) -> None:
    """Where no replica can be used, they connect nowhere at all."""
    async with site_with(backend, down(backend)) as site, site.db:
        assert 1 == await site.db.read.run_sync(lambda _: 1)
        assert [0, 0] == checked_out(site.db)
