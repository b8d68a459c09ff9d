"""The unit of work that a hook has for itself, and what hooks register."""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow.observers import CommitFailed
from tests.support import shop
from tests.support.asgi import Response, endpoint, handle, serve
from tests.support.databases import SERVERS, checked_out, on, shop_database
from tests.support.private import MOST_BY_HOOKS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.servers.backend import Backend, SQLiteBackend

    Register = Callable[..., None]
    Work = Callable[[], Awaitable[object]]


async def call(
    register_all: Callable[[], object],
    db: Database,
    status: int = 200,
    hook_timeout: float = 30.0,
) -> Response:
    """Have a handler register hooks."""

    async def handler() -> None:
        register_all()

    return await handle(handler, db, status=status, hook_timeout=hook_timeout)


def reports(response: Response) -> list[tuple[str, str, str]]:
    """Phase, name and kind of error of every failure."""
    failures = response.failures
    return [(each.phase, each.hook, type(each.error).__name__) for each in failures]


REGISTER = [
    (uow.after_commit, 200),
    (uow.after_response, 200),
    (uow.after_rollback, 404),
]


@pytest.mark.parametrize(("register", "status"), REGISTER)
async def test_own_unit(
    register: Register, status: int, db: Database, backend: Backend
) -> None:
    """Each hook has a session of its own, committed when the hook returns."""
    units: list[uow.UnitOfWork] = []
    inserted: list[object] = []

    async def hook(number: int) -> None:
        units.append(uow.current_unit_of_work())
        await shop.insert(number)
        found = await uow.current_read_session().scalars("SELECT id FROM items")
        inserted.append(set(found))

    def handler() -> None:
        units.append(uow.current_unit_of_work())
        register(hook, 1)
        register(hook, 2)

    response = await call(handler, db, status)

    assert status == response.status
    assert [] == response.failures
    assert [1, 2] == await shop.items(backend)
    assert {1, 2} in inserted
    assert 3 == len(set(units))
    assert [0, 0] == checked_out(db)


@pytest.mark.parametrize(("register", "status"), REGISTER)
async def test_own_unit_rolled_back(
    register: Register, status: int, db: Database, backend: Backend
) -> None:
    """What a hook did is rolled back when it raises, and nobody else's work is."""

    async def fails() -> None:
        await shop.insert(1)
        raise LookupError

    def handler() -> None:
        register(shop.insert, 2)
        register(fails)
        register(shop.insert, 3)

    response = await call(handler, db, status)

    assert status == response.status
    assert [2, 3] == await shop.items(backend)
    name = "test_own_unit_rolled_back.<locals>.fails"
    assert [(register.__name__, name, "LookupError")] == reports(response)
    assert [0, 0] == checked_out(db)


async def test_own_unit_rollback_only(db: Database, backend: Backend) -> None:
    """A hook can have its own work rolled back without failing."""

    async def dry_run() -> None:
        await shop.insert(1)
        uow.set_rollback_only("dry run")

    response = await call(functools.partial(uow.after_commit, dry_run), db)

    assert [] == await shop.items(backend)
    assert [] == response.failures


async def test_own_unit_force(db: Database, backend: Backend) -> None:
    """To force what is committed anyway changes nothing."""

    async def hook() -> None:
        uow.force_commit()
        await shop.insert(1)

    await call(functools.partial(uow.after_commit, hook), db)
    assert [1] == await shop.items(backend)


async def test_own_commit_fails(db: Database, backend: Backend) -> None:
    """P5: when the commit of a hook's work fails, that is reported once, by name."""

    def handler() -> None:
        uow.after_commit(shop.insert_then_break_commit, backend, 1)
        uow.after_commit(shop.insert, 2)

    response = await call(handler, db)

    assert (200, None) == (response.status, response.error)
    assert [2] == await shop.items(backend)
    [failure] = response.failures
    assert "insert_then_break_commit" == failure.hook
    assert isinstance(failure.error, errors.CommitFailedError)
    assert CommitFailed not in map(type, response.events)
    assert [0, 0] == checked_out(db)


