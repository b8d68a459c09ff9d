"""The ASGI shell, beyond the promises."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_uow import (
    CausalReads,
    Database,
    Outcome,
    Session,
    UnitOfWork,
    UnitOfWorkMiddleware,
    after_commit,
    after_response,
    after_rollback,
    before_commit,
    current_read_session,
    current_session,
    current_unit_of_work,
)
from asgi_uow.errors import (
    BeforeCommitError,
    CommitFailedError,
    ConfigurationError,
    NoUnitOfWorkError,
    OutcomeUnknownError,
    PartialCommitError,
    ReadOnlySessionError,
    UnitOfWorkClosedError,
    UnknownDatabaseError,
)
from asgi_uow.observers import CommitFailed, ReleaseFailed, UnitFinished
from tests.support import shop
from tests.support.asgi import (
    START,
    endpoint,
    handle,
    http_scope,
    no_body,
    request,
    respond,
    serve,
)
from tests.support.databases import SERVERS, checked_out, on, shop_database
from tests.support.observer import Events
from tests.support.private import Cause, State
from tests.support.shop import Item

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from asgi_uow.observers import Event
    from tests.servers.backend import Backend, MariaDBBackend, PostgreSQLBackend

pytestmark = on("aiosqlite")


async def nothing() -> None:
    """Handle a request without touching anything."""


# Mounting


def test_needs_a_database() -> None:
    """The middleware without a database says what is missing."""
    with pytest.raises(TypeError, match="pass at least one Database"):
        UnitOfWorkMiddleware(endpoint(nothing))


async def test_mounted_twice_passes_through(db: Database, backend: Backend) -> None:
    """The inner of two middlewares for the same database leaves it to the outer."""
    units: list[UnitOfWork] = []

    async def handler() -> None:
        units.append(current_unit_of_work())
        await shop.insert(1)

    inner = UnitOfWorkMiddleware(endpoint(handler), db)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(current_unit_of_work())
        await inner(scope, receive, send)

    await serve(between, db)

    assert units[0] is units[1]
    assert [1] == await shop.items(backend)


async def test_inner_middleware_with_another_database(
    db: Database, mariadb: MariaDBBackend, backend: Backend
) -> None:
    """An inner middleware for another database has a unit of its own.

    Sessions of the outer database are still reached through it.
    """
    async with shop_database(mariadb) as other:

        async def handler() -> None:
            assert current_unit_of_work().databases == (other,)
            await shop.insert(1)
            await current_session(db).execute("INSERT INTO items (id) VALUES (2)")

        inner = UnitOfWorkMiddleware(endpoint(handler), other)
        scope = http_scope()

        response = await request(UnitOfWorkMiddleware(inner, db), scope=scope)

        assert 200 == response.status
        assert [1] == await shop.items(mariadb)
        assert [2] == await shop.items(backend)
        assert scope["asgi_uow.unit"] is None


async def test_nested_request_with_its_own_scope_is_its_own_unit(
    mariadb: MariaDBBackend,
) -> None:
    """A request made in process, inside a handler, has an outcome of its own."""
    async with shop_database(mariadb) as db:

        async def inner() -> None:
            await shop.insert(1)

        async def outer() -> None:
            await handle(inner, db)
            await shop.insert(2)

        await handle(outer, db, status=500)

        assert [1] == await shop.items(mariadb)


async def test_copied_scope_after_the_decision_is_a_new_unit(
    db: Database, backend: Backend
) -> None:
    """A scope used again once its unit is decided does not get that unit."""

    async def inner() -> None:
        await shop.insert(2)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        await respond(send)
        await request(
            UnitOfWorkMiddleware(endpoint(inner), db),
            scope=dict(scope),
        )

    await serve(app, db)

    assert [1, 2] == await shop.items(backend)


async def test_websocket_has_no_unit(db: Database, backend: Backend) -> None:
    """A websocket handler has no unit, also in a leaked context, and opens its own."""
    refused: list[str] = []

    async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(NoUnitOfWorkError, match="once per message") as caught:
            current_session()
        refused.append(str(caught.value))
        async with db:
            await shop.insert(1)

    app = UnitOfWorkMiddleware(websocket, db)

    async def handler() -> None:
        await app({"type": "websocket"}, no_body, _forget)

    await handle(handler, db)

    assert 1 == len(refused)
    assert [1] == await shop.items(backend)


async def _forget(message: Message) -> None:
    """Drop a message."""


@pytest.mark.parametrize("outcome", ["complete", "failed"])
async def test_engines_are_closed_after_the_lifespan(
    mariadb: MariaDBBackend, outcome: str
) -> None:
    """Engines made by from_url are disposed of before the server hears of the end."""
    counts: list[int] = []

    async with shop_database(mariadb) as db:

        async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
            with pytest.raises(NoUnitOfWorkError):
                current_session()
            await send({"type": "lifespan.startup.complete"})
            async with db:
                await shop.insert(1)
            await send({"type": f"lifespan.shutdown.{outcome}"})

        async def server(message: Message) -> None:
            counts.append(db.engine.sync_engine.pool.checkedin())  # type: ignore[attr-defined]

        app = UnitOfWorkMiddleware(lifespan, db)
        await app({"type": "lifespan"}, no_body, server)

    assert [0, 0] == counts


async def test_engines_of_the_user_are_left_open(db: Database) -> None:
    """An engine that was passed in is closed by whoever made it."""
    mine = Database(db.engine)

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        async with mine:
            await shop.insert(1)
            await mine.read.execute("SELECT 1")
        await send({"type": "lifespan.shutdown.complete"})

    await UnitOfWorkMiddleware(lifespan, mine)({"type": "lifespan"}, no_body, _forget)

    assert 1 == db.engine.sync_engine.pool.checkedin()  # type: ignore[attr-defined]
    assert 0 == mine.read_engine.sync_engine.pool.checkedin()  # type: ignore[attr-defined]


async def test_other_messages_pass_untouched(db: Database) -> None:
    """Hints before the start, trailers after it: nothing else is looked at."""
    sent = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.early_hint", "links": [b"</a.css>"]},
        {"type": START, "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.pathsend", "path": "/tmp/file"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in sent:
            await send(message)

    response = await serve(app, db)

    assert sent == response.messages


# Answering a failure


async def test_broken_commit_when_is_a_failure(db: Database, backend: Backend) -> None:
    """A commit_when that raises keeps nothing and answers an error."""

    def commit_when(status: int, headers: object) -> bool:
        raise ZeroDivisionError

    async def handler() -> None:
        await shop.insert(1)

    response = await handle(handler, db, commit_when=commit_when)

    assert 500 == response.status
    assert isinstance(response.error, CommitFailedError)
    assert isinstance(response.error.__cause__, ZeroDivisionError)
    assert [] == await shop.items(backend)


async def test_commit_when_sees_status_and_headers(
    db: Database, backend: Backend
) -> None:
    """commit_when decides by what the response says; the response stays."""
    seen: list[object] = []

    def commit_when(status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        seen.append((status, headers))
        return False

    async def handler() -> None:
        await shop.insert(1)

    response = await handle(handler, db, commit_when=commit_when)

    assert [(200, [])] == seen
    assert 200 == response.status
    assert [] == await shop.items(backend)


# The database out of reach


# The end


async def test_before_commit_runs_inside_the_transaction(
    db: Database, backend: Backend
) -> None:
    """before_commit hooks write in the same transaction, also those they register."""

    async def enqueue() -> None:
        await shop.insert(2)
        before_commit(shop.insert, 3)

    async def handler() -> None:
        before_commit(enqueue)
        await shop.insert(1)

    response = await handle(handler, db, probe=lambda: shop.items(backend))

    assert [[1, 2, 3]] == response.seen


async def test_flush_may_register_before_commit(db: Database, backend: Backend) -> None:
    """A hook registered while the session is flushed still runs before COMMIT."""

    async def handler() -> None:
        session = current_session()
        session.add(Item(id=1))
        event.listen(
            session.sync_session,
            "before_flush",
            lambda *_: before_commit(shop.insert, 2),
        )

    await handle(handler, db)

    assert [1, 2] == await shop.items(backend)


async def test_change_on_the_read_session_is_never_lost(
    db: Database, backend: Backend
) -> None:
    """What nobody would ever flush fails the request instead of being dropped."""
    fired: list[str] = []

    async def add() -> None:
        await shop.insert(1)
        current_read_session().add(Item(id=2))
        after_commit(fired.append, "hook")

    async def change() -> None:
        item = await current_read_session().get_one(Item, 3)
        item.id = 4

    await backend.execute("INSERT INTO items (id) VALUES (3)")
    for handler in (add, change):
        response = await handle(handler, db)

        assert 500 == response.status
        assert isinstance(response.error, CommitFailedError)
        assert isinstance(response.error.__cause__, ReadOnlySessionError)
    assert [] == fired
    assert [3] == await shop.items(backend)


@pytest.mark.parametrize("kind", ["raises", "hangs", "goes on after its time"])
async def test_before_commit_stops_the_commit(
    db: Database, backend: Backend, kind: str
) -> None:
    """A before_commit hook that raises or hangs has everything rolled back.

    So has one that returns all the same when it is cancelled.
    """
    fired: list[str] = []
    events: list[Event] = []

    async def refuse() -> None:
        if kind == "raises":
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if kind == "hangs":
                raise

    async def handler() -> None:
        await shop.insert(1)
        before_commit(refuse)
        before_commit(fired.append, "second")
        after_commit(fired.append, "commit")
        after_rollback(fired.append, "rollback")

    response = await handle(handler, db, hook_timeout=0.05, observers=[events.append])

    cause = Cause.BEFORE_COMMIT if kind == "raises" else Cause.TIMEOUT
    assert 500 == response.status
    assert isinstance(response.error, BeforeCommitError)
    assert "refuse" in str(response.error)
    assert ["rollback"] == fired
    assert [] == await shop.items(backend)
    failed, finished = Events(events).results
    assert isinstance(failed, CommitFailed)
    assert isinstance(finished, UnitFinished)
    assert (Outcome.ROLLED_BACK, cause) == (finished.outcome, finished.cause)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_before_commit_that_ends_the_process_stops_the_commit(
    db: Database, backend: Backend, kind: type[BaseException]
) -> None:
    """What is no `Exception` rolls back as well, and is raised as it is."""
    fired: list[str] = []
    raised = kind()

    async def leave() -> None:
        raise raised

    async def handler() -> None:
        await shop.insert(1)
        before_commit(leave)
        after_commit(fired.append, "commit")
        after_rollback(fired.append, "rollback")

    with pytest.raises(kind) as caught:
        await handle(handler, db)

    assert raised is caught.value
    assert ["rollback"] == fired
    assert [] == await shop.items(backend)


@pytest.mark.parametrize("answer", ["nothing", "success"])
async def test_cancelled_before_commit_rolls_back(
    db: Database, backend: Backend, answer: str
) -> None:
    """A cancellation before COMMIT is sent rolls back and cannot become a success."""
    reached = asyncio.Event()
    units: list[UnitOfWork] = []

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        units.append(current_unit_of_work())
        await shop.insert(1)
        before_commit(hang)
        try:
            await respond(send)
        finally:
            if answer == "success":
                await respond(send)

    task = asyncio.create_task(serve(app, db))
    await reached.wait()
    task.cancel()
    if answer == "nothing":
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        response = await task
        assert 500 == response.status
        assert isinstance(response.error, CommitFailedError)

    assert Outcome.ROLLED_BACK is units[0].outcome
    assert Cause.CANCELLED is units[0].cause
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


async def test_no_hook_can_be_registered_after_the_decision(db: Database) -> None:
    """Registering after the start is refused: the hook would never run."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)
        with pytest.raises(UnitOfWorkClosedError):
            after_commit(print)

    response = await serve(app, db)

    assert response.error is None


