"""`on_begin`: the settings of a tenant, first in each transaction."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from sqlalchemy import ForeignKey, event, select
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.util import greenlet_spawn

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import (
    DRIVERS,
    POOLED,
    SERVER_DRIVERS,
    SERVERS,
    checked_out,
    login,
    memory_database,
    on,
    shop_database,
)
from tests.support.shop import Item
from tests.support.site import down, site_with
from tests.test_docs import TENANTS, run_blocks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
    from typing import TypeAlias

    from tests.servers import Backend, ServerBackend

    Way: TypeAlias = Callable[[], Coroutine[Any, Any, object]]

pytestmark = on(*DRIVERS)

tenant: ContextVar[int] = ContextVar("tenant", default=1)
POOL_OF_ONE: Mapping[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}

# What a driver's database can remember, and how it is asked.
SETTINGS = {
    "aiosqlite": ("PRAGMA cache_size = {}", "PRAGMA cache_size"),
    "asyncmy": ("SET @tenant = {}", "SELECT CAST(@tenant AS INTEGER)"),
    "asyncpg": (
        "SELECT set_config('app.tenant', '{}', true)",
        "SELECT CAST(current_setting('app.tenant', true) AS INTEGER)",
    ),
}
SETTINGS["psycopg"] = SETTINGS["asyncpg"]


@asynccontextmanager
async def house(
    backend: Backend, url: str | None = None, **options: Any
) -> AsyncGenerator[tuple[Database, str, list[str]]]:
    """A database that is told the tenant, the question, and what is executed."""
    setting, question = SETTINGS[backend.driver]
    executed: list[str] = []

    async def on_begin(session: uow.Session) -> None:
        await session.execute(setting.format(tenant.get()))

    def record(_: object, __: object, statement: str, *___: object) -> None:
        executed.append(statement)

    options = {**POOL_OF_ONE, "on_begin": on_begin, **options}
    async with shop_database(backend, url, **options) as db:
        event.listen(db.engine.sync_engine, "before_cursor_execute", record)
        yield db, question, executed
        assert [0, 0] == checked_out(db)


async def by_statement(db: Database, question: str) -> list[object]:
    return [await db.read.scalar(question), await db.read.scalar(question)]


async def by_writer(db: Database, question: str) -> list[object]:
    return [await db.write.scalar(question), await db.read.scalar(question)]


async def by_stream(db: Database, question: str) -> list[object]:
    result = await db.read.stream_scalars(question)
    return list(await result.all())


async def by_connection(db: Database, question: str) -> list[object]:
    connections = [await each.connection() for each in (db.read, db.write)]
    return [(await each.exec_driver_sql(question)).scalar() for each in connections]


async def by_raw_sync(db: Database, question: str) -> list[object]:
    def ask(sync: Session) -> object:
        return sync.connection().exec_driver_sql(question).scalar()

    return [await db.read.run_sync(ask), await db.write.run_sync(ask)]


async def in_parallel(db: Database, question: str) -> list[object]:
    async def ask() -> object:
        async with uow.parallel_read() as session:
            return await session.scalar(question)

    return list(await asyncio.gather(ask(), ask()))


async def in_savepoint(db: Database, question: str) -> list[object]:
    with pytest.raises(KeyError):
        async with uow.savepoint():
            await db.write.execute(question)
            raise KeyError
    return [await db.write.scalar(question)]


WAYS = [
    by_statement,
    by_writer,
    by_stream,
    by_connection,
    by_raw_sync,
    in_parallel,
    in_savepoint,
]


@on(*DRIVERS, *POOLED[1::2])  # a read and a write at once need two connections
@pytest.mark.parametrize("way", WAYS)
async def test_two_tenants_on_one_connection(
    backend: Backend, way: Callable[[Database, str], Coroutine[Any, Any, list[object]]]
) -> None:
    """Whatever a unit does, it has the settings of its own tenant."""
    async with house(backend) as (db, question, _):
        for number in (1, 2, 1):
            tenant.set(number)
            async with db:
                assert {number} == set(await way(db, question))


async def test_requests_and_their_hooks(backend: Backend) -> None:
    """Requests of two tenants at the same time, and their hooks, are kept apart."""
    async with house(backend) as (db, question, _):
        found: dict[int, list[object]] = {1: [], 2: []}

        async def ask(number: int) -> None:
            found[number].append(await uow.current_read_session().scalar(question))
            found[number].append(await uow.current_session().scalar(question))

        async def serve(number: int) -> None:
            async def handler() -> None:
                tenant.set(number)
                await ask(number)
                for register in (uow.before_commit, uow.after_commit):
                    register(ask, number)
                uow.after_response(ask, number)

            response = await handle(handler, db)
            assert [200, []] == [response.status, response.failures]

        await asyncio.gather(*(serve(number) for number in (1, 2, 1, 2)))

        assert {1: [1] * 16, 2: [2] * 16} == found


@pytest.mark.parametrize("first", ["read", "write", "flush", "bulk", "savepoint"])
async def test_once_and_first(backend: Backend, first: str) -> None:
    """It is the first statement of a transaction, and is not executed again."""
    async with house(backend) as (db, _, executed):
        setting = SETTINGS[backend.driver][0].format(1)

        async with db:
            if first == "read":
                assert [] == list(await db.read.scalars(select(Item)))
            elif first == "write":
                await shop.insert(1)
            elif first == "bulk":

                def save(sync: Session) -> None:
                    sync.bulk_save_objects([Item(id=1)])

                await db.write.run_sync(save)
            elif first == "savepoint":
                async with uow.savepoint():
                    await shop.insert(1)
            else:
                db.write.add(Item(id=1))

        assert [setting, 1] == [executed[0], executed.count(setting)]
        assert ([] if first == "read" else [1]) == await shop.items(backend)


async def test_autoflush_comes_later(backend: Backend) -> None:
    """An object that waits to be flushed is flushed after it, and not by it."""
    async with house(backend) as (db, _, executed):
        async with db:
            db.write.add(Item(id=1))
            await db.write.execute(select(Item))

        setting, insert, *_ = executed
        assert SETTINGS[backend.driver][0].format(1) == setting
        assert insert.startswith("INSERT")


async def test_nothing_is_executed(backend: Backend) -> None:
    """A unit that executes nothing has no transaction, and no call."""
    async with house(backend) as (db, _, executed):
        async with db:
            await db.write.flush()
            await db.read.flush()

        assert [] == executed


async def test_a_failure_is_the_callers(backend: Backend) -> None:
    """If it fails, the statement is not executed; the next call begins again."""
    fails = iter([True, True, False, True, False])

    async def on_begin(session: uow.Session) -> None:
        await session.execute("SELECT 1")
        if next(fails):
            message = "no tenant"
            raise LookupError(message)

    async with house(backend, on_begin=on_begin) as (db, _, executed):
        async with db:
            for _ in range(2):
                with pytest.raises(LookupError, match="no tenant"):
                    await shop.insert(1)
            await shop.insert(2)
        async with db:
            with pytest.raises(LookupError, match="no tenant"):
                await db.read.scalar(shop.COUNT)
            assert 1 == await db.read.scalar(shop.COUNT)

        assert 5 == executed.count("SELECT 1")
        assert [2] == await shop.items(backend)


async def test_a_refused_statement(backend: Backend) -> None:
    """An error of the database in it refuses this transaction, not the next one."""
    statements = iter(["SELECT nothing FROM nowhere"] * 2 + ["SELECT 1"] * 2)

    async def on_begin(session: uow.Session) -> None:
        await session.execute(next(statements))

    async with house(backend, on_begin=on_begin) as (db, _, __):
        with pytest.raises(Exception, match="nowhere"):
            async with db:
                await shop.insert(1)
        async with db:
            with pytest.raises(Exception, match="nowhere"):
                await db.read.scalar(shop.COUNT)
            assert 0 == await db.read.scalar(shop.COUNT)
            await shop.insert(2)

        assert [2] == await shop.items(backend)


async def test_cancelled(backend: Backend) -> None:
    """What was cancelled in it has not begun: the next read calls it again."""
    waiting, calls = asyncio.Event(), iter([True, False])

    async def on_begin(session: uow.Session) -> None:
        await session.execute("SELECT 1")
        if next(calls):
            waiting.set()
            await asyncio.Event().wait()

    async with house(backend, on_begin=on_begin) as (db, _, executed), db:
        task = asyncio.create_task(db.read.scalar(shop.COUNT))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 0 == await db.read.scalar(shop.COUNT)
        kept = [each for each in executed if not each.startswith("KILL QUERY")]
        assert ["SELECT 1", "SELECT 1", shop.COUNT] == kept


@pytest.mark.parametrize("name", ["read", "write"])
async def test_several_tasks(backend: Backend, name: str) -> None:
    """Tasks that share a session wait until it is done."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def on_begin(session: uow.Session) -> None:
        entered.set()
        await leave.wait()
        await session.execute("SELECT 1")

    async with house(backend, on_begin=on_begin) as (db, _, executed), db:
        used = getattr(db, name)
        first = asyncio.create_task(used.scalar(shop.COUNT))
        await entered.wait()
        # What loads an attribute does not wait for the session's turn.
        sync = used.sync_session
        others = [
            asyncio.create_task(used.scalar(shop.COUNT)),
            asyncio.create_task(greenlet_spawn(sync.scalar, select(Item.id))),
        ]
        await asyncio.sleep(0)
        assert [] == executed
        leave.set()
        assert [0, 0, None] == await asyncio.gather(first, *others)
        assert "SELECT 1" == executed[0]
        # Each read is a transaction.
        assert (3 if name == "read" else 1) == executed.count("SELECT 1")


