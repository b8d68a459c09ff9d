"""What differs from production: what docs/howto/testing.md says about it.

What a sandbox refuses is in `test_sandbox`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from contextvars import copy_context
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database, errors
from asgi_uow._testing import shared
from asgi_uow.testing import sandbox
from tests.support import shop
from tests.support.databases import DATABASES, SERVERS, on

if TYPE_CHECKING:
    from tests.servers import Backend, ServerBackend

NUMBERED = {
    "sqlite": "id INTEGER PRIMARY KEY AUTOINCREMENT",
    "mariadb": "id INTEGER PRIMARY KEY AUTO_INCREMENT",
    "postgresql": "id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}
GONE = "rolled the whole sandbox back"
INSIDE = "independent=True"
NUMBER = "INSERT INTO numbered (word) VALUES ('a') RETURNING id"


async def numbers(db: Database, times: int = 1) -> list[int]:
    """The numbers that rows get in sandboxes of their own."""
    found: list[int] = []
    for _ in range(times):
        async with sandbox(db), db:
            found.append(await db.write.scalar(NUMBER))
    return found


@on(*DATABASES)
async def test_numbers(db: Database, backend: Backend) -> None:
    """They go on counting on servers, and begin anew on SQLite."""
    columns = f"{NUMBERED[backend.name]}, word VARCHAR(9)"
    await backend.execute(f"CREATE TABLE numbered ({columns})")
    expected = [1, 1, 1] if backend.name == "sqlite" else [1, 2, 3]
    assert expected == await numbers(db, 3)


@on("aiosqlite")
async def test_numbers_of_rows(db: Database, backend: Backend) -> None:
    """Without AUTOINCREMENT they begin anew, too."""
    await backend.execute("CREATE TABLE numbered (id INTEGER PRIMARY KEY, word TEXT)")
    assert [1, 1] == await numbers(db, 2)


@on("asyncpg")
async def test_sequences(db: Database, backend: Backend) -> None:
    """They are not rolled back, as nowhere on PostgreSQL."""
    await backend.execute("CREATE SEQUENCE counter")
    async with sandbox(db), db:
        await db.write.scalar("SELECT nextval('counter')")
    assert 2 == await backend.scalar("SELECT nextval('counter')")


@on("asyncpg")
async def test_time_stands_still(db: Database) -> None:
    """All units of a sandbox have one now(): that of its beginning."""
    clocks = [
        "SELECT now()",
        "SELECT current_timestamp",
        "SELECT clock_timestamp()",
    ]
    found: list[list[object]] = []
    async with sandbox(db):
        for _ in range(2):
            async with db:
                found.append([await db.write.scalar(each) for each in clocks])
    first, second = found
    assert [True, True, False] == [a == b for a, b in zip(first, second, strict=True)]


@on("asyncmy")
async def test_time_goes_on(db: Database) -> None:
    """On MariaDB each statement has a time of its own."""
    async with sandbox(db), db:
        first = await db.write.scalar("SELECT now(6)")
        assert first < await db.write.scalar("SELECT now(6)")


@on("aiosqlite", "asyncpg")
async def test_ddl(db: Database, backend: Backend) -> None:
    """It is rolled back with the rest."""
    create = "CREATE TABLE made (id INTEGER)"
    async with sandbox(db):
        async with db:
            await db.write.execute(create)
        async with db:
            assert 0 == await db.read.scalar("SELECT count(*) FROM made")
    await backend.execute(create)


@on("asyncpg")
async def test_isolation_level(db: Database) -> None:
    """It has no effect: the sandbox's transaction has the default."""
    async with sandbox(db), db:
        uow.isolation_level("SERIALIZABLE")
        level = await db.write.scalar("SHOW transaction_isolation")
    assert "read committed" == level


@on(*SERVERS, read_isolation="REPEATABLE READ")
async def test_read_isolation(db: Database) -> None:
    """It has no effect: a unit sees what another has committed meanwhile."""

    async def other() -> None:
        async with db:
            await shop.insert(1)

    async with sandbox(db):
        outside = copy_context()  # of the unit
        async with db:
            assert 0 == await db.read.scalar(shop.COUNT)
            await asyncio.create_task(other(), context=outside)
            assert 1 == await db.read.scalar(shop.COUNT)


