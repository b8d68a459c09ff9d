"""Sessions: what they take, what they refuse, and how their calls take turns."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Literal

import pytest
from sqlalchemy import delete, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, NoResultFound
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.servers import ServerBackend, eventually
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    on,
    shop_database,
)
from tests.support.private import TaskLock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.orm import Session as SyncSession

    from tests.servers import Backend, MariaDBBackend

pytestmark = on(*DRIVERS)

INSERT = "INSERT INTO person (id, name) VALUES (:id, :name)"
NAMES = "SELECT name FROM person ORDER BY id"


class Base(DeclarativeBase):
    """The tables of these tests."""


class Person(Base):
    """Somebody."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    """A database with the table `person`, in which Ann and Bob are."""
    await backend.execute(
        "CREATE TABLE person (id INTEGER PRIMARY KEY, name VARCHAR(50))",
        "INSERT INTO person VALUES (1, 'Ann'), (2, 'Bob')",
    )
    db = Database.from_url(backend.url)
    yield db
    await db.dispose()


@pytest.fixture
async def memory() -> AsyncIterator[Database]:
    """The same in memory, for what no database has a say in."""
    db = Database.from_url("sqlite://")
    async with db:
        await db.write.run_sync(lambda s: Base.metadata.create_all(s.connection()))
        db.write.add_all([Person(id=1, name="Ann"), Person(id=2, name="Bob")])
    yield db
    await db.dispose()


# What they take


async def test_plain_text(db: Database) -> None:
    """A string is SQL; its parameters are named, or in a mapping."""
    by_name = "SELECT name FROM person WHERE name = :name"
    async with db:
        for session in (db.read, db.write):
            assert "Ann" == (await session.execute(by_name, name="Ann")).scalar()
            assert "Bob" == await session.scalar(by_name, {"name": "Bob"})
            assert ["Ann", "Bob"] == (await session.scalars(NAMES)).all()
            assert (await session.execute(by_name, name="Eve")).first() is None


@pytest.mark.parametrize("name", ["read", "write"])
async def test_streaming(db: Database, name: str) -> None:
    """Rows can be streamed, on the read session too."""
    by_name = "SELECT name FROM person WHERE name = :name"
    async with db:
        session: uow.Session = getattr(db, name)
        result = await session.stream(by_name, name="Ann")
        assert [("Ann",)] == [row async for row in result]
        scalars = await session.stream_scalars(by_name, name="Bob")
        assert ["Bob"] == [name async for name in scalars]


async def test_many_rows(backend: Backend, db: Database) -> None:
    """A list of mappings is many rows, as with SQLAlchemy."""
    rows = [{"id": 3, "name": "Cid"}, {"id": 4, "name": "Dan"}]
    async with db:
        await db.write.execute(INSERT, rows)
        await db.write.execute(INSERT, id=5, name="Eve")
    assert 5 == await backend.scalar("SELECT count(*) FROM person")


@pytest.mark.parametrize(
    "method", ["execute", "scalar", "scalars", "stream", "stream_scalars"]
)
async def test_parameters_twice(memory: Database, method: str) -> None:
    """Parameters by mapping and by name at once are refused."""
    async with memory:
        with pytest.raises(TypeError, match="as a mapping or by name, not both"):
            await getattr(memory.write, method)("SELECT :a, :b", {"a": 1}, b=2)


async def test_what_sqlalchemy_takes(db: Database) -> None:
    """Everything else of SQLAlchemy's session works unchanged."""
    async with db:
        ann = await db.write.get_one(Person, 1)
        assert ann is await db.write.get(Person, 1)
        assert ann is await db.write.scalar(select(Person).filter_by(name="Ann"))
        assert ["Ann", "Bob"] == (await db.write.scalars(select(Person.name))).all()
        assert ann is (await db.write.execute(select(Person).limit(1))).scalar()
        ann.name = "Anna"
        await db.write.flush()
        await db.write.execute(text("UPDATE person SET name = 'Anne' WHERE id = 1"))
        await db.write.refresh(ann)
        await db.write.delete(await db.write.get_one(Person, 2))
        await db.write.merge(Person(id=3, name="Cid"))
        async with db.write.begin_nested():
            db.write.add(Person(id=4, name="Dan"))
        with pytest.raises(NoResultFound):
            await db.read.get_one(Person, 2)
    assert "Anne" == ann.name
    async with db:
        assert ["Anne", "Cid", "Dan"] == (await db.read.scalars(NAMES)).all()


# What they refuse


async def use_as_context_manager(session: uow.Session) -> None:
    async with session:
        await session.execute("SELECT 1")