@on(*SERVERS)
async def test_options_of_the_connection(backend: ServerBackend) -> None:
    """Options for `session.connection()` are heeded, and their mark stays."""
    async with house(backend) as (db, question, _):
        async with db:
            options = {"isolation_level": "SERIALIZABLE"}
            connection = await db.read.connection(execution_options=options)
            assert "SERIALIZABLE" == await connection.get_isolation_level()
            assert 1 == await db.read.scalar(question)
        async with db:
            connection = await db.read.connection()
            assert "SERIALIZABLE" != await connection.get_isolation_level()


async def test_connections_stay(backend: Backend) -> None:
    """Settings that each transaction sets anew cost no new connection."""
    async with house(backend) as (db, _, __):
        connected: list[object] = []
        event.listen(
            db.read_engine.sync_engine, "connect", lambda *_: connected.append(1)
        )
        for _ in range(3):
            async with db:
                await db.read.scalar(shop.COUNT)

        assert 1 == len(connected)


async def test_reads_cannot_write(backend: Backend) -> None:
    """The database refuses writes on read sessions as without it."""
    async with house(backend) as (db, _, __), db:
        with pytest.raises(errors.ReadOnlySessionError):
            await db.read.execute("INSERT INTO items (id) VALUES (1)")
        with pytest.raises(errors.ReadOnlySessionError):
            db.read.add(Item(id=1))
            await db.read.flush()
        db.read.expunge_all()
        assert 0 == await db.read.scalar(shop.COUNT)