async def test_own_unit_doomed(db: Database, backend: Backend) -> None:
    """P2: a hook that swallows what dooms its work is reported; nothing is kept."""

    async def hook() -> None:
        await shop.insert(1)
        connection = await uow.current_session().connection()
        with suppress(errors.ManagedTransactionError):
            await connection.commit()

    response = await call(functools.partial(uow.after_commit, hook), db)

    [failure] = response.failures
    assert isinstance(failure.error, errors.DoomedError)
    assert isinstance(failure.error.__cause__, errors.ManagedTransactionError)
    assert [] == await shop.items(backend)


async def test_block_in_a_hook(db: Database, backend: Backend) -> None:
    """A hook may open a unit with `async with db:` as code outside requests does."""
    called: list[str] = []

    async def hook() -> None:
        async with db:
            await shop.insert(1)
            uow.after_commit(called.append, "inner")
        assert ["inner"] == called
        await shop.insert(2)

    response = await call(functools.partial(uow.after_commit, hook), db)

    assert [] == response.failures
    assert [1, 2] == await shop.items(backend)


async def test_block_in_a_hook_that_uses_its_session(
    db: Database, backend: Backend
) -> None:
    """Once a hook has used its own session, a block is a unit inside a unit."""

    async def hook() -> None:
        await shop.insert(1)
        with pytest.raises(errors.NestedUnitOfWorkError):
            async with db:
                raise NotImplementedError

    response = await call(functools.partial(uow.after_commit, hook), db)

    assert [] == response.failures
    assert [1] == await shop.items(backend)


@on(*SERVERS)
async def test_independent_block_in_a_hook(backend: Backend) -> None:
    """An independent block beside the hook's own work has an outcome of its own."""
    async with shop_database(backend) as db:

        async def hook() -> None:
            await shop.insert(1)
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(2)
            raise LookupError

        await call(functools.partial(uow.after_commit, hook), db)

    assert [2] == await shop.items(backend)


@on(*SERVERS)
async def test_databases_of_the_unit_around(
    sqlite: SQLiteBackend, backend: Backend
) -> None:
    """A hook reaches every database that its request reaches, in its own unit."""
    async with shop_database(sqlite) as outer, shop_database(backend) as inner:

        async def hook() -> None:
            await shop.insert(1)
            await uow.current_session(outer).execute(
                "INSERT INTO items (id) VALUES (2)"
            )

        async def handler() -> None:
            uow.after_commit(hook)

        app = uow.UnitOfWorkMiddleware(endpoint(handler), inner)
        await serve(app, outer)

    assert [1] == await shop.items(backend)
    assert [2] == await shop.items(sqlite)


async def test_after_the_hook(db: Database) -> None:
    """P9: a task that outlives its hook is refused the hook's unit."""
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def leaked() -> None:
        await go_on.wait()
        uow.current_session()

    async def hook() -> None:
        tasks.append(asyncio.create_task(leaked()))

    await call(functools.partial(uow.after_commit, hook), db)
    go_on.set()
    with pytest.raises(errors.UnitOfWorkClosedError):
        await tasks[0]


async def test_in_memory() -> None:
    """In memory, where there is one connection, hooks have their turn on it."""
    db = Database.from_url("sqlite://", pool_timeout=5)
    async with db:
        await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")
    found: list[object] = []

    async def read() -> None:
        found.append(await uow.current_read_session().scalar("SELECT id FROM items"))

    def handler() -> None:
        uow.after_commit(shop.insert, 1)
        uow.after_response(read)

    response = await call(handler, db)
    assert [] == response.failures
    assert [1] == found
    await db.dispose()


# What hooks register


@on("aiosqlite")
@pytest.mark.parametrize(
    "register", [uow.before_commit, uow.after_commit, uow.after_response]
)
@pytest.mark.parametrize("fails", [False, True])
async def test_registering_in_hooks(
    register: Register, fails: bool, db: Database
) -> None:
    """What a hook registers comes last, and also when that hook then fails."""
    called: list[str] = []

    async def hook() -> None:
        called.append("first")
        register(called.append, "registered")
        if fails and register is not uow.before_commit:
            raise LookupError

    def handler() -> None:
        register(hook)
        register(called.append, "second")

    response = await call(handler, db)

    assert 200 == response.status
    assert ["first", "second", "registered"] == called