async def test_after_response_runs_when_the_app_has_returned(db: Database) -> None:
    """after_response comes after the body and after the app's own last word."""
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        after_response(order.append, "after_response")
        after_commit(order.append, "after_commit")
        await respond(send)
        order.append("app returns")

    await serve(app, db)

    assert ["after_commit", "app returns", "after_response"] == order


async def test_send_in_a_task_of_its_own_is_waited_for(
    mariadb: MariaDBBackend,
) -> None:
    """An app that returns while its own task is still committing is waited for."""
    units: list[UnitOfWork] = []
    tasks: list[asyncio.Task[None]] = []

    async with mariadb.proxy() as proxy:
        await shop.create(mariadb)
        db = Database.from_url(mariadb.through(proxy.port))
        hold = proxy.hold_answer(lambda trip: trip == "COMMIT")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            units.append(current_unit_of_work())
            await shop.insert(1)
            tasks.append(asyncio.create_task(respond(send)))
            await hold.fired.wait()

        serving = asyncio.create_task(serve(app, db))
        await hold.answered.wait()
        assert not serving.done()
        assert State.COMMITTING is units[0].state
        hold.release()
        await serving
        await tasks[0]

        assert Outcome.COMMITTED is units[0].outcome
        assert [1] == await shop.items(mariadb)
        await db.dispose()