async def test_snapshot(backend: Backend) -> None:
    """With `read_isolation` it is the first of the snapshot."""
    async with house(backend, read_isolation="REPEATABLE READ") as (db, question, ran):
        async with db:
            assert 1 == await db.read.scalar(question)
            assert 0 == await db.read.scalar(shop.COUNT)
            await backend.execute("INSERT INTO items (id) VALUES (1)")
            assert 0 == await db.read.scalar(shop.COUNT)
        assert 1 == ran.count(SETTINGS[backend.driver][0].format(1))


@pytest.mark.parametrize("where", ["a replica", "no replica"])
async def test_replicas(backend: Backend, where: str) -> None:
    """Reads on a replica, and on the writer in its place, begin with it."""
    setting, question = SETTINGS[backend.driver]

    async def on_begin(session: uow.Session) -> None:
        await session.execute(setting.format(tenant.get()))

    url = backend.url if where == "a replica" else down(backend)
    async with site_with(backend, url, on_begin=on_begin) as site, site.db as unit:
        assert 1 == await unit.read_session().scalar(question)


@on(*SERVER_DRIVERS)
async def test_a_replica_that_is_lost(backend: ServerBackend) -> None:
    """A replica that is lost between it and the first read: another server reads."""
    async with backend.proxy() as proxy:
        url = backend.through(proxy.port)
        async with house(backend, read_urls=[url]) as (db, _, __), db:
            proxy.cut_before(lambda trip: shop.COUNT in trip)
            assert 0 == await db.read.scalar(shop.COUNT)


@on("asyncpg", "psycopg")
@pytest.mark.parametrize("name", ["read", "write"])
async def test_a_setting_that_would_stay(backend: Backend, name: str) -> None:
    """What is not SET LOCAL does not reach a unit whose `on_begin` sets nothing."""

    async def on_begin(session: uow.Session) -> None:
        if tenant.get():
            await session.execute("SET app.tenant = 'ann'")

    question = "SELECT current_setting('app.tenant', true)"
    async with house(backend, on_begin=on_begin) as (db, _, __):
        async with db:
            assert "ann" == await getattr(db, name).scalar(question)
        token = tenant.set(0)
        async with db:
            assert not await getattr(db, name).scalar(question)
        tenant.reset(token)


