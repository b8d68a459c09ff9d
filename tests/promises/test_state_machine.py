"""The promises as invariants over random lives of a unit of work, on real SQLite."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import exc as sa_exc

import asgi_uow as uow
from asgi_uow import Database, errors
from tests.support.databases import checked_out
from tests.support.private import State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.support.private import Savepoint

T = TypeVar("T")

ROWS = st.integers(1, 4)
INSERT = "INSERT INTO items (id) VALUES (:id)"
INSERT_OR_ROLLBACK = "INSERT OR ROLLBACK INTO items (id) VALUES (:id)"
SLOW = (
    "INSERT INTO items (id) WITH RECURSIVE n (i) AS"
    " (SELECT 1000 UNION ALL SELECT note(i + 1) FROM n WHERE i < 5000000)"
    " SELECT i FROM n"
)


class RedirectError(Exception):
    """As frameworks raise it: nothing has failed."""

    status_code = 303


ENDS = st.sampled_from([None, None, RedirectError, ValueError, asyncio.CancelledError])


class Life(RuleBasedStateMachine):
    """One unit of work after the other, beside a model of what there has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "life.sqlite")
        self.runner = asyncio.Runner()
        self.db = Database.from_url(f"sqlite:///{self.path}")
        self.kept: frozenset[int] = frozenset()
        self.unit: uow.UnitOfWork | None = None
        self.ended: list[tuple[uow.UnitOfWork, uow.Session]] = []
        self._forget()
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("CREATE TABLE items (id INTEGER PRIMARY KEY)")

    def _forget(self) -> None:
        self.rows = set(self.kept)
        self.savepoints: list[tuple[Savepoint, frozenset[int]]] = []
        self.doomed = False
        self.rollback_only = False
        self.hooks: dict[uow.Outcome, list[str]] = {each: [] for each in uow.Outcome}
        self.fired: list[str] = []

    def teardown(self) -> None:
        if self.unit is not None:
            self.leave(ValueError)
        self._run(self.db.dispose)
        self.runner.close()
        self.folder.cleanup()

    def _run(self, work: Callable[[], Coroutine[object, object, T]]) -> T:
        return self.runner.run(work())

    def _execute(self, sql: str, **named: object) -> None:
        """Execute on the write session; once doomed, it may be refused."""

        async def execute() -> None:
            if self.doomed:
                with suppress(errors.TransactionGoneError, sa_exc.SQLAlchemyError):
                    await uow.current_session().execute(sql, named)
            else:
                await uow.current_session().execute(sql, named)

        self._run(execute)

    # The rules

    @precondition(lambda self: self.unit is None)
    @rule()
    def enter(self) -> None:
        self._forget()
        self.unit = self._run(self.db.__aenter__)

    @precondition(lambda self: self.unit)
    @rule(row=ROWS)
    def insert(self, row: int) -> None:
        """A row that is there already is an error, which is swallowed."""
        is_there = row in self.rows and not self.doomed
        with pytest.raises(sa_exc.IntegrityError) if is_there else nullcontext():
            self._execute(INSERT, id=row)
        self.rows.add(row)

    @precondition(lambda self: self.unit)
    @rule(row=ROWS)
    def delete(self, row: int) -> None:
        self._execute("DELETE FROM items WHERE id = :id", id=row)
        self.rows.discard(row)

    @precondition(lambda self: self.unit and not self.doomed)
    @rule()
    def read(self) -> None:
        """The read session sees what the unit has written."""

        async def read() -> set[int]:
            found = await uow.current_read_session().scalars("SELECT id FROM items")
            return set(found)

        assert self.rows == self._run(read)

    @precondition(lambda self: self.unit)
    @rule()
    def fail(self) -> None:
        """A statement that cannot be understood, swallowed."""
        with suppress(sa_exc.SQLAlchemyError):
            self._execute("SELECTED")

    @precondition(lambda self: self.unit and self.rows)
    @rule()
    def doom(self) -> None:
        """SQLite rolls everything back, and the error is swallowed."""
        with suppress(sa_exc.SQLAlchemyError):
            self._execute(INSERT_OR_ROLLBACK, id=min(self.rows))
        self.doomed = True

    @precondition(lambda self: self.unit and not self.doomed)
    @rule()
    def cancel(self) -> None:
        """A statement is cancelled in the middle, and that is swallowed."""

        async def cancel() -> None:
            loop = asyncio.get_running_loop()
            running = asyncio.Event()

            def note(number: int) -> int:
                if number == 1100:
                    loop.call_soon_threadsafe(running.set)
                return number

            session = uow.current_session()
            pooled = await (await session.connection()).get_raw_connection()
            assert pooled.driver_connection is not None
            await pooled.driver_connection.create_function("note", 1, note)
            task = asyncio.create_task(session.execute(SLOW))
            await running.wait()
            task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled()

        self._run(cancel)
        self.doomed = True

    @precondition(lambda self: self.unit and not self.doomed)
    @rule()
    def enter_savepoint(self) -> None:
        async def enter() -> Savepoint:
            opened = uow.savepoint()
            await opened.__aenter__()
            return opened

        self.savepoints.append((self._run(enter), frozenset(self.rows)))

    @precondition(lambda self: self.unit and self.savepoints)
    @rule(fails=st.booleans())
    def leave_savepoint(self, fails: bool) -> None:
        opened, before = self.savepoints.pop()
        error = ValueError() if fails else None

        async def leave() -> None:
            await opened.__aexit__(type(error) if error else None, error, None)

        gone = (errors.TransactionGoneError, sa_exc.SQLAlchemyError)
        with suppress(*gone if self.doomed else ()):
            self._run(leave)
        if fails:
            self.rows = set(before)

    @precondition(lambda self: self.unit)
    @rule()
    def mark_rollback_only(self) -> None:
        self._run(self._mark_rollback_only)
        self.rollback_only = True

    async def _mark_rollback_only(self) -> None:
        uow.set_rollback_only("the machine says so")

    @precondition(lambda self: self.unit)
    @rule()
    def force(self) -> None:
        """Nothing that a unit outside a request would not do by itself."""
        self._run(self._force)

    async def _force(self) -> None:
        uow.force_commit()

    @precondition(lambda self: self.unit and not self.savepoints)
    @rule(name=st.sampled_from("abc"))
    def register(self, name: str) -> None:
        """Hooks registered inside a savepoint have tests of their own."""

        async def fire() -> None:
            self.fired.append(name)

        async def register() -> None:
            uow.after_commit(fire)
            uow.after_rollback(fire)

        self._run(register)
        self.hooks[uow.Outcome.COMMITTED].append(name)
        self.hooks[uow.Outcome.ROLLED_BACK].insert(0, name)

    @precondition(lambda self: self.unit)
    @rule(error=ENDS)
    def leave(self, error: type[BaseException] | None) -> None:
        unit = self.unit
        assert unit is not None
        self.ended.append((unit, unit.session()))
        wanted = not self.rollback_only and error in {None, RedirectError}
        self.unit = None

        async def leave() -> None:
            await self.db.__aexit__(error, None if error is None else error(), None)

        if wanted and self.doomed:
            with pytest.raises(errors.DoomedError):
                self._run(leave)
        else:
            self._run(leave)
        if wanted and not self.doomed:
            outcome = uow.Outcome.COMMITTED
            self.kept = frozenset(self.rows)
        else:
            outcome = uow.Outcome.ROLLED_BACK
        assert outcome is unit.outcome
        assert State.CLOSED is unit.state
        assert self.hooks[outcome] == self.fired

    # What is true at any time

    @invariant()
    def others_see_what_was_committed(self) -> None:
        with closing(sqlite3.connect(self.path)) as connection:
            found = connection.execute("SELECT id FROM items").fetchall()
        assert self.kept == {row for [row] in found}

    @invariant()
    def connections_are_held_by_the_unit_alone(self) -> None:
        if self.unit is None:
            assert [0, 0] == checked_out(self.db)
        else:
            assert [] == self.fired

    @invariant()
    def nobody_serves_the_ended(self) -> None:
        async def use() -> None:
            unit, session = self.ended[-1]
            for call in (
                unit.session,
                unit.read_session,
                unit.force_commit,
                lambda: unit.set_rollback_only("too late"),
            ):
                with pytest.raises(errors.UnitOfWorkClosedError):
                    call()
            with pytest.raises(errors.UnitOfWorkClosedError):
                await session.execute("SELECT 1")
            if self.unit is None:
                with pytest.raises(errors.NoUnitOfWorkError):
                    uow.current_unit_of_work()

        if self.ended:
            self._run(use)


def test_life() -> None:
    """P2, P3, P7, P8, P9: whatever the order, rows and hooks follow the outcome."""
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=80,
            stateful_step_count=25,
            deadline=None,
            derandomize=os.environ.get("CI") == "true",
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
