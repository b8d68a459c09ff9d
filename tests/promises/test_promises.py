"""The promises of the design, each on every database it speaks of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.servers.backend import MariaDBBackend
from tests.support import shop
from tests.support.asgi import (
    BODY,
    START,
    Response,
    endpoint,
    handle,
    request,
    respond,
    serve,
)
from tests.support.databases import (
    SERVERS,
    behind_proxy,
    checked_out,
    is_commit,
    on,
    shop_database,
)

if TYPE_CHECKING:
    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, ServerBackend


# P1


async def test_p1_committed_before_the_start_leaves(
    db: Database, backend: Backend
) -> None:
    """P1: when the start of a success arrives, others already see the row."""
    response = await handle(
        lambda: shop.insert(1), db, probe=lambda: shop.items(backend)
    )

    assert [[1]] == response.seen
    assert [START, BODY] == response.types


# P2


async def test_p2_failed_commit_is_an_error_response(
    db: Database, backend: Backend
) -> None:
    """P2: a COMMIT that fails is one error response; nothing after it is sent."""
    fired: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for register in (uow.after_commit, uow.after_response, uow.after_rollback):
            register(fired.append, register.__name__)
        await shop.insert_then_break_commit(backend, 1)
        with pytest.raises(errors.CommitFailedError) as caught:
            await respond(send)
        raise caught.value

    response = await serve(app, db)

    lost = isinstance(backend, MariaDBBackend)
    assert [START, BODY] == response.types
    assert (503 if lost else 500) == response.status
    assert lost == ("retry-after" in response.headers)
    assert isinstance(response.error, errors.CommitFailedError)
    assert uow.Outcome.ROLLED_BACK is response.error.outcome
    assert ["after_rollback"] == fired
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)


async def test_p2_next_request_does_not_commit_the_failed_one(
    db: Database, backend: Backend
) -> None:
    """P2: after a failed COMMIT the pooled connection is clean."""
    await handle(lambda: shop.insert_then_break_commit(backend, 1), db)
    response = await handle(lambda: shop.insert(2), db)

    assert 200 == response.status
    assert [2] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


async def test_p2_app_that_swallows_the_failure_cannot_hide_it(
    db: Database, backend: Backend
) -> None:
    """P2: an app that catches what send() raised still answers an error."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_then_break_commit(backend, 1)
        for _ in range(3):
            with pytest.raises(errors.UnitOfWorkFailedError):
                await respond(send)

    response = await serve(app, db)

    assert [START, BODY] == response.types
    assert response.status >= 500
    assert isinstance(response.error, errors.UnitOfWorkFailedError)


async def test_p2_framework_may_answer_the_failure_itself(
    db: Database, backend: Backend
) -> None:
    """P2: a second start passes if it is an error; then it was answered."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert_then_break_commit(backend, 1)
        with pytest.raises(errors.UnitOfWorkFailedError):
            await respond(send)
        await respond(send, 507, b"rendered by the framework")

    response = await serve(app, db)

    assert [(START, 507), (BODY, None)] == [
        (message["type"], message.get("status")) for message in response.messages
    ]
    assert response.error is None


# P3


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, ["after_commit", "after_response"]), (404, ["after_rollback"])],
)
async def test_p3_hooks_run_for_the_proven_outcome(
    db: Database, status: int, expected: list[str]
) -> None:
    """P3: after_commit and after_rollback exclude each other."""
    fired: list[str] = []

    async def handler() -> None:
        await shop.insert(1)
        for register in (uow.after_commit, uow.after_response, uow.after_rollback):
            register(fired.append, register.__name__)

    await handle(handler, db, status=status)

    assert expected == fired


# P4


@pytest.mark.parametrize(
    ("status", "rollback_only", "forced", "kept"),
    [
        (200, False, False, True),
        (302, False, False, True),
        (404, False, False, False),
        (500, False, False, False),
        (403, False, True, True),
        (200, True, False, False),
        (200, True, True, False),
    ],
)
async def test_p4_one_decision_at_the_first_start(
    db: Database,
    backend: Backend,
    status: int,
    rollback_only: bool,
    forced: bool,
    kept: bool,
) -> None:
    """P4: the first start decides; the response itself stays as it is."""

    async def handler() -> None:
        await shop.insert(1)
        if rollback_only:
            uow.set_rollback_only("the owner asked")
        if forced:
            uow.force_commit()

    response = await handle(
        handler, db, status=status, probe=lambda: shop.items(backend)
    )

    assert status == response.status
    assert [[1] if kept else []] == response.seen
    assert response.error is None


async def test_p4_nothing_after_the_start_changes_the_decision(
    db: Database, backend: Backend
) -> None:
    """P4: an exception after the start does not undo the commit."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        await send({"type": START, "status": 200, "headers": []})
        with pytest.raises(errors.UnitOfWorkClosedError):
            uow.set_rollback_only("too late")
        with pytest.raises(errors.UnitOfWorkClosedError):
            uow.force_commit()
        message = "in the middle of the body"
        raise LookupError(message)

    response = await serve(app, db)

    assert [START] == response.types
    assert isinstance(response.error, LookupError)
    assert [1] == await shop.items(backend)