async def in_tasks(session: uow.Session) -> None:
    await asyncio.gather(session.execute("SELECT 1"), session.execute("SELECT 2"))


async def on_the_other(session: uow.Session) -> None:
    """Read on the read session, which is waiting for this one."""
    reading = uow.current_read_session()
    while session is not reading and reading.own_lock.owner is None:
        await asyncio.sleep(0)
    await reading.execute("SELECT 1")


@pytest.mark.parametrize("on_begin", [in_tasks, on_the_other])
async def test_it_would_wait_for_itself(
    backend: Backend, on_begin: Callable[[uow.Session], Coroutine[Any, Any, None]]
) -> None:
    """Calls for which it would wait for ever are refused."""
    async with house(backend, on_begin=on_begin) as (db, _, __), asyncio.timeout(10):
        async with db:
            writing = asyncio.create_task(db.write.execute("SELECT 1"))
            reading = asyncio.create_task(reads_after(db))
            await asyncio.wait([writing, reading])
            assert isinstance(writing.exception(), errors.ConcurrentUseError)
            assert "on_begin has not returned" in str(writing.exception())
            reading.exception()  # where it has the writer's transaction, the same
            uow.set_rollback_only("nothing can be read")
        assert [0, 0] == checked_out(db)


async def in_parallel_read(_: uow.Session) -> None:
    async with uow.parallel_read() as session:
        await session.execute("SELECT 1")


async def in_a_unit(_: uow.Session) -> None:
    database = uow.current_read_session().sync_session.database
    async with uow.unit_of_work(database, independent=True) as unit:
        await unit.read_session().execute("SELECT 1")


@pytest.mark.parametrize("on_begin", [in_parallel_read, in_a_unit])
async def test_it_would_begin_for_ever(
    backend: Backend, on_begin: Callable[[uow.Session], Coroutine[Any, Any, None]]
) -> None:
    """What it opens would begin with it again: an error says so; nothing is held."""
    options: Any = {"on_begin": on_begin, "pool_size": 4}
    async with house(backend, **options) as (db, _, __), asyncio.timeout(10):
        with pytest.raises(
            errors.ConcurrentUseError, match="on_begin has not returned"
        ):
            async with db:
                await db.read.execute("SELECT 1")


async def reads_after(db: Database) -> None:
    """Read while the write session is used for the first time."""
    while not db.write.sync_session.connections:
        await asyncio.sleep(0)
    await db.read.execute("SELECT 3")


@on("aiosqlite")
async def test_in_memory() -> None:
    """Where reads use the writer's connection, its transaction has begun with it."""
    begun: list[object] = []

    async def on_begin(session: uow.Session) -> None:
        begun.append(await session.scalar("SELECT 1"))

    async with memory_database(on_begin=on_begin) as db:
        begun.clear()
        async with db:
            assert 0 == await db.read.scalar(shop.COUNT)
            await shop.insert(1)
            assert 1 == await db.read.scalar(shop.COUNT)
        assert [1] == begun


# Row-level security


class Base(AsyncAttrs, DeclarativeBase):
    """The tables of a house with tenants."""


class Flat(Base):
    """A flat, which belongs to a tenant."""

    __tablename__ = "flats"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    rooms: Mapped[list[Room]] = relationship()


class Room(Base):
    """A room, which belongs to a tenant too."""

    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    flat: Mapped[int] = mapped_column(ForeignKey("flats.id"))


TENANT = "current_setting('app.tenant', true)"
FLATS = (
    f"CREATE TABLE flats (id INTEGER PRIMARY KEY, tenant TEXT DEFAULT {TENANT})",
    (
        "CREATE TABLE rooms (id INTEGER PRIMARY KEY,"
        f" flat INTEGER REFERENCES flats (id), tenant TEXT DEFAULT {TENANT})"
    ),
    *(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in ("flats", "rooms")),
    *(
        f"CREATE POLICY own ON {table} USING (tenant = {TENANT})"
        for table in ("flats", "rooms")
    ),
    "INSERT INTO flats VALUES (1, '1'), (2, '2')",
    "INSERT INTO rooms VALUES (1, 1, '1'), (2, 2, '2'), (3, 1, '2')",
)