@on(*DATABASES)
async def test_independent_units(db: Database) -> None:
    """One inside a unit that has written is refused; before that it works."""
    async with sandbox(db), db:
        async with uow.unit_of_work(db, independent=True):
            await shop.insert(1)
        await shop.insert(2)
        with pytest.raises(errors.AsgiUowError, match=INSIDE):
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(3)


@on("asyncpg")
async def test_what_ends_with_a_transaction(db: Database) -> None:
    """It ends with the sandbox: SET LOCAL, locks, ON COMMIT DROP."""
    async with sandbox(db):
        async with db:
            await db.write.execute("SET LOCAL statement_timeout = '7s'")
            await db.write.execute("SELECT pg_advisory_xact_lock(7)")
            create = "CREATE TEMPORARY TABLE made (id INTEGER) ON COMMIT DROP"
            await db.write.execute(create)
        async with db:
            assert "7s" == await db.write.scalar("SHOW statement_timeout")
            locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            assert 1 == await db.write.scalar(locks)
            assert 0 == await db.write.scalar("SELECT count(*) FROM made")
    async with db:
        assert "0" == await db.write.scalar("SHOW statement_timeout")


@on("asyncpg")
async def test_what_a_rolled_back_unit_has_set(db: Database) -> None:
    """SET LOCAL of a unit that is rolled back is undone with it."""
    async with sandbox(db):
        with pytest.raises(ZeroDivisionError):
            async with db:
                await db.write.execute("SET LOCAL statement_timeout = '7s'")
                raise ZeroDivisionError
        async with db:
            assert "0" == await db.write.scalar("SHOW statement_timeout")


@on(*SERVERS)
async def test_settings_of_the_session(db: Database, backend: Backend) -> None:
    """What a unit sets and commits is there for the next one in the sandbox."""
    is_mariadb = backend.name == "mariadb"
    name = "lock_wait_timeout" if is_mariadb else "statement_timeout"
    show = f"SELECT @@{name}" if is_mariadb else f"SHOW {name}"
    async with sandbox(db):
        async with db:
            before = await db.write.scalar(show)
            await db.write.execute(f"SET {name} = 7")
        async with db:
            assert before != await db.write.scalar(show)
    async with db:
        assert before == await db.write.scalar(show)


@on(*SERVERS)
async def test_unique_keys_block(db: Database, backend: Backend) -> None:
    """A key that one sandbox has written is waited for in another."""
    is_mariadb = backend.name == "mariadb"
    name = "innodb_lock_wait_timeout = 1" if is_mariadb else "lock_timeout = 50"
    async with sandbox(db):
        async with db:
            await shop.insert(1)
        async with sandbox(db):
            async with db:
                await shop.insert(2)
            with pytest.raises(sa_exc.DBAPIError):
                async with db:
                    await db.write.execute(f"SET {name}")
                    await shop.insert(1)


@on(*SERVERS)
async def test_deadlock_with_another_sandbox(db: Database, backend: Backend) -> None:
    """It ends the sandbox that MariaDB chooses, or the unit that PostgreSQL does."""
    both = asyncio.Barrier(2)

    async def is_chosen(mine: int, theirs: int) -> bool:
        async with sandbox(db):
            async with db:
                await shop.insert(mine)
            await both.wait()
            try:
                async with db:
                    await shop.insert(theirs)
            except sa_exc.DBAPIError:
                async with AsyncExitStack() as stack:
                    if backend.name == "mariadb":
                        raised = pytest.raises(errors.SandboxError, match=GONE)
                        stack.enter_context(raised)
                    async with db:
                        assert [mine] == list(await db.read.scalars(shop.SELECT))
                return True
        return False

    chosen = await asyncio.gather(is_chosen(1, 2), is_chosen(2, 1))
    assert [False, True] == sorted(chosen)


@on("aiosqlite")
async def test_second_sandbox_on_a_file(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the first one, and then gives up."""
    async with sandbox(db):
        monkeypatch.setattr(shared, "WAIT", 0.1)
        with pytest.raises(errors.SandboxError, match="one sandbox at a time"):
            await sandbox(db).__aenter__()


@on(*SERVERS, pool_size=1, max_overflow=0, pool_timeout=0.1)
async def test_limits_of_the_pool(db: Database, backend: ServerBackend) -> None:
    """More than the pool has may be in use, since all are one connection."""
    async with sandbox(db), db.engine.connect(), db.engine.connect(), db:
        await shop.insert(1)
        assert 1 == await backend.connections()