@on("aiosqlite")
async def test_registering_for_a_later_phase(db: Database) -> None:
    """Hooks register for later phases, and for one that has passed for at once."""
    called: list[str] = []

    async def last() -> None:
        called.append("last")
        uow.after_commit(called.append, "the commit is proven still")

    async def middle() -> None:
        called.append("middle")
        uow.after_response(last)

    async def first() -> None:
        called.append("first")
        uow.after_commit(middle)

    await call(functools.partial(uow.before_commit, first), db)

    assert ["first", "middle", "last", "the commit is proven still"] == called


@on("aiosqlite")
async def test_registering_for_after_the_response(db: Database) -> None:
    """What an after_commit hook registers for after the response waits for its end."""
    response, was_over = Response(), list[bool]()

    def look() -> None:
        was_over.append(bool(response.messages) and response.is_over)

    async def commit() -> None:
        uow.after_response(look)

    async def handler() -> None:
        uow.after_commit(commit)

    await handle(handler, db, into=response)

    assert [True] == was_over


@on("aiosqlite")
async def test_task_that_a_hook_has_left(db: Database) -> None:
    """P9: the unit of a hook that used nothing is closed for who comes late, too."""
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[object]] = []

    async def use_late() -> object:
        await go_on.wait()
        return uow.current_session()

    async def hook() -> None:
        tasks.append(asyncio.create_task(use_late()))

    await call(functools.partial(uow.after_commit, hook), db)
    go_on.set()

    with pytest.raises(errors.UnitOfWorkClosedError, match="unit of work is closed"):
        await tasks[0]


@on("aiosqlite")
async def test_registering_after_a_rollback(
    db: Database, backend: SQLiteBackend
) -> None:
    """After a rollback a hook may add to it; a commit is then that of its own unit."""
    called: list[str] = []

    async def compensate() -> None:
        await shop.insert(1)
        uow.after_rollback(called.append, "rolled back too")
        uow.after_commit(called.append, "compensated")
        uow.after_response(called.append, "and released")

    await call(functools.partial(uow.after_rollback, compensate), db, 404)

    assert ["compensated", "and released", "rolled back too"] == called
    assert [1] == await shop.items(backend)


@on("aiosqlite")
async def test_rollback_of_a_hook(db: Database, backend: SQLiteBackend) -> None:
    """What a hook registers for a rollback is called if its own work is undone."""
    called: list[str] = []

    async def hook(*, fails: bool) -> None:
        uow.after_rollback(called.append, f"fails: {fails}")
        await shop.insert(1)
        if fails:
            raise LookupError

    def handler() -> None:
        uow.after_commit(hook, fails=True)
        uow.after_commit(hook, fails=False)

    await call(handler, db)

    assert ["fails: True"] == called
    assert [1] == await shop.items(backend)


async def test_savepoint_in_a_hook(db: Database, backend: Backend) -> None:
    """P6: hooks that a hook registers follow its savepoints."""
    called: list[str] = []

    async def hook() -> None:
        with suppress(LookupError):
            async with uow.savepoint():
                await shop.insert(1)
                uow.after_commit(called.append, "undone")
                raise LookupError
        async with uow.savepoint():
            await shop.insert(2)
            uow.after_commit(called.append, "kept")

    await call(functools.partial(uow.after_commit, hook), db)

    assert ["kept"] == called
    assert [2] == await shop.items(backend)


@on("aiosqlite")
@pytest.mark.parametrize(("register", "status"), REGISTER)
async def test_too_many(register: Register, status: int, db: Database) -> None:
    """Hooks may register 100 others: one that registers itself comes to an end."""
    calls: list[int] = []

    async def again() -> None:
        calls.append(len(calls))
        register(again)

    response = await call(functools.partial(register, again), db, status)

    assert status == response.status
    assert MOST_BY_HOOKS + 1 == len(calls)
    [failure] = response.failures
    assert isinstance(failure.error, errors.TooManyHooksError)
    assert "register itself again" in str(failure.error)


@on("aiosqlite")
async def test_too_many_before_commit(db: Database, backend: SQLiteBackend) -> None:
    """In the transaction the 101st has everything rolled back."""

    async def again() -> None:
        uow.before_commit(again)

    async def handler() -> None:
        await shop.insert(1)
        uow.before_commit(again)

    response = await handle(handler, db)

    assert 500 == response.status
    assert response.error is not None
    assert isinstance(response.error.__cause__, errors.TooManyHooksError)
    assert [] == await shop.items(backend)