async def begin(session: uow.Session) -> None:
    async with session.begin():
        raise AssertionError  # pragma: no cover


BY_HAND: dict[str, Callable[[uow.Session], Awaitable[object]]] = {
    "commit()": lambda session: session.commit(),
    "rollback()": lambda session: session.rollback(),
    "close()": lambda session: session.close(),
    "close() by a context manager": use_as_context_manager,
    "reset()": lambda session: session.reset(),
    "invalidate()": lambda session: session.invalidate(),
    "begin() as a context manager": begin,
    "begin() alone": lambda session: session.begin().start(),
    "begin() in a sync function": lambda session: session.run_sync(lambda s: s.begin()),
    "commit() in a sync function": lambda session: session.run_sync(
        lambda s: s.commit()
    ),
    "rollback() in a sync function": lambda session: session.run_sync(
        lambda s: s.rollback()
    ),
    "close() in a sync function": lambda session: session.run_sync(lambda s: s.close()),
}


@pytest.mark.parametrize("call", BY_HAND)
@pytest.mark.parametrize("name", ["read", "write"])
async def test_nobody_else_ends_a_session(
    memory: Database, name: str, call: str
) -> None:
    """A unit of work ends its sessions; by hand it is refused and changes nothing."""
    async with memory:
        session: uow.Session = getattr(memory, name)
        await memory.write.execute(INSERT, id=3, name="Cid")
        with pytest.raises(errors.ManagedTransactionError) as caught:
            await BY_HAND[call](session)
        operation = f"session.{call.split(maxsplit=1)[0]}"
        assert str(caught.value).startswith(f"{operation} was called by hand")
        assert "Cid" == await session.scalar("SELECT name FROM person WHERE id = 3")
        uow.set_rollback_only("to see that nothing was committed")
    async with memory:
        assert ["Ann", "Bob"] == (await memory.read.scalars(NAMES)).all()


@pytest.mark.parametrize(
    "method", ["commit", "rollback", "close", "reset", "invalidate", "prepare", "begin"]
)
async def test_nobody_ends_the_sync_session(memory: Database, method: str) -> None:
    """The session underneath refuses just the same."""
    async with memory:
        with pytest.raises(
            errors.ManagedTransactionError, match=rf"session\.{method}\(\)"
        ):
            getattr(memory.write.sync_session, method)()


async def test_a_finished_unit(memory: Database) -> None:
    """After the end every call raises, the ones that only remember too."""
    async with memory:
        write, read = memory.write, memory.read
        await write.execute("SELECT 1")

    async def add() -> None:
        write.add(Person(id=3, name="Cid"))

    async def add_all() -> None:
        write.add_all([])

    calls: list[Callable[[], Awaitable[object]]] = [
        add,
        add_all,
        lambda: write.execute("SELECT 1"),
        lambda: read.execute("SELECT 1"),
        lambda: write.begin_nested().start(),
        lambda: write.commit(),
    ]
    for call in calls:
        with pytest.raises(errors.UnitOfWorkClosedError, match="async with db:"):
            await call()


