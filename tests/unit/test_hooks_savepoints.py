"""P6: which hooks are left when savepoints are released and rolled back."""

from __future__ import annotations

import asyncio
import contextlib
import os
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import ReadOnlySessionError
from tests.support import shop
from tests.support.asgi import handle
from tests.support.databases import on, shop_database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from sqlalchemy.orm import Session as SyncSession

    from tests.servers.backend import Backend, MariaDBBackend, SQLiteBackend

    Open: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]
    Node: TypeAlias = "str | Savepoint"


class Undo(Exception):  # noqa: N818  # no error: how a block is left
    """Leaves a savepoint so that it is rolled back."""


class Savepoint:
    """A savepoint of a tree: what happens inside, and whether it is kept."""

    def __init__(self, *inside: Node, keep: bool = True) -> None:
        self.inside = inside
        self.keep = keep


def keep(*inside: Node) -> Savepoint:
    return Savepoint(*inside)


def undo(*inside: Node) -> Savepoint:
    return Savepoint(*inside, keep=False)


class Record:
    """Registers hooks under a name and notes which were called, in order."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.committed: list[str] = []
        self.responded: list[str] = []
        self.rolled_back: list[str] = []

    def register(self, name: str) -> None:
        uow.before_commit(self.before.append, name)
        uow.after_commit(self.committed.append, name)
        uow.after_response(self.responded.append, name)
        uow.after_rollback(self.rolled_back.append, name)

    def all_committed(self, names: str) -> None:
        """Check that these were called, and no other, in this order."""
        assert list(names) == self.committed
        assert self.before == self.committed == self.responded


async def run(record: Record, open_one: Open, tree: tuple[Node, ...]) -> None:
    """Register hooks inside savepoints as the tree says."""
    for node in tree:
        if isinstance(node, str):
            record.register(node)
        else:
            with contextlib.suppress(Undo):
                async with open_one():
                    await run(record, open_one, node.inside)
                    if not node.keep:
                        raise Undo


def plain() -> AbstractAsyncContextManager[object]:
    return uow.current_session().begin_nested()


@asynccontextmanager
async def by_connection() -> AsyncGenerator[None]:
    """A savepoint that the session knows nothing of."""
    connection = await uow.current_session().connection()
    async with connection.begin_nested():
        yield


@asynccontextmanager
async def with_statement() -> AsyncGenerator[None]:
    """A savepoint in which the database has something to do."""
    async with uow.savepoint():
        await uow.current_session().execute("SELECT 1")
        yield


OPENERS: dict[str, Open] = {
    "savepoint()": lambda: uow.savepoint(),
    "begin_nested()": plain,
    "connection": by_connection,
    "with a statement": with_statement,
}

TREES: dict[str, tuple[tuple[Node, ...], str, str]] = {
    # what is done; what is called after the commit; what a rollback has called
    "no savepoint": (("a", "b"), "ab", ""),
    "released": (("a", keep("b"), "c"), "abc", ""),
    "rolled back": (("a", undo("b", "c"), "d"), "ad", "cb"),
    "one after the other": ((undo("a"), keep("b"), undo("c"), "d"), "bd", "ac"),
    "released child of a rolled-back parent": (
        ("a", undo("b", keep("c"), "d"), "e"),
        "ae",
        "dcb",
    ),
    "rolled-back child of a released parent": (
        ("a", keep("b", undo("c"), "d"), "e"),
        "abde",
        "c",
    ),
    "both rolled back": (("a", undo("b", undo("c"), "d"), "e"), "ae", "cdb"),
    "nested five deep, kept": (
        ("a", keep("b", keep("c", keep("d", keep("e", keep("f"), "g"))))),
        "abcdefg",
        "",
    ),
    "nested five deep, undone in the middle": (
        ("a", keep("b", keep("c", undo("d", keep("e", keep("f"), "g")), "h"))),
        "abch",
        "gfed",
    ),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("case", TREES)
async def test_p6_committed(case: str, opener: str, db: Database) -> None:
    """P6: what was released is called at the commit; what was undone at its end."""
    tree, committed, rolled_back = TREES[case]
    record = Record()

    async def handler() -> None:
        await run(record, OPENERS[opener], tree)
        if opener != "connection":  # the session has not seen those end
            assert list(rolled_back) == record.rolled_back

    response = await handle(handler, db)

    assert response.error is None
    record.all_committed(committed)
    assert sorted(rolled_back) == sorted(record.rolled_back)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("case", TREES)
async def test_p6_root_rolled_back(case: str, opener: str, db: Database) -> None:
    """P6: when the root is rolled back, the rest follows, last registered first."""
    tree, committed, rolled_back = TREES[case]
    record = Record()

    await handle(lambda: run(record, OPENERS[opener], tree), db, status=409)

    record.all_committed("")
    expected = [*rolled_back, *reversed(committed)]
    assert sorted(expected) == sorted(record.rolled_back)
    if opener != "connection":
        assert expected == record.rolled_back


def survivors(tree: tuple[Node, ...], rolled_back: list[str]) -> list[str]:
    """Work out which hooks are left, and which a rollback has called."""
    left: list[str] = []
    for node in tree:
        if isinstance(node, str):
            left.append(node)
        else:
            inside = survivors(node.inside, rolled_back)
            if node.keep:
                left += inside
            else:
                rolled_back += reversed(inside)
    return left


def make(inside: list[Node], keep: bool) -> Savepoint:
    return Savepoint(*inside, keep=keep)


LEAVES = st.text("abcdefghijk", min_size=1, max_size=3)
NODES = st.recursive(
    LEAVES,
    lambda nodes: st.builds(make, st.lists(nodes, max_size=4), st.booleans()),
    max_leaves=12,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tree=st.lists(NODES, max_size=5).map(tuple),
    seed=st.integers(0, 1000),
    status=st.sampled_from([200, 409]),
)
def test_p6_any_tree(
    tmp_path: Path, tree: tuple[Node, ...], seed: int, status: int
) -> None:
    """P6: for any tree of savepoints exactly the hooks run whose chain was kept.

    In order of registration, on two databases and with every way of opening one.
    """
    record = Record()
    opening = Random(seed)

    async def live() -> None:
        one, two = (
            Database.from_url(f"sqlite:///{tmp_path / name}.db") for name in ("1", "2")
        )
        ways: list[Open] = [
            lambda: uow.savepoint(one),
            lambda: uow.savepoint(two),
            lambda: uow.current_session(one).begin_nested(),
            with_statement,
        ]

        async def handler() -> None:
            await run(record, lambda: opening.choice(ways)(), tree)

        response = await handle(handler, one, two, status=status)
        await one.dispose()
        await two.dispose()
        assert response.error is None

    asyncio.run(live())
    rolled_back: list[str] = []
    left = survivors(tree, rolled_back)
    if status == 409:
        rolled_back += reversed(left)
        left = []
    assert left == record.committed == record.before == record.responded
    assert rolled_back == record.rolled_back


async def test_p6_rows_and_hooks_agree(db: Database, backend: Backend) -> None:
    """P6: the hooks that are called are those of the rows that were kept."""
    called: list[object] = []

    async def insert(number: int) -> None:
        await shop.insert(number)
        uow.after_commit(called.append, number)

    async with db:
        await insert(1)
        with contextlib.suppress(Undo):
            async with uow.savepoint():
                await insert(2)
                async with plain():
                    await insert(3)
                raise Undo
        async with uow.savepoint():
            await insert(4)

    assert [1, 4] == called == await shop.items(backend)


async def test_p6_exception_in_the_middle(db: Database) -> None:
    """P6: an exception that leaves two savepoints and the block undoes all of it."""
    record = Record()

    with pytest.raises(LookupError):
        async with db:
            record.register("a")
            async with uow.savepoint():
                record.register("b")
                async with plain():
                    record.register("c")
                    raise LookupError

    record.all_committed("")
    assert ["c", "b", "a"] == record.rolled_back


async def test_p6_failed_statement(db: Database, backend: Backend) -> None:
    """P6: a savepoint that a failed statement has undone takes its hooks with it."""
    record = Record()

    async with db:
        await shop.insert(1)
        record.register("a")
        with pytest.raises(sa_exc.IntegrityError):
            async with uow.savepoint():
                record.register("b")
                await shop.insert(1)
        assert ["b"] == record.rolled_back

    record.all_committed("a")
    assert [1] == await shop.items(backend)


async def test_p6_failed_flush(db: Database, backend: Backend) -> None:
    """P6: the same for a flush, which rolls the savepoint back before the block."""
    record = Record()

    async with db:
        await shop.insert(1)
        record.register("a")
        with pytest.raises(LookupError):
            async with uow.savepoint() as inner:
                record.register("b")
                inner.session.add(shop.Item(id=1))
                with pytest.raises(sa_exc.IntegrityError):
                    await inner.session.flush()
                record.register("c")
                await inner.session.flush()
                raise LookupError
        record.register("d")

    record.all_committed("ad")
    assert ["c", "b"] == record.rolled_back
    assert [1] == await shop.items(backend)


class Array:
    """Compares as the arrays of numpy do."""

    def __init__(self, called: list[Array]) -> None:
        self.called = called

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError  # there it gives no truth value

    __hash__ = None  # type: ignore[assignment]  # as those have none


async def note(argument: Array) -> None:
    argument.called.append(argument)


async def test_p6_arguments_that_cannot_be_compared(db: Database) -> None:
    """P6: what hooks are called with is handed on, and nothing else is done with it."""
    called: list[Array] = []

    async with db:
        with contextlib.suppress(Undo):
            async with uow.savepoint():
                for _ in range(2):
                    uow.after_rollback(note, Array(called))
                raise Undo
        assert 2 == len(called)


async def test_p6_ended_by_hand(db: Database) -> None:
    """P6: commit() and rollback() of a savepoint count as leaving its block."""
    record = Record()

    async with db:
        kept = await uow.current_session().begin_nested()
        record.register("a")
        await kept.commit()
        undone = await uow.current_session().begin_nested()
        record.register("b")
        await undone.rollback()
        assert ["b"] == record.rolled_back
        record.register("c")

    record.all_committed("ac")


async def test_p6_inside_run_sync(db: Database) -> None:
    """P6: savepoints of synchronous code count as well."""
    record = Record()

    def work(session: SyncSession) -> None:
        with session.begin_nested():
            record.register("a")
            nested = session.begin_nested()
            record.register("b")
            nested.rollback()

    async with db:
        await db.write.run_sync(work)
        assert ["b"] == record.rolled_back

    record.all_committed("a")


async def test_p6_open_at_the_decision(db: Database) -> None:
    """P6: COMMIT releases the savepoints that are open, and so do their hooks."""
    record = Record()

    async with db:
        await db.write.begin_nested()
        await db.write.execute("SELECT 1")
        record.register("a")

    record.all_committed("a")
    assert [] == record.rolled_back


async def test_no_savepoints_for_reads(db: Database) -> None:
    """The read session has no transaction, and refuses to open a savepoint in it."""
    async with db:
        with pytest.raises(ReadOnlySessionError, match="begin_nested"):
            db.read.begin_nested()


@pytest.fixture
async def databases(
    backend: Backend, mariadb: MariaDBBackend
) -> AsyncIterator[tuple[Database, Database]]:
    """Two databases; the second is another than the first."""
    async with shop_database(backend) as first:
        if backend.name == mariadb.name:
            second = Database.from_url("sqlite://")
        else:
            second = Database.from_url(mariadb.url)
        yield first, second
        await second.dispose()


@pytest.mark.parametrize("inner_first", [True, False])
async def test_p6_two_databases(
    databases: tuple[Database, Database], *, inner_first: bool
) -> None:
    """P6: a hook belongs to the savepoint opened last, on whichever database.

    It is dropped when either is rolled back, also if the two overlap.
    """
    one, two = databases
    record = Record()

    async with uow.unit_of_work(one, two):
        sessions: list[uow.Session] = [
            uow.current_session(one),
            uow.current_session(two),
        ]
        for session in sessions:
            await session.execute("SELECT 1")
        outer = await sessions[0].begin_nested()
        record.register("a")
        inner = await sessions[1].begin_nested()
        record.register("b")
        if inner_first:
            await inner.commit()
            record.register("c")
            await outer.rollback()
            assert ["c", "b", "a"] == record.rolled_back
        else:
            await outer.rollback()
            assert ["b", "a"] == record.rolled_back
            record.register("c")
            await inner.commit()
        record.register("d")

    record.all_committed("d" if inner_first else "cd")


@on("asyncmy")
async def test_p6_unproven_rollback(db: Database, backend: MariaDBBackend) -> None:
    """P3: the hooks of a savepoint whose rollback nobody acknowledged have to wait.

    They are called when the rollback of the whole is proven.
    """
    record = Record()

    async def handler() -> None:
        await shop.insert(1)
        record.register("a")
        with contextlib.suppress(Undo, sa_exc.DBAPIError):
            async with uow.savepoint():
                await shop.insert(2)
                record.register("b")
                await backend.kill_connections()
                raise Undo
        await uow.current_session().flush()  # asks the database nothing
        assert [] == record.rolled_back

    response = await handle(handler, db)

    assert 503 == response.status
    record.all_committed("")
    assert ["b", "a"] == record.rolled_back


async def test_p6_savepoint_in_a_before_commit_hook(db: Database) -> None:
    """P6: hooks registered by a before_commit hook follow its savepoints too."""
    called: list[str] = []

    async def enqueue() -> None:
        async with uow.savepoint():
            uow.before_commit(called.append, "kept")
        with contextlib.suppress(Undo):
            async with uow.savepoint():
                uow.before_commit(called.append, "undone")
                uow.after_commit(called.append, "undone")
                raise Undo

    async with db:
        uow.before_commit(enqueue)

    assert ["kept"] == called


@on("aiosqlite")
async def test_p5_undone_hook_on_sqlite_does_not_wait_for_itself(
    db: Database, backend: SQLiteBackend
) -> None:
    """P5: the hook of a savepoint cannot write while its unit holds the only lock.

    It is refused at once, and the unit goes on.
    """
    refused: list[BaseException] = []

    async def compensate() -> None:
        try:
            uow.current_session()
        except RuntimeError as error:
            refused.append(error)
            raise

    async with db:
        await shop.insert(1)
        with contextlib.suppress(Undo):
            async with uow.savepoint():
                uow.after_rollback(compensate)
                raise Undo
        assert "NestedUnitOfWorkError" == type(refused[0]).__name__
        await shop.insert(2)

    assert [1, 2] == await shop.items(backend)