@asynccontextmanager
async def flats(backend: ServerBackend) -> AsyncGenerator[Database]:
    """Flats of which PostgreSQL shows a tenant no others."""
    await backend.execute(*FLATS)
    async with login(backend) as url:

        async def on_begin(session: uow.Session) -> None:
            number = str(tenant.get())
            await session.execute(f"SET LOCAL ROLE {url.username}")  # no superuser
            await session.execute(f"SELECT set_config('app.tenant', '{number}', true)")

        options: Any = {**POOL_OF_ONE, **backend.options, "on_begin": on_begin}
        db = Database.from_url(backend.url, **options)
        yield db
        assert [0, 0] == checked_out(db)
        await db.dispose()


@on("asyncpg", "psycopg", *POOLED)
async def test_row_level_security(backend: ServerBackend) -> None:
    """Two tenants take turns on one connection, and see their own rows alone."""
    async with flats(backend) as db:

        async def visit(number: int) -> None:
            tenant.set(number)
            async with db:
                flat = (await db.read.scalars(select(Flat))).one()
                assert number == flat.id
                rooms = [room.id for room in await flat.awaitable_attrs.rooms]
                assert [number] == rooms
                await db.read.refresh(flat, ["rooms"])
                async for room in await db.read.stream_scalars(select(Room)):
                    assert str(number) == room.tenant
                async with uow.parallel_read() as session:
                    assert str(number) == await session.scalar(select(Room.tenant))
                await db.write.execute("UPDATE flats SET id = id")
                assert number == (await db.write.scalars(select(Flat))).one().id
                assert number == await db.read.scalar(select(Flat.id))

        for number in (1, 2, 1):
            await visit(number)
        await asyncio.gather(*(visit(number) for number in (1, 2, 1, 2)))


@on("asyncpg", "psycopg", *POOLED)
async def test_nobodys_rows(backend: ServerBackend) -> None:
    """A write in the name of another tenant is refused by the database."""
    async with flats(backend) as db:
        with pytest.raises(Exception, match="row-level security"):
            async with db:
                await db.write.execute("INSERT INTO flats VALUES (3, '2')")
        async with db:
            db.write.add(Flat(id=4, tenant="1"))
            await db.write.execute("DELETE FROM rooms")

    assert [(1,), (2,), (4,)] == await backend.fetch("SELECT id FROM flats ORDER BY id")
    assert [(2,), (3,)] == await backend.fetch("SELECT id FROM rooms ORDER BY id")


@on("asyncpg", "psycopg")
async def test_search_path(backend: ServerBackend) -> None:
    """A schema for each tenant: unqualified names mean its tables."""
    for number in (1, 2):
        await backend.execute(
            f"CREATE SCHEMA tenant_{number}",
            f"CREATE TABLE tenant_{number}.items (id INTEGER)",
            f"INSERT INTO tenant_{number}.items VALUES ({number})",
        )

    async def on_begin(session: uow.Session) -> None:
        await session.execute(f"SET LOCAL search_path TO tenant_{tenant.get()}, public")

    db = Database.from_url(backend.url, on_begin=on_begin, **POOL_OF_ONE)
    for number in (1, 2, 1):
        tenant.set(number)
        async with db:
            assert number == await db.read.scalar(shop.SELECT)
            await shop.insert(10 * number)
            assert number == await db.read.scalar(shop.SELECT)
    await db.dispose()


@on("asyncpg", "psycopg")
async def test_page(backend: ServerBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows does what the page says."""
    [sql] = re.findall(r"```sql\n(.*?)```", TENANTS.read_text("utf-8"), re.DOTALL)
    await backend.execute(*sql.strip().split(";\n"))
    async with login(backend) as url:
        shown = url.render_as_string(hide_password=False)
        monkeypatch.setenv("DATABASE_URL", shown)
        await anyio.to_thread.run_sync(run_blocks, TENANTS)


# What is refused


class Begin:
    """An object that is called as an async function is."""

    async def __call__(self, session: AsyncSession) -> None:
        await session.connection()


async def test_an_object_that_is_called(backend: Backend) -> None:
    """An object with an async `__call__` will do."""
    async with shop_database(backend, on_begin=Begin()) as db, db:
        assert 0 == await db.read.scalar(shop.COUNT)


@on("aiosqlite")
@pytest.mark.parametrize("wrong", ["SET ROLE x", print, dict, Begin])
def test_no_async_function(wrong: Any) -> None:
    """What is no async function is refused when the database is made."""
    with pytest.raises(errors.ConfigurationError, match="on_begin must be an async"):
        Database.from_url("sqlite:///app.db", on_begin=wrong)
    with pytest.raises(errors.ConfigurationError, match="on_begin must be an async"):
        Database(create_async_engine("sqlite+aiosqlite:///app.db"), on_begin=wrong)