# Outcomes in doubt


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("how", ["cut_after", "cut_before"])
async def test_unknown_is_resolved_on_postgresql(
    postgresql: PostgreSQLBackend, how: str, driver: str
) -> None:
    """resolve_unknown: a lost answer is settled by asking for the transaction id."""
    fired: list[str] = []
    units: list[UnitOfWork] = []

    async def handler() -> None:
        units.append(current_unit_of_work())
        await shop.insert(1)
        after_commit(fired.append, "commit")
        after_rollback(fired.append, "rollback")

    async with postgresql.proxy() as proxy:
        await shop.create(postgresql)
        url = postgresql.through(proxy.port).replace("asyncpg", driver)
        db = Database.from_url(url, resolve_unknown=True)
        cut = proxy.cut_after if how == "cut_after" else proxy.cut_before
        cut(lambda trip: trip == "COMMIT")

        response = await handle(handler, db)

        kept = how == "cut_after"
        assert (Outcome.COMMITTED if kept else Outcome.ROLLED_BACK) is units[0].outcome
        assert (200 if kept else 503) == response.status
        assert ["commit" if kept else "rollback"] == fired
        assert ([1] if kept else []) == await shop.items(postgresql)
        assert [0, 0] == checked_out(db)
        await db.dispose()


async def test_resolved_commit_is_seen_by_the_next_request(
    postgresql: PostgreSQLBackend,
) -> None:
    """A client whose COMMIT was found to be kept is told what it has to see."""
    async with postgresql.proxy() as proxy:
        await shop.create(postgresql)
        url = postgresql.through(proxy.port)
        db = Database.from_url(url, read_urls=[postgresql.url], resolve_unknown=True)
        proxy.cut_after(lambda trip: trip == "COMMIT")
        causal_reads = CausalReads("a secret of many bytes")
        handler = endpoint(lambda: shop.insert(1))

        response = await serve(handler, db, causal_reads=causal_reads)

        assert 200 == response.status
        assert "set-cookie" in response.headers
        await db.dispose()


