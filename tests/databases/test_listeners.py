"""What configures the writer configures the readers: listeners on `db.engine`."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import Database, current_session
from asgi_uow.errors import ConfigurationError, ReadOnlySessionError
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import DRIVERS, SERVER_DRIVERS, login, memory_database, on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.servers import Backend, PostgreSQLBackend, ServerBackend, SQLiteBackend

pytestmark = on(*DRIVERS)
on_servers = on(*SERVER_DRIVERS)
made = pytest.mark.parametrize("made", ["from URLs", "after", "before"])


@asynccontextmanager
async def listening(
    url: sa.URL | str, made: str, **listeners: Callable[..., Any]
) -> AsyncGenerator[Database]:
    """A database whose engine has listeners; its replica, if any, is the same server.

    An engine that was passed in gets them before or after, or before a second use.
    """

    def listen() -> None:
        for name, listener in listeners.items():
            options = {"retval": True} if name.startswith("before") else {}
            event.listen(engine.sync_engine, name, listener, **options)

    if made == "from URLs":
        db = Database.from_url(url, read_urls=[url])
        engine = db.engine
    else:
        engine = create_async_engine(url)
        if made == "before":
            listen()
        Database(engine)  # another that uses it changes nothing
        db = Database(engine)
    if made != "before":
        listen()
    try:
        yield db
    finally:
        await db.dispose()


async def ask_everybody(db: Database, question: str) -> list[object]:
    """Ask on the write session, the read session, and each engine."""
    async with db:
        answers = [await db.read.scalar(question), await db.write.scalar(question)]
    for engine in db.engines:
        async with engine.connect() as connection:
            answers.append(await connection.scalar(sa.text(question)))
    return answers


@made
def test_names_of_engines(made: str) -> None:
    """`db.engines` names the writer, its read engine and the replicas."""
    url = "sqlite+aiosqlite:///app.db"
    if made == "from URLs":
        db = Database.from_url(url, read_urls=[url])
        assert (db.engine, db.read_engine, *db.readers) == db.engines
    else:
        replica = create_async_engine(url)
        readers = [replica] if made == "after" else []
        db = Database(create_async_engine(url), readers=readers)
        assert (db.engine, db.read_engine, *readers) == db.engines
    assert len(set(db.engines)) == len(db.engines)


async def test_name_of_the_only_engine() -> None:
    """An in-memory database has one."""
    async with memory_database() as db:
        assert (db.engine,) == db.engines


@on_servers
@made
async def test_token(backend: ServerBackend, made: str) -> None:
    """A password that changes is asked for by whoever connects, whatever for."""
    async with login(backend) as url:
        tokens = ["right"]

        def give_token(_: object, __: object, ___: object, options: Any) -> None:
            options["password"] = tokens[-1]

        outdated = url.set(password="outdated")
        async with listening(outdated, made, do_connect=give_token) as db:
            for token in ("first", "second"):
                user = f"{url.username} {'IDENTIFIED BY' * (url.drivername < 'n')}"
                word = "" if backend.name == "mariadb" else "PASSWORD"
                await backend.execute(f"ALTER USER {user} {word} '{token}'")
                tokens.append(token)
                await db.dispose()
                assert {7} == set(await ask_everybody(db, "SELECT 7"))
                await db.dispose()
                health = await db.check(timeout=10)
                assert health.ok
                assert all(each.ok for each in health.readers)
            await cancel(backend, db)


async def cancel(backend: ServerBackend, db: Database) -> None:
    """Stop a slow statement of each session, which takes another connection."""
    for name in ("read", "write"):

        async def execute(name: str = name) -> None:
            async with db:
                await getattr(db, name).execute(backend.slow)

        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await eventually(1, lambda: backend.running(backend.slow))
            group.cancel_scope.cancel()
        await eventually(0, lambda: backend.running(backend.slow))


@on("aiosqlite")
@made
async def test_function(backend: SQLiteBackend, made: str) -> None:
    """A function that is registered at connect can be called by every statement."""

    def register(dbapi: Any, _: object) -> None:
        dbapi.create_function("seven", 0, lambda: 7)

    async with listening(backend.url, made, connect=register) as db:
        assert {7} == set(await ask_everybody(db, "SELECT seven()"))
        await db.dispose()
        assert {7} == set(await ask_everybody(db, "SELECT seven()"))


@on("aiosqlite")
@made
async def test_function_after_dispose(backend: SQLiteBackend, made: str) -> None:
    """So can one that is registered while the engine begins with another pool."""
    async with listening(backend.url, made) as db:
        await ask_everybody(db, "SELECT 6")
        await db.dispose()

        @event.listens_for(db.engine.sync_engine, "connect")
        def register(dbapi: Any, _: object) -> None:
            dbapi.create_function("seven", 0, lambda: 7)

        assert {7} == set(await ask_everybody(db, "SELECT seven()"))


@on("asyncpg")
@made
async def test_type_codec(backend: PostgreSQLBackend, made: str) -> None:
    """A codec that is set at connect decodes what every statement finds."""

    async def set_codec(raw: Any) -> None:
        await raw.set_type_codec(
            "macaddr", schema="pg_catalog", encoder=str, decoder="<{}>".format
        )

    def connected(dbapi: Any, _: object) -> None:
        dbapi.run_async(set_codec)

    question = "SELECT CAST('08002b-010203' AS macaddr)"
    async with listening(backend.url, made, connect=connected) as db:
        assert {"<08:00:2b:01:02:03>"} == set(await ask_everybody(db, question))


SETTINGS = {
    "mariadb": ("SET @seven = 7", "SELECT @seven"),
    "postgresql": ("SET search_path TO seven", "SELECT current_setting('search_path')"),
    "sqlite": ("PRAGMA cache_size = 7", "PRAGMA cache_size"),
}


@made
@pytest.mark.parametrize("ended", [True, False])
async def test_setting(backend: Backend, made: str, ended: bool) -> None:
    """A setting made at connect lasts, also if its transaction was left open."""
    statement, question = SETTINGS[backend.name]

    def connected(dbapi: Any, _: object) -> None:
        with closing(dbapi.cursor()) as cursor:
            cursor.execute(statement)
        if ended:
            dbapi.commit()

    async with listening(backend.url, made, connect=connected) as db:
        answers = [await ask_everybody(db, question) for _ in range(2)]
        for found in answers:
            assert {"7", "seven"} >= set(map(str, found))


@pytest.mark.parametrize("name", ["connect", "first_connect"])
async def test_before_all_others(backend: Backend, name: str) -> None:
    """A listener that comes first may leave a transaction open."""
    statement, question = SETTINGS[backend.name]

    def connected(dbapi: Any, _: object) -> None:
        with closing(dbapi.cursor()) as cursor:
            cursor.execute(statement)

    async with listening(backend.url, "after") as db:
        event.listen(db.engine.sync_engine, name, connected, insert=True)
        # On the first connection SQLAlchemy rolls that back.
        assert 4 == len(await ask_everybody(db, question))


@made
async def test_statements(backend: Backend, made: str) -> None:
    """A listener sees, and may change, each statement of every engine, once."""
    seen: list[str] = []

    def comment(*of: Any) -> tuple[str, object]:
        seen.append(of[2])
        return of[2].replace("6", "7"), of[3]

    async with listening(backend.url, made, before_cursor_execute=comment) as db:
        answers = await ask_everybody(db, "SELECT 6")
        assert [7] * len(answers) == answers
        assert ["SELECT 6"] * len(answers) == seen
        assert (await db.check(timeout=10)).ok
    assert len(answers) < len(seen)


async def test_listening_later(backend: Backend) -> None:
    """A listener that is attached while there are connections sees the next ones."""
    seen: list[object] = []
    async with listening(backend.url, "from URLs") as db:
        await ask_everybody(db, "SELECT 6")
        target = db.engine.sync_engine
        for name in ("checkout", "do_execute", "before_cursor_execute"):

            def note(*_: object, name: str = name) -> None:
                seen.append(name)

            event.listen(target, name, note)
        answers = await ask_everybody(db, "SELECT 6")
    expected = ["checkout", "before_cursor_execute", "do_execute"]
    assert expected * len(answers) == seen


async def test_listening_beside_an_observer(db: Database) -> None:
    """What notes how long statements take calls listeners on them as SQLAlchemy does.

    One that has sent something in place of the statement says so.
    """
    names, seen = ("do_execute", "do_executemany", "do_execute_no_params"), list[str]()

    def send_another(cursor: Any, statement: str, *_: object) -> bool:
        is_it = statement == "SELECT 6"
        if is_it:
            cursor.execute("SELECT 7", ())
        return is_it

    async def work() -> None:
        session = current_session()
        await session.execute(sa.insert(shop.Item), [{"id": 1}, {"id": 2}])
        connection = await session.connection()
        plain = {"no_parameters": True}
        await connection.exec_driver_sql(shop.COUNT, execution_options=plain)
        answers.append(await session.scalar("SELECT 6"))
        answers.append(await session.scalar(shop.COUNT))

    answers = list[object]()
    for name in names:

        def note(*_: object, name: str = name) -> None:
            seen.append(name)

        event.listen(db.engine.sync_engine, name, note)
    event.listen(db.engine.sync_engine, "do_execute", send_another)
    response = await handle(work, db, deadline=60.0)
    assert response.error is None
    assert [7, 2] == answers
    assert set(names) == set(seen)


async def test_class_of_engines(sqlite: SQLiteBackend) -> None:
    """A listener on all engines there are is called once for each statement."""
    seen: list[str] = []

    def note(*of: Any) -> None:
        seen.append(of[2])

    event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        async with listening(sqlite.url, "from URLs") as db:
            answers = await ask_everybody(db, "SELECT 6")
    finally:
        event.remove(sa.Engine, "before_cursor_execute", note)
    assert ["SELECT 6"] * len(answers) == seen


WRITABLE = {
    "mariadb": "SET SESSION TRANSACTION READ WRITE",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "sqlite": "PRAGMA query_only = OFF",
}


@made
async def test_a_listener_makes_no_reader_writable(backend: Backend, made: str) -> None:
    """Whatever a listener has set, the database refuses to write for a read session."""
    await shop.create(backend)

    def connected(dbapi: Any, _: object) -> None:
        with closing(dbapi.cursor()) as cursor:
            cursor.execute(WRITABLE[backend.name])

    async with listening(backend.url, made, connect=connected) as db, db:
        with pytest.raises(ReadOnlySessionError):
            await db.read.execute("INSERT INTO items (id) VALUES (1)")
    assert [] == await shop.items(backend)


async def test_first_connections_at_once(backend: Backend) -> None:
    """Writer and readers that connect at the same time do so for the first time."""
    async with listening(backend.url, "from URLs") as db:
        together = (ask_everybody(db, "SELECT 7") for _ in range(3))
        assert {7} == set().union(*await asyncio.gather(*together))


@pytest.mark.parametrize("other", ["postgresql+psycopg", "mysql"])
def test_replica_of_another_driver(other: str) -> None:
    """What configures a connection of one driver cannot configure another's."""
    with pytest.raises(ConfigurationError, match="read_urls have to name"):
        Database.from_url("postgresql://h/app", read_urls=[f"{other}://h/app"])