@pytest.mark.parametrize(
    ("operation", "statement"),
    [
        ("INSERT", insert(Person).values(id=3, name="Cid")),
        ("UPDATE", update(Person).values(name="Eve")),
        ("DELETE", delete(Person)),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
async def test_dml_on_the_read_session(
    *, memory: Database, operation: str, statement: Any, joined: bool
) -> None:
    """Core's DML is refused, also where reads go to the writer's transaction."""
    async with memory:
        if joined:
            await memory.write.execute("SELECT 1")
        with pytest.raises(
            errors.ReadOnlySessionError, match=f"^{operation} was refused"
        ):
            await memory.read.execute(statement)
    async with memory:
        assert ["Ann", "Bob"] == (await memory.read.scalars(NAMES)).all()


async def test_flush_on_the_read_session(backend: Backend, db: Database) -> None:
    """The read session never flushes: what it was given goes nowhere."""
    async with db:
        db.read.add(Person(id=3, name="Cid"))
        assert 2 == await db.read.scalar(select(func.count()).select_from(Person))
        with pytest.raises(errors.ReadOnlySessionError, match=r"^A flush was refused"):
            await db.read.flush()
        uow.set_rollback_only("there is nothing to keep")
    assert [("Ann",), ("Bob",)] == await backend.fetch(NAMES)


# Read your writes


async def test_read_your_writes(backend: Backend, db: Database) -> None:
    """Once a unit has written, its reads see it, and nobody else's do."""
    async with db:
        assert 2 == len((await db.read.execute(NAMES)).all())
        db.write.add(Person(id=3, name="Cid"))
        await db.write.flush()
        assert ["Ann", "Bob", "Cid"] == (await db.read.scalars(NAMES)).all()
        assert await db.read.get_one(Person, 3) is not await db.write.get_one(Person, 3)
        assert 2 == await backend.scalar("SELECT count(*) FROM person")
        uow.set_rollback_only("enough seen")
    async with db:
        assert 2 == len((await db.read.execute(NAMES)).all())


async def test_reads_that_wait_while_the_unit_writes(
    backend: Backend, db: Database
) -> None:
    """A read that was waiting when the unit wrote waits for the writer's turn too."""
    async with db:
        read, write = db.read, db.write
        waiting = asyncio.Event()

        async def read_later() -> list[Any]:
            waiting.set()
            return list((await read.execute(NAMES)).scalars())

        async with write.own_lock:
            async with read.own_lock:
                late = asyncio.create_task(read_later())
                await waiting.wait()
                await asyncio.sleep(0)
                await write.execute(INSERT, id=3, name="Cid")
            assert [("Ann",), ("Bob",)] == await backend.fetch(NAMES)
            assert not late.done()
        assert ["Ann", "Bob", "Cid"] == await late


async def test_read_that_moves_while_another_read_connects(backend: Backend) -> None:
    """Two reads, before and after the first write, do not meet on the session."""

    async def handler() -> None:
        read = uow.current_read_session()
        early = asyncio.ensure_future(read.scalar("SELECT 1"))
        await asyncio.wait((early,), timeout=0)
        await shop.insert(1)
        late = read.scalar(shop.COUNT)
        assert [1, 1] == list(await asyncio.gather(early, late))

    async with shop_database(backend) as db:
        assert 200 == (await handle(handler, db)).status


# Turns


@pytest.mark.parametrize("name", ["read", "write"])
async def test_statements_of_several_tasks(db: Database, name: str) -> None:
    """Ten statements at once on one session give ten right answers."""
    async with db:
        session: uow.Session = getattr(db, name)
        numbers = await asyncio.gather(
            *(session.scalar(f"SELECT {number}") for number in range(10))
        )
        assert list(range(10)) == numbers


async def test_objects_of_several_tasks(backend: Backend, db: Database) -> None:
    """A sync function has its turn to the end; flushes and reads wait."""

    def add(session: SyncSession, number: int) -> None:
        session.add(Person(id=number, name=f"nr {number}"))
        session.flush()

    async def work(number: int) -> None:
        await db.write.run_sync(add, number)
        assert await db.write.get(Person, number)

    async with db:
        await asyncio.gather(*map(work, range(10, 20)), db.read.execute(NAMES))
    assert 12 == await backend.scalar("SELECT count(*) FROM person")


async def test_a_turn_within_a_turn(memory: Database) -> None:
    """Whoever has the turn goes on: a call may call."""
    async with memory:
        async with memory.write.own_lock, memory.write.own_lock:
            assert 1 == await memory.write.scalar("SELECT 1")
        assert 2 == await memory.write.run_sync(lambda s: s.scalar(text("SELECT 2")))


@on("aiosqlite")
async def test_add_while_another_task_flushes(backend: Backend) -> None:
    """SQLAlchemy would only warn, and might lose the object: refused."""
    flushing = asyncio.Event()

    async def handler() -> None:
        session = uow.current_session()
        session.add(shop.Item(id=1))
        event.listen(session.sync_session, "after_flush", lambda *_: flushing.set())
        flush = asyncio.ensure_future(session.flush())
        await flushing.wait()
        session.sync_session._flushing = True
        with pytest.raises(errors.ConcurrentUseError, match="another task is flushing"):
            await asyncio.create_task(add(session))
        session.sync_session._flushing = False
        await flush

    async def add(session: uow.Session) -> None:
        async with uow.current_session().own_lock:
            await asyncio.create_task(late(session))

    async def late(session: uow.Session) -> None:
        session.add_all([shop.Item(id=2)])

    async with shop_database(backend) as db:
        assert 200 == (await handle(handler, db)).status
    assert [1] == await shop.items(backend)


async def test_an_error_frees_the_turn(db: Database) -> None:
    """A statement that fails lets the next one in."""
    async with db:
        results = await asyncio.gather(
            db.read.execute("SELECT nothing FROM nowhere"),
            db.read.scalar("SELECT 1"),
            return_exceptions=True,
        )
        assert isinstance(results[0], Exception)
        assert 1 == results[1]


async def test_a_cancellation_frees_the_turn() -> None:
    """A task that is cancelled, having the turn or waiting for it, lets others in."""
    turn = TaskLock()
    has_it = asyncio.Event()

    async def hold() -> None:
        async with turn:
            has_it.set()
            await asyncio.Event().wait()

    holder, waiter = asyncio.create_task(hold()), asyncio.create_task(hold())
    await has_it.wait()
    for task in (waiter, holder):
        task.cancel()
        await asyncio.wait((task,))
    async with asyncio.timeout(5), turn:
        pass


@pytest.mark.parametrize("access", ["write", "read"])
@on(*SERVER_DRIVERS)
async def test_a_cancelled_statement(
    backend: ServerBackend, db: Database, access: Literal["read", "write"]
) -> None:
    """A cancelled statement ends on the server too, and its unit keeps nothing.

    So does a read in the transaction of the writer.
    """
    slow = backend.slow

    async def count() -> int:
        return await backend.running(slow)

    async with db:
        await db.write.execute(INSERT, id=3, name="Cid")
        session = db.write if access == "write" else db.read
        statement = asyncio.create_task(session.execute(slow))
        await eventually(1, count)
        statement.cancel()
        await asyncio.wait((statement,))
        assert statement.cancelled()
        uow.set_rollback_only("cancelled")
    await eventually(0, backend.open_transactions)
    await eventually(0, count)
    assert [("Ann",), ("Bob",)] == await backend.fetch(NAMES)


@on("asyncmy")
async def test_a_statement_that_cannot_be_killed(backend: MariaDBBackend) -> None:
    """Where the server cannot be told of a cancellation, the unit ends all the same."""

    async def count() -> int:
        return await backend.running(backend.slow)

    async with behind_proxy(backend) as (db, proxy), db:
        statement = asyncio.create_task(db.write.execute(backend.slow))
        await eventually(1, count)
        rule = proxy.cut_before(lambda trip: trip.startswith("KILL "))
        statement.cancel()
        await asyncio.wait((statement,))
        assert statement.cancelled()
        assert rule.fired.is_set()
        uow.set_rollback_only("cancelled")


# Connections that are lost


@on(*SERVER_DRIVERS)
async def test_reads_go_on_after_a_lost_connection(
    backend: ServerBackend, db: Database
) -> None:
    """The read that meets it raises; the next one has another connection."""
    async with db:
        await db.read.connection()
        await backend.kill_connections()
        with pytest.raises(DBAPIError):
            await db.read.scalar(NAMES)
        assert "Ann" == await db.read.scalar(NAMES)
        await backend.kill_connections()
        assert "Ann" == await db.read.scalar(NAMES)  # it held none


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_lost_before_commit(
    *, backend: ServerBackend, db: Database, noticed: bool
) -> None:
    """COMMIT is not even sent on a connection that is known to be dead."""

    async def work() -> None:
        async with db:
            await db.write.execute(INSERT, id=3, name="Cid")
            await backend.kill_connections()
            if noticed:
                with contextlib.suppress(Exception):
                    await db.write.execute("SELECT 1")

    with pytest.raises(errors.UnitOfWorkFailedError) as caught:
        await work()
    assert uow.Outcome.ROLLED_BACK is caught.value.outcome
    assert 1 == caught.value.retry_after
    assert [("Ann",), ("Bob",)] == await backend.fetch(NAMES)


class StopError(BaseException):
    """Neither an error of the application nor a cancellation."""


async def test_what_stops_everything(db: Database, backend: Backend) -> None:
    """It goes through a session as it is, and what was written is rolled back."""

    def stop(session: SyncSession) -> None:
        raise StopError

    with pytest.raises(StopError):
        async with db:
            await db.write.execute(INSERT, {"id": 3, "name": "Cid"})
            await db.write.run_sync(stop)
    assert 2 == await backend.scalar("SELECT count(*) FROM person")


@pytest.mark.parametrize("method", ["commit", "prepare"])
async def test_the_session_inside_is_the_units_too(db: Database, method: str) -> None:
    """Not even the synchronous session lets itself be ended by hand."""
    async with db:
        with pytest.raises(errors.ManagedTransactionError, match=method):
            await db.write.run_sync(lambda session: getattr(session, method)())


@on(*SERVER_DRIVERS)
async def test_isolation_level_of_a_transaction(db: Database) -> None:
    """Any isolation level that has transactions may be asked for."""
    async with db:
        options = {"isolation_level": "SERIALIZABLE"}
        connection = await db.write.connection(execution_options=options)
        assert "SERIALIZABLE" == await connection.get_isolation_level()
