"""P10: a request cancelled at every point at which it can be."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import threading
import types
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

import asgi_uow as uow
from asgi_uow import Database
from tests.servers import MariaDBBackend, PostgreSQLBackend, eventually
from tests.servers.plugin import server_port
from tests.support import shop
from tests.support.asgi import BODY, START, endpoint, handle, request, serve
from tests.support.databases import DRIVERS, SERVERS, checked_out, on, shop_database
from tests.support.private import State

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, ServerBackend, SQLiteBackend

pytestmark = on(*DRIVERS)

logger = logging.getLogger(__name__)

Kind = Literal["task", "task again and again", "scope"]


class Steps:
    """Counts how often the tasks made inside of it are suspended; acts at one."""

    def __init__(self, number: int, act: Callable[[], object], *, again: bool) -> None:
        self.number = number
        self.act = act
        self.again = again
        self.count = 0
        self.tasks: list[asyncio.Task[Any]] = []

    @contextmanager
    def counted(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._make_task)
        try:
            yield
        finally:
            loop.set_task_factory(None)

    async def running(self) -> int:
        """Count the tasks that have not come to an end."""
        return sum(not task.done() for task in self.tasks)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(self._run(work), loop=loop, **options)
        self.tasks.append(task)
        return task

    async def _run(self, work: Coroutine[object, None, object]) -> object:
        return await self._drive(work)

    @types.coroutine
    def _drive(
        self, work: Coroutine[object, None, object]
    ) -> Generator[object, None, object]:
        step = functools.partial(work.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as stop:
                return stop.value
            self._suspended()
            step = functools.partial(work.send, None)
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001  # handed on
                step = functools.partial(work.throw, error)

    def _suspended(self) -> None:
        self.count += 1
        if self.count == self.number or (self.again and self.count > self.number):
            self.act()


class Sent:
    """A request that writes one row, and what became of it."""

    def __init__(self, db: Database, row: int) -> None:
        self.row = row
        self.fired: list[str] = []
        self.unit: uow.UnitOfWork | None = None
        self.app = uow.UnitOfWorkMiddleware(self._app, db)

    async def _app(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        self.unit = uow.current_unit_of_work()
        uow.after_commit(self._hook, "commit")
        uow.after_rollback(self._hook, "rollback")
        await uow.current_read_session().execute("SELECT id FROM items")
        await shop.insert(self.row)
        await send({"type": START, "status": 200, "headers": []})
        await anyio.lowlevel.checkpoint()
        await send({"type": BODY, "body": b""})

    async def _hook(self, phase: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.fired.append(phase)

    async def run(self) -> None:
        response = await request(self.app, probe=anyio.lowlevel.checkpoint)
        assert response.error is None
        assert 200 == response.status

    async def cancelled_at(self, number: int, kind: Kind) -> Steps:
        """Run the request, cancel it at a point, give what was counted."""
        scope = anyio.CancelScope()

        async def inside() -> None:
            with scope:
                await self.run()

        def act() -> None:
            if kind == "scope":
                scope.cancel()
            else:
                task.cancel()

        steps = Steps(number, act, again="again" in kind)
        with steps.counted():
            task = asyncio.create_task(inside())
            await asyncio.wait((task,))
        assert (kind != "scope" and steps.count >= number) == task.cancelled()
        return steps


@pytest.mark.parametrize("kind", ["task", "task again and again", "scope"])
@pytest.mark.parametrize("pool", ["cold", "warm"])
async def test_cancelled_at_every_point(
    backend: Backend, pool: str, kind: Kind
) -> None:
    """P10: wherever it hits, the row is there exactly when the outcome says so.

    `--log-cli-level=INFO` shows how many points there were.
    """
    # Cancelled while it asks for TLS, asyncpg logs an exception of its own.
    tls: dict[str, Any] = {}
    if backend.driver == "asyncpg":
        tls = {"connect_args": {"ssl": False}}
    kept: list[int] = []
    number = 0
    async with shop_database(backend, **tls) as db:
        while True:
            number += 1
            if pool == "cold":
                await db.dispose()
            sent = Sent(db, 2 * number)
            steps = await sent.cancelled_at(number, kind)
            assert [0, 0] == checked_out(db)
            assert sent.unit is not None
            assert State.CLOSED is sent.unit.state
            await eventually(0, steps.running)
            await eventually(0, backend.open_transactions)
            await Sent(db, 2 * number + 1).run()
            committed = sent.unit.outcome is uow.Outcome.COMMITTED
            assert committed or sent.unit.outcome is uow.Outcome.ROLLED_BACK
            assert ["commit" if committed else "rollback"] == sent.fired
            kept += [sent.row] * committed + [sent.row + 1]
            assert kept == await shop.items(backend)
            if steps.count < number:
                break
    points = number - 1
    logger.info("%s, %s pool, %s: %d points", backend.driver, pool, kind, points)
    assert points >= (10 if pool == "cold" else 6)


@asynccontextmanager
async def cancelled(
    work: Coroutine[object, object, object], kind: Kind
) -> AsyncGenerator[None]:
    """Do `work` beside the block, cancel it at the end of the block."""
    scope = anyio.CancelScope()

    async def inside() -> None:
        with scope:
            await work

    task = asyncio.create_task(inside())
    yield
    if kind == "scope":
        scope.cancel()
    else:
        task.cancel()
    await asyncio.wait((task,))
    assert (kind == "task") == task.cancelled()


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def backend_of(config: pytest.Config, driver: str) -> ServerBackend:
    if driver == "asyncmy":
        return MariaDBBackend(server_port(config, "mariadb"))
    return PostgreSQLBackend(server_port(config, "postgresql"), driver)


SLEEP = {
    "mariadb": "UPDATE items SET parent = sleep(60)",
    "postgresql": "UPDATE items SET parent = 1 WHERE pg_sleep(60) IS NOT NULL",
}
SLEEPING = {
    "mariadb": "SELECT count(*) FROM information_schema.processlist"
    " WHERE state = 'User sleep' AND db = database()",
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE wait_event = 'PgSleep' AND datname = current_database()",
}


@pytest.mark.parametrize("kind", ["task", "scope"])
@pytest.mark.parametrize("driver", ["asyncmy", "asyncpg", "psycopg"])
async def test_cancelled_statement_is_stopped(
    driver: str, kind: Kind, pytestconfig: pytest.Config
) -> None:
    """P10: others get the row at once; the statement would have run a minute.

    A scope also cancels what a driver does about its cancellation.
    """
    async with (
        backend_of(pytestconfig, driver) as backend,
        shop_database(backend) as db,
    ):
        await backend.execute("INSERT INTO items (id) VALUES (1)")

        async def sleeping() -> int:
            return int(str(await backend.scalar(SLEEPING[backend.name])))

        async def handler() -> None:
            await uow.current_session().execute(SLEEP[backend.name])

        async with cancelled(handle(handler, db), kind):
            await eventually(1, sleeping)
        await eventually(0, sleeping)
        assert [(1,)] == await backend.fetch("SELECT id FROM items FOR UPDATE")
        assert [0, 0] == checked_out(db)


@pytest.mark.parametrize("kind", ["task", "scope"])
@on(*SERVERS, "psycopg")
async def test_cancelled_while_a_dead_connection_is_thrown_away(
    db: Database, backend: ServerBackend, kind: Kind
) -> None:
    """P10: what SQLAlchemy leaves half closed keeps no unit from its end."""
    throwing_away = asyncio.Event()
    sent: list[uow.UnitOfWork] = []
    hooks: list[str] = []

    def wait(*_: object) -> None:
        throwing_away.set()
        await_only(asyncio.Event().wait())

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        sent.append(uow.current_unit_of_work())
        uow.after_rollback(hooks.append, "rollback")
        await shop.insert(1)
        event.listen(db.engine.sync_engine.pool, "invalidate", wait, once=True)
        await backend.kill_connections()
        await shop.insert(2)

    async with cancelled(request(uow.UnitOfWorkMiddleware(app, db)), kind):
        await throwing_away.wait()

    assert uow.Outcome.ROLLED_BACK is sent[0].outcome
    assert ["rollback"] == hooks
    assert [0, 0] == checked_out(db)
    assert [] == await shop.items(backend)


@on(*SERVERS, "psycopg")
async def test_cancelled_while_it_waits_for_a_statement_in_flight(
    db: Database, backend: ServerBackend
) -> None:
    """P10: a statement past the session fails when its connection is thrown away."""
    left: list[asyncio.Task[object]] = []
    is_waiting = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await shop.insert(1)
        connection = await uow.current_session().connection()
        left.append(asyncio.create_task(connection.exec_driver_sql(backend.slow)))
        await eventually(1, functools.partial(backend.running, backend.slow))
        is_waiting.set()
        await shop.insert(2)

    async with cancelled(request(uow.UnitOfWorkMiddleware(app, db)), "task"):
        await is_waiting.wait()
    with anyio.fail_after(10), pytest.raises(Exception):  # noqa: B017, PT011
        await left[0]
    assert [0, 0] == checked_out(db)
    assert [] == await shop.items(backend)


LOCK = {
    "mariadb": "SELECT GET_LOCK('held', 60)",
    "postgresql": "SELECT 1 FROM (SELECT pg_advisory_lock(1)) AS held",
}
LOCKING = {
    "mariadb": "SELECT count(*) FROM information_schema.processlist"
    " WHERE state = 'User lock' AND db = database()",
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE wait_event = 'advisory' AND datname = current_database()",
}


@asynccontextmanager
async def beside_a_cancelled_read(
    backend: ServerBackend, session: uow.Session, reader: uow.Session
) -> AsyncGenerator[None]:
    """`session` waits for a lock, and gets it after a read was cancelled."""

    async def waiting() -> int:
        return int(str(await backend.scalar(LOCKING[backend.name])))

    lock = LOCK[backend.name]
    keeper = create_async_engine(backend.url, poolclass=NullPool)
    async with keeper.connect() as connection:
        await connection.exec_driver_sql(lock)
        waits = asyncio.create_task(session.scalar(lock))
        await eventually(1, waiting)
        async with cancelled(reader.execute(lock), "scope"):
            await eventually(2, waiting)
        await eventually(1, waiting)
        yield
    assert 1 == await waits


@on(*SERVERS)
async def test_cancelled_read_does_not_stop_the_next_user_of_the_reader(
    backend: ServerBackend,
) -> None:
    """P10: a connection that was lent to a task is not meant by a later cancel."""
    async with shop_database(backend, pool_size=1) as db, db:
        await db.read.execute("SELECT 1")
        async with (
            uow.parallel_read() as other,
            beside_a_cancelled_read(backend, other, db.read),
        ):
            assert [0, 1] == checked_out(db)


@on(*SERVERS)
async def test_cancelled_read_does_not_stop_the_next_user_of_the_writer(
    backend: ServerBackend,
) -> None:
    """P10: neither is the writer's, which the unit has read from before COMMIT."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        reader = uow.current_read_session()
        await reader.execute("SELECT 1")
        await send({"type": START, "status": 200, "headers": []})
        async with db, beside_a_cancelled_read(backend, db.write, reader):
            assert [1, 0] == checked_out(db)
        await send({"type": BODY, "body": b""})

    async with shop_database(backend, pool_size=1) as db:
        response = await serve(app, db)
        assert response.error is None
        assert [0, 0] == checked_out(db)