async def test_resolved_commit_goes_on_with_the_next_database(
    postgresql: PostgreSQLBackend, sqlite: Backend
) -> None:
    """A COMMIT found to be kept is followed by those of the other databases."""
    async with postgresql.proxy() as proxy, shop_database(sqlite) as second:
        await shop.create(postgresql)
        first = Database.from_url(postgresql.through(proxy.port), resolve_unknown=True)
        proxy.cut_after(lambda trip: trip == "COMMIT")

        async def handler() -> None:
            await shop.insert(1)
            session = current_session(second)
            await session.execute("INSERT INTO items (id) VALUES (2)")

        response = await handle(handler, first, second)

        assert 200 == response.status
        assert [1] == await shop.items(postgresql)
        assert [2] == await shop.items(sqlite)
        assert [0, 0, 0, 0] == checked_out(first, second)
        await first.dispose()


@pytest.mark.parametrize("savepoint_open", [False, True])
async def test_listener_that_raises_after_commit(
    db: Database, backend: Backend, savepoint_open: bool
) -> None:
    """A SQLAlchemy listener that raises after COMMIT does not make it a rollback."""
    fired: list[str] = []
    events: list[Event] = []

    def broken(session: object) -> None:
        if session_of_request[0].get_nested_transaction() is None:
            raise ZeroDivisionError

    session_of_request: list[Session] = []

    async def handler() -> None:
        session_of_request.append(current_session())
        event.listen(current_session().sync_session, "after_commit", broken)
        await shop.insert(1)
        if savepoint_open:
            await current_session().begin_nested().start()
        after_commit(fired.append, "commit")
        after_rollback(fired.append, "rollback")

    response = await handle(handler, db, observers=[events.append])

    assert 200 == response.status
    assert ["commit"] == fired
    assert [1] == await shop.items(backend)
    kinds = [type(each) for each in Events(events).results]
    assert [ReleaseFailed, UnitFinished] == kinds
    assert [0, 0] == checked_out(db)