@pytest.mark.parametrize("answers", [True, False])
async def test_p4_without_a_start_nothing_is_kept(
    db: Database, backend: Backend, answers: bool
) -> None:
    """P4: an exception before any start, or no start at all, rolls back."""
    failure = LookupError("before the start")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(1)
        if answers:
            raise failure

    response = await serve(app, db)

    assert [] == response.types
    assert (failure if answers else None) is response.error
    assert [] == await shop.items(backend)


# P5


async def test_p5_failing_hook_changes_nothing(db: Database, backend: Backend) -> None:
    """P5: a hook that raises stops no other hook and leaves the response alone."""
    fired: list[str] = []

    async def broken() -> None:
        message = "the mail server is down"
        raise OSError(message)

    async def handler() -> None:
        await shop.insert(1)
        uow.after_commit(fired.append, "first")
        uow.after_commit(broken)
        uow.after_commit(fired.append, "last")

    response = await handle(handler, db, observers=())

    assert 200 == response.status
    assert response.error is None
    assert ["first", "last"] == fired
    assert [1] == await shop.items(backend)


# P7


async def test_p7_write_connection_is_back_before_the_body_streams(
    db: Database, backend: Backend
) -> None:
    """P7: no connection before the first statement, none of the writer after."""
    counts: list[list[int]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = uow.current_session()
        counts.append(checked_out(db))
        await session.execute("SELECT 1")
        counts.append(checked_out(db))
        await send({"type": START, "status": 200, "headers": []})
        counts.append(checked_out(db))
        await uow.current_read_session().execute("SELECT 1")
        counts.append(checked_out(db))
        await send({"type": BODY, "body": b""})

    await serve(app, db)

    assert [[0, 0], [1, 0], [0, 0], [0, 1]] == counts
    assert [0, 0] == checked_out(db)
    assert 0 == await backend.open_transactions()


@pytest.mark.parametrize("how", ["task", "scope"])
@pytest.mark.parametrize("stage", ["handler", "body"])
async def test_p7_cancelled_request_leaks_nothing(
    db: Database, backend: Backend, how: str, stage: str
) -> None:
    """P7: every connection is back after a cancellation of either kind."""
    reached = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await uow.current_read_session().execute("SELECT 1")
        await shop.insert(1)
        if stage == "body":
            await send({"type": START, "status": 200, "headers": []})
        reached.set()
        await asyncio.Event().wait()

    wrapped = uow.UnitOfWorkMiddleware(app, db)
    if how == "task":
        task = asyncio.create_task(request(wrapped))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await reached.wait()
            group.cancel_scope.cancel()

    assert [0, 0] == checked_out(db)
    assert 0 == await backend.open_transactions()
    assert ([1] if stage == "body" else []) == await shop.items(backend)


# P8


async def test_p8_write_session_is_closed_for_good(
    db: Database, backend: Backend
) -> None:
    """P8: after the decision no call opens another transaction."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = uow.current_session()
        await shop.insert(1)
        await send({"type": START, "status": 200, "headers": []})
        for attempt in (
            lambda: session.execute("INSERT INTO items (id) VALUES (2)"),
            lambda: session.run_sync(lambda sync: sync.execute("SELECT 1")),  # type: ignore[call-overload]
            session.connection,
            session.commit,
            lambda: session.begin_nested().start(),
        ):
            with pytest.raises(errors.UnitOfWorkClosedError, match="async with db:"):
                await attempt()
        with pytest.raises(errors.UnitOfWorkClosedError, match="async with db:"):
            session.add(object())
        with pytest.raises(errors.UnitOfWorkClosedError, match="async with db:"):
            session.add_all([])
        with pytest.raises(errors.UnitOfWorkClosedError, match="async with db:"):
            uow.current_session()
        async with db:
            await shop.insert(3)
        await send({"type": BODY, "body": b""})

    response = await serve(app, db)

    assert response.error is None
    assert [1, 3] == await shop.items(backend)
    assert 0 == await backend.open_transactions()


# P9


async def test_p9_leaked_task_gets_no_service(db: Database) -> None:
    """P9: a task that outlives its request is refused, read and write."""
    over = asyncio.Event()
    tasks: list[asyncio.Task[list[str]]] = []

    async def leak() -> list[str]:
        read, write = uow.current_read_session(), uow.current_session()
        await over.wait()
        refused = []
        for session in (read, write):
            with pytest.raises(errors.UnitOfWorkClosedError) as caught:
                await session.execute("SELECT 1")
            refused.append(str(caught.value))
        for accessor in (
            uow.current_session,
            uow.current_read_session,
            uow.current_unit_of_work,
        ):
            with pytest.raises(errors.UnitOfWorkClosedError) as caught:
                accessor()
            refused.append(str(caught.value))
        return refused

    async def handler() -> None:
        task = asyncio.create_task(leak())
        tasks.append(task)
        await asyncio.wait((task,), timeout=0)
        await shop.insert(1)

    await handle(handler, db)
    over.set()

    refused = await tasks[0]
    assert 5 == len(refused)
    assert all("async with db:" in message for message in refused)
    assert [0, 0] == checked_out(db)


async def test_p9_request_does_not_trust_the_context_it_starts_in(
    db: Database, backend: Backend
) -> None:
    """P9: a pipelined request starts in the earlier one's context, on its own."""
    units: list[uow.UnitOfWork] = []

    async def handler() -> None:
        units.append(uow.current_unit_of_work())
        await shop.insert(len(units))

    app = uow.UnitOfWorkMiddleware(endpoint(handler), db)

    async def first(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await send({"type": START, "status": 200, "headers": []})
        # As uvicorn does: the next request's task is made inside send().
        await asyncio.create_task(_discard(app))
        await send({"type": BODY, "body": b""})

    await serve(first, db)

    assert units[0] is not units[1]
    assert [1, 2] == await shop.items(backend)
    with pytest.raises(errors.NoUnitOfWorkError):
        uow.current_unit_of_work()


async def _discard(app: uow.UnitOfWorkMiddleware) -> None:
    await request(app)


async def test_p9_two_databases_in_one_unit(sqlite: Backend, mariadb: Backend) -> None:
    """P9: sessions of two databases do not get mixed up; both are committed."""
    async with shop_database(sqlite) as first, shop_database(mariadb) as second:

        async def handler() -> None:
            await uow.current_session().execute("INSERT INTO items (id) VALUES (1)")
            await uow.current_session(second).execute(
                "INSERT INTO items (id) VALUES (2)"
            )

        response = await handle(handler, first, second)

        assert 200 == response.status
        assert [1] == await shop.items(sqlite)
        assert [2] == await shop.items(mariadb)
        assert [0, 0, 0, 0] == checked_out(first, second)


# P10


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_p10_cancelled_commit_is_finished(
    mariadb: MariaDBBackend, how: str
) -> None:
    """P10: a COMMIT in flight is finished, its hook runs, then comes the cancel."""
    response = Response()
    async with behind_proxy(mariadb) as (db, proxy):
        hold = proxy.hold_answer(is_commit)

        async def send() -> None:
            await handle(lambda: shop.insert(1), db, hooks=True, into=response)

        async def release_after_cancel() -> None:
            await asyncio.wait_for(hold.answered.wait(), 5)
            hold.release()

        if how == "task":
            task = asyncio.create_task(send())
            await hold.fired.wait()
            task.cancel()
            task.cancel()
            await release_after_cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(send)
                await hold.fired.wait()
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await release_after_cancel()

        assert uow.Outcome.COMMITTED is response.unit.outcome
        assert ["commit"] == response.hooks
        assert [1] == await shop.items(mariadb)
        assert [0, 0] == checked_out(db)


# P12


async def test_p12_untouched_request_opens_nothing(db: Database) -> None:
    """P12: a request that touches no session connects to nothing."""

    async def handler() -> None:
        uow.current_session()
        uow.current_read_session()

    await serve(endpoint(handler), db)

    pools = [engine.sync_engine.pool for engine in (db.engine, *db.readers)]
    assert [0, 0] == [pool.checkedin() for pool in pools]  # type: ignore[attr-defined]


# Budgets, section 11


INSERT = "INSERT INTO items (id) VALUES (1)"
SELECT = "SELECT id FROM items"


@pytest.mark.direct
@on(*SERVERS)
@pytest.mark.parametrize("statement", [INSERT, SELECT], ids=["INSERT", "SELECT"])
async def test_budget(backend: ServerBackend, statement: str) -> None:
    """Section 11: 1 for a SELECT; 2 for an INSERT, 3 on PostgreSQL; 0 untouched."""

    async def execute() -> None:
        is_read = statement == SELECT
        session = uow.current_read_session() if is_read else uow.current_session()
        await session.execute(statement)

    async def nothing() -> None:
        """Touch no session."""

    trips = []
    async with behind_proxy(backend) as (db, proxy):
        await handle(execute, db, status=404)  # connects and prepares
        for handler in (execute, nothing):
            proxy.clear()
            assert 200 == (await serve(endpoint(handler), db)).status
            trips.append(list(proxy.trips))
    begin = ["BEGIN"] if backend.name == "postgresql" else []
    expected = [SELECT] if statement == SELECT else [*begin, INSERT, "COMMIT"]
    assert [expected, []] == trips