@on("aiosqlite")
@pytest.mark.parametrize("kind", ["task", "scope"])
async def test_cancelled_sqlite_statement_leaves_no_lock(
    db: Database, backend: SQLiteBackend, kind: Kind, no_gc: None
) -> None:
    """SQLite: no zombie keeps the lock, not even of an exception that is kept."""
    loop = asyncio.get_running_loop()
    kept: list[BaseException] = []
    running = asyncio.Event()

    def note(number: int) -> int:
        if number == 1000:
            loop.call_soon_threadsafe(running.set)
        return number

    async def handler() -> None:
        session = uow.current_session()
        pooled = await (await session.connection()).get_raw_connection()
        assert pooled.driver_connection is not None
        await pooled.driver_connection.create_function("note", 1, note)
        try:
            await session.execute(
                "INSERT INTO items (id) WITH RECURSIVE n (i) AS"
                " (SELECT 1 UNION ALL SELECT note(i + 1) FROM n WHERE i < 5000000)"
                " SELECT i FROM n"
            )
        except asyncio.CancelledError as error:
            kept.append(error)
            raise

    app = uow.UnitOfWorkMiddleware(endpoint(handler), db)
    for number in range(1, 21):
        running.clear()
        async with cancelled(request(app), kind):
            await running.wait()
        await eventually(0, backend.open_transactions, within=1)
        assert number == len(kept)
    assert [0, 0] == checked_out(db)
    assert [] == await shop.items(backend)


async def test_end_of_asyncio_run_waits_for_the_commit(mariadb: MariaDBBackend) -> None:
    """P10: a COMMIT in flight is finished although the event loop is to end."""
    may_end = threading.Event()
    fired: list[str] = []
    tasks: list[asyncio.Task[object]] = []

    async def handler() -> None:
        uow.after_commit(fired.append, "hook")
        await shop.insert(1)

    async def main(url: str) -> None:
        tasks.append(
            asyncio.create_task(
                handle(handler, Database.from_url(url, poolclass=NullPool))
            )
        )
        await asyncio.to_thread(may_end.wait)

    await shop.create(mariadb)
    async with mariadb.proxy() as proxy:
        hold = proxy.hold_answer(lambda trip: trip == "COMMIT")
        url = mariadb.through(proxy.port)
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, main(url)))
        await hold.answered.wait()
        may_end.set()

        async def cancelling() -> int:
            return tasks[0].cancelling()

        await eventually(1, cancelling)
        hold.release()
        await thread
    assert tasks[0].cancelled()
    assert ["hook"] == fired
    assert [1] == await shop.items(mariadb)
    assert 0 == await mariadb.connections()