def test_resolve_unknown_is_for_postgresql() -> None:
    """Only PostgreSQL can be asked."""
    with pytest.raises(ConfigurationError, match="PostgreSQL only"):
        Database.from_url("sqlite:///app.db", resolve_unknown=True)


@on(*SERVERS)
@pytest.mark.parametrize("how", ["cut_after", "cut_before", "timeout"])
async def test_lost_answer_to_commit_is_unknown(
    backend: MariaDBBackend | PostgreSQLBackend, how: str
) -> None:
    """COMMIT without an answer: plain 500, no hook of either kind, no connection."""
    fired: list[str] = []
    units: list[UnitOfWork] = []
    events: list[Event] = []

    async def handler() -> None:
        units.append(current_unit_of_work())
        await shop.insert(1)
        after_commit(fired.append, "commit")
        after_rollback(fired.append, "rollback")

    def is_commit(trip: str) -> bool:
        return trip == "COMMIT"

    async with backend.proxy() as proxy:
        await shop.create(backend)
        db = Database.from_url(backend.through(proxy.port))
        if how == "timeout":
            proxy.hold_answer(is_commit)
        elif how == "cut_after":
            proxy.cut_after(is_commit)
        else:
            proxy.cut_before(is_commit)

        response = await handle(
            handler,
            db,
            observers=[events.append],
            commit_timeout=0.2 if how == "timeout" else 30,
        )

        assert 500 == response.status
        assert "retry-after" not in response.headers
        assert isinstance(response.error, OutcomeUnknownError)
        assert Outcome.UNKNOWN is units[0].outcome
        assert [] == fired
        assert [0, 0] == checked_out(db)
        assert ([] if how == "cut_before" else [1]) == await shop.items(backend)
        assert [CommitFailed, UnitFinished] == [
            type(each)
            for each in Events(events).results
            if not isinstance(each, ReleaseFailed)
        ]
        await db.dispose()


DOUBTFUL_TRIGGER = (
    (
        "CREATE FUNCTION doubt() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'who knows' USING ERRCODE = '40003'; END $$"
    ),
    (
        "CREATE CONSTRAINT TRIGGER doubt AFTER INSERT ON items"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doubt()"
    ),
)


async def test_server_that_says_it_does_not_know(
    postgresql: PostgreSQLBackend,
) -> None:
    """SQLSTATE 40003 at COMMIT is UNKNOWN, although the connection lives."""
    async with shop_database(postgresql) as db:
        await postgresql.execute(*DOUBTFUL_TRIGGER)

        response = await handle(lambda: shop.insert(1), db)

        assert 500 == response.status
        assert isinstance(response.error, OutcomeUnknownError)
        assert [0, 0] == checked_out(db)


