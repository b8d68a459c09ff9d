"""A process that forks after it has used its database; `test_forks` runs it."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from asgi_uow import Database, current_session, errors, in_unit_of_work, unit_of_work
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

LIMIT_SECONDS = 20
MOST_FILES = 64
SERVER_PROCESS = {"mariadb": "connection_id()", "postgresql": "pg_backend_pid()"}

db = Database.from_url(sys.argv[1], pool_size=1, max_overflow=0)


def fork(child: Callable[[], object], end: Callable[[int], object] = os._exit) -> int:
    """Run it in a child process, and give its exit code."""
    number = os.fork()
    if number == 0:
        signal.alarm(LIMIT_SECONDS)  # instead of hanging
        child()
        gc.collect()
        end(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


async def insert(*numbers: int) -> None:
    """Insert an item in a unit of its own each, then read."""
    for number in numbers:
        async with db:
            await shop.insert(number)
    async with db:
        await db.read.execute(shop.SELECT)


async def server_process() -> object:
    """Tell which connection the pool has."""
    sql = SERVER_PROCESS.get(db.engine.dialect.name, "1")
    async with db:
        return await db.write.scalar(f"SELECT {sql}")


def between_loops() -> None:
    """The module has used the database; then workers are forked."""
    asyncio.run(insert(1))
    assert 0 == fork(lambda: asyncio.run(insert(2)), sys.exit)
    asyncio.run(insert(3))


def twice() -> None:
    """A child of a child is a process of its own too."""
    asyncio.run(insert(1))

    def child() -> None:
        asyncio.run(insert(2))
        assert 0 == fork(lambda: asyncio.run(insert(3)))

    assert 0 == fork(child)


def while_connecting() -> None:
    """What the parent holds to set up its first connection is not held in the child."""
    forked: list[int] = []

    def fork_once(*_: object) -> None:
        if not forked:
            forked.append(0)
            forked[0] = fork(lambda: asyncio.run(insert(1)))

    event.listen(db.engine.sync_engine, "connect", fork_once)
    asyncio.run(insert(2))
    assert [0] == forked


def while_used() -> None:
    """The parent goes on with the unit and the connections that it had."""

    async def parent() -> None:
        await insert(1)
        before = await server_process()
        async with db as uow:
            await uow.read_session().execute(shop.SELECT)
            assert 0 == fork(lambda: asyncio.run(insert(2, 3)))
            await uow.read_session().execute(shop.SELECT)
            await shop.insert(4)
        assert before == await server_process()

    asyncio.run(parent())


def unit_of_parent() -> None:
    """A unit of the parent is none here, and its session refuses, cancelled or not."""

    async def child(block: unit_of_work) -> None:
        assert not in_unit_of_work()
        session = block.unit.session()
        for _ in range(2):
            with pytest.raises(errors.WrongLoopError):
                await asyncio.wait_for(session.execute(shop.SELECT), 5)
        with pytest.raises(errors.OutcomeUnknownError):
            await block.__aexit__(None, None, None)
        async with db:
            await db.read.execute(shop.SELECT)

    async def parent() -> None:
        block = unit_of_work(db)
        await block.__aenter__()
        await shop.insert(1)
        assert 0 == fork(lambda: asyncio.run(child(block)))
        await current_session().execute(shop.SELECT)
        await shop.insert(2)
        await block.__aexit__(None, None, None)

    asyncio.run(parent())


async def use(connection: AsyncConnection, number: int) -> None:
    """A connection of the parent fails here, at once."""
    for call in (connection.exec_driver_sql("SELECT 1"), connection.close()):
        task = asyncio.create_task(call)
        await asyncio.wait({task}, timeout=5)
        assert task.done()
        task.exception()  # whatever the driver says
    await insert(number)


def connection_of_parent() -> None:
    """The parent goes on with a connection that the child has tried to use."""
    free = os.open(os.devnull, os.O_RDONLY)

    async def parent() -> None:
        async with db.engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
            await connection.rollback()
            os.close(free)  # a number below that of the connection
            assert 0 == fork(lambda: asyncio.run(use(connection, 1)))
            await connection.exec_driver_sql("SELECT 1")
        await insert(2)

    asyncio.run(parent())


def without_descriptors() -> None:
    """So it does where the process may open no more files."""
    files: list[int] = []

    def close_files() -> None:
        while files:
            os.close(files.pop())

    def child(connection: AsyncConnection) -> None:
        close_files()
        asyncio.run(use(connection, 1))

    async def parent() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with db.engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")
            await connection.rollback()
            resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, hard))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    files.append(os.open(os.devnull, os.O_RDONLY))
            code = fork(lambda: child(connection))
            close_files()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert 0 == code
            await connection.exec_driver_sql("SELECT 1")
        await insert(2)

    asyncio.run(parent())


def dropped_unit() -> None:
    """The parent's unit is not the child's to roll back, when nobody refers to it."""
    blocks: list[unit_of_work] = []

    async def parent() -> None:
        blocks.append(unit_of_work(db))
        await blocks[0].__aenter__()
        await shop.insert(1)
        assert 0 == fork(blocks.clear)
        await shop.insert(2)
        await blocks.pop().__aexit__(None, None, None)

    asyncio.run(parent())


def in_memory() -> None:
    """What is in the memory of the parent is not here."""

    async def use() -> None:
        async with db:
            await db.write.execute("SELECT 1")

    async def child() -> None:
        with pytest.raises(errors.WrongLoopError, match=f"process {os.getppid()}"):
            await use()
        await db.dispose()

    asyncio.run(use())
    assert 0 == fork(lambda: asyncio.run(child()))
    asyncio.run(use())


def memory_of_nobody() -> None:
    """What was made before the fork, and used by nobody, is the child's own."""

    async def use() -> None:
        async with db:
            await db.write.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")

    assert 0 == fork(lambda: asyncio.run(use()))
    asyncio.run(use())


globals()[sys.argv[2]]()