@on("aiosqlite")
async def test_no_limit_for_handlers(db: Database) -> None:
    """The limit is on hooks that register hooks, not on handlers."""
    called: list[int] = []

    def handler() -> None:
        for number in range(3 * MOST_BY_HOOKS):
            uow.after_commit(called.append, number)

    await call(handler, db)

    assert list(range(300)) == called


# Failures


class Broken(BaseException):
    """Not an Exception."""


def sync(error: BaseException) -> None:
    raise error


async def coroutine(error: BaseException) -> None:
    raise error


class Caller:
    """Has methods, and can be called."""

    def method(self, error: BaseException) -> None:
        raise error

    async def bound(self, error: BaseException) -> None:
        raise error

    async def __call__(self, error: BaseException) -> None:
        raise error


async def swallow() -> None:
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


async def hang() -> None:
    await asyncio.Event().wait()


ERRORS = [
    ZeroDivisionError("wrong"),
    StopIteration("wrong"),
    Broken("wrong"),
    asyncio.CancelledError("wrong"),
    GeneratorExit("wrong"),
    SystemExit(1),
    KeyboardInterrupt("wrong"),
    ExceptionGroup("wrong", [OSError("wrong")]),
]
FORMS: dict[str, Callable[[BaseException], Callable[[], object]]] = {
    "sync": lambda error: functools.partial(sync, error),
    "coroutine": lambda error: functools.partial(coroutine, error),
    "test_p5_failures.<locals>.<lambda>": lambda error: lambda: coroutine(error),
    "Caller.method": lambda error: functools.partial(Caller().method, error),
    "Caller.bound": lambda error: functools.partial(Caller().bound, error),
    "Caller": lambda error: functools.partial(functools.partial(Caller()), error),
}


@on("aiosqlite")
@pytest.mark.parametrize(("register", "status"), REGISTER)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("form", FORMS)
async def test_p5_failures(
    form: str, error: BaseException, register: Register, status: int, db: Database
) -> None:
    """P5: whatever fails in whatever way, the others run and the response leaves."""
    called: list[str] = []
    fails = FORMS[form](error)

    def handler() -> None:
        register(called.append, "before")
        register(fails)
        register(called.append, "after")

    response = await call(handler, db, status)

    assert (status, None) == (response.status, response.error)
    assert {"before", "after"} == set(called)
    [failure] = response.failures
    assert form.rpartition(".")[2] == failure.hook.rpartition(".")[2]
    # A StopIteration cannot leave a coroutine as it is.
    assert error in {failure.error, failure.error.__cause__}


@on("aiosqlite")
@pytest.mark.parametrize(("register", "status"), REGISTER)
@pytest.mark.parametrize("hangs", [hang, swallow, lambda: hang()])
async def test_p5_hanging(
    hangs: Callable[[], object], register: Register, status: int, db: Database
) -> None:
    """P5: a hook past its time is cancelled and reported, even if it ignores that."""
    called: list[str] = []

    def handler() -> None:
        register(called.append, "before")
        register(hangs)
        register(called.append, "after")

    response = await call(handler, db, status, hook_timeout=0.5)

    assert (status, None) == (response.status, response.error)
    assert {"before", "after"} == set(called)
    [failure] = response.failures
    assert isinstance(failure.error, TimeoutError)


@on("aiosqlite")
async def test_p5_hanging_thread(db: Database) -> None:
    """P5: a sync hook past its time is reported and left to its thread."""
    go_on = threading.Event()
    called: list[str] = []

    def handler() -> None:
        uow.after_commit(go_on.wait, 60)
        uow.after_commit(called.append, "after")

    response = await call(handler, db, hook_timeout=0.5)

    go_on.set()
    assert 200 == response.status
    assert ["after"] == called
    assert [("after_commit", "Event.wait", "TimeoutError")] == reports(response)


async def test_p5_hanging_with_a_session(db: Database, backend: Backend) -> None:
    """P5: what a hook did before it was stopped is rolled back; nothing is held."""

    async def work() -> None:
        await shop.insert(1)
        await hang()

    response = await call(
        functools.partial(uow.after_commit, work), db, hook_timeout=1.0
    )

    assert 200 == response.status
    assert ["TimeoutError"] == [kind for _, _, kind in reports(response)]
    assert [] == await shop.items(backend)
    assert [0, 0] == checked_out(db)
    assert 0 == await backend.open_transactions()