async def test_second_database_failing_is_partial(
    sqlite: Backend, mariadb: MariaDBBackend
) -> None:
    """The first database committed, the second failed: PARTIAL, 500, no hook."""
    fired: list[str] = []
    async with shop_database(mariadb) as first, shop_database(sqlite) as second:

        async def handler() -> None:
            await shop.insert(1)
            session = current_session(second)
            await session.execute("INSERT INTO items VALUES (2, 404)")
            after_commit(fired.append, "commit")
            after_rollback(fired.append, "rollback")

        response = await handle(handler, first, second)

        assert 500 == response.status
        assert isinstance(response.error, PartialCommitError)
        assert Outcome.PARTIAL is response.error.outcome
        assert [] == fired
        assert [1] == await shop.items(mariadb)
        assert [] == await shop.items(sqlite)
        assert [0, 0, 0, 0] == checked_out(first, second)


async def test_two_phase_commit_beside_a_stream(mariadb: MariaDBBackend) -> None:
    """A stream that nobody has read to its end is closed before the preparation."""
    await shop.create(mariadb)
    db = Database(create_async_engine(mariadb.url), twophase=True)

    async def handler() -> None:
        await shop.insert(1)
        await current_session().stream("SELECT seq FROM seq_1_to_1000")

    response = await handle(handler, db)

    assert 200 == response.status
    assert [1] == await shop.items(mariadb)
    assert [0, 0] == checked_out(db)
    await db.dispose()


async def test_two_phase_commit(mariadb: MariaDBBackend, sqlite: Backend) -> None:
    """twophase=True: prepared everywhere before the first COMMIT; all or nothing."""
    await shop.create(mariadb)
    await mariadb.execute("CREATE TABLE more (id INTEGER PRIMARY KEY)")
    first = Database(create_async_engine(mariadb.url), twophase=True)
    second = Database(create_async_engine(mariadb.url), twophase=True)

    async def handler() -> None:
        await current_session(first).execute("INSERT INTO items (id) VALUES (1)")
        await current_session(second).execute("INSERT INTO more (id) VALUES (2)")

    async def lose_the_second() -> None:
        await current_session(first).execute("INSERT INTO items (id) VALUES (3)")
        session = current_session(second)
        thread = await session.scalar("SELECT connection_id()")
        await session.execute("INSERT INTO more (id) VALUES (4)")
        await mariadb.execute(f"KILL {thread}")

    response = await handle(handler, first, second)
    failed = await handle(lose_the_second, first, second)

    assert 200 == response.status
    assert 503 == failed.status
    assert isinstance(failed.error, CommitFailedError)
    assert [1] == await shop.items(mariadb)
    assert [(2,)] == await mariadb.fetch("SELECT id FROM more")
    assert [0, 0, 0, 0] == checked_out(first, second)
    for db in (first, second):
        await db.dispose()


async def test_first_database_failing_keeps_nothing(
    sqlite: Backend, mariadb: MariaDBBackend
) -> None:
    """The first COMMIT failed: the second is not sent, nothing is kept."""
    async with shop_database(sqlite) as first, shop_database(mariadb) as second:

        async def handler() -> None:
            await current_session().execute("INSERT INTO items VALUES (1, 404)")
            await current_session(second).execute("INSERT INTO items VALUES (2, 1)")

        response = await handle(handler, first, second)

        assert 500 == response.status
        assert isinstance(response.error, CommitFailedError)
        assert [] == await shop.items(sqlite)
        assert [] == await shop.items(mariadb)


async def test_unknown_database_is_named(
    db: Database, tmp_path_factory: object
) -> None:
    """A database that nobody told the middleware of is named in the error."""
    stranger = Database.from_url("sqlite:///stranger.db")

    async def handler() -> None:
        for accessor in (
            current_session,
            current_unit_of_work().read_session,
        ):
            with pytest.raises(UnknownDatabaseError, match=r"stranger\.db"):
                accessor(stranger)

    response = await handle(handler, db)

    assert 200 == response.status
