"""The table of docs/faults.md: one test per row and driver, and it says what for."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import SQLAlchemyError

import asgi_uow as uow
from asgi_uow import Database
from tests.promises.faults.mortal import KINDS, checked_out
from tests.servers import eventually
from tests.support import ROOT, shop
from tests.support.asgi import Response, handle, http_scope, request, respond

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.promises.faults.mortal import Mortal
    from tests.servers import Hold, RecordingProxy

    Step: TypeAlias = Callable[["Request"], Awaitable[object]]

PAGE = ROOT / "docs" / "faults.md"
HEAD = ["Fault", "The client gets", "The work is", "Hooks that run"]
SUBJECT = 100
"""The number that the request inserts to which the fault happens."""


@dataclasses.dataclass
class Request:
    """The request to which the fault happens, and where it happens."""

    mortal: Mortal
    proxy: RecordingProxy
    task: asyncio.Task[Response] | None = None

    async def kill_connections(self) -> None:
        await self.mortal.backend.kill_connections()

    def hold_commit(self) -> Hold:
        return self.proxy.hold_answer(is_commit)


def is_commit(trip: str) -> bool:
    return trip == "COMMIT"


def is_rollback(trip: str) -> bool:
    return trip == "ROLLBACK"


async def nothing(_: Request) -> None:
    """Go on."""


async def crash(to: Request) -> None:
    await to.mortal.crash()


async def restart(to: Request) -> None:
    await to.mortal.restart()


async def stop(to: Request) -> None:
    await to.mortal.stop()


async def kill(to: Request) -> None:
    await to.kill_connections()


async def kill_then_execute(to: Request) -> None:
    await to.kill_connections()
    await shop.insert(SUBJECT + 1)


async def kill_then_ignore(to: Request) -> None:
    with suppress(SQLAlchemyError):
        await kill_then_execute(to)


async def cut_rollback(to: Request) -> None:
    to.proxy.cut_before(is_rollback)


async def cut_before_commit(to: Request) -> None:
    to.proxy.cut_before(is_commit)


async def cut_after_commit(to: Request) -> None:
    to.proxy.cut_after(is_commit)


async def answer_commit_too_late(to: Request) -> None:
    hold = to.hold_commit()
    assert to.task is not None
    await asyncio.wait((to.task,))
    hold.release()


async def kill_during_commit(to: Request) -> None:
    hold = to.hold_commit()
    await hold.answered.wait()
    await to.mortal.kill()
    to.proxy.cut()  # what the server had sent is lost with it


async def cancel_during_commit(to: Request) -> None:
    hold = to.hold_commit()
    await hold.answered.wait()
    assert to.task is not None
    to.task.cancel()
    hold.release()


@dataclasses.dataclass(frozen=True)
class Fault:
    """When what is done to the request."""

    before: Step = nothing
    inside: Step = nothing
    """Called in the handler, after its statement."""
    beside: Step = nothing
    """Runs at the same time as the request."""
    status: int = 200
    """How the handler answers."""
    commit_timeout: float = 30.0


FAULTS = {
    "between two requests the server crashes and comes back": Fault(before=crash),
    "between two requests the server is restarted in order": Fault(before=restart),
    "between two requests the idle connections are killed": Fault(before=kill),
    "the server is down when the request comes in": Fault(before=stop),
    "the connection is killed before a statement": Fault(inside=kill_then_execute),
    "the same, and the handler ignores the error": Fault(inside=kill_then_ignore),
    "the connection is killed after the last statement": Fault(inside=kill),
    "the server crashes after the last statement": Fault(inside=crash),
    "the same, and the response is an error": Fault(inside=crash, status=404),
    "the connection breaks during ROLLBACK": Fault(inside=cut_rollback, status=404),
    "the connection breaks before COMMIT reaches the server": Fault(
        inside=cut_before_commit
    ),
    "the connection breaks before the answer to COMMIT arrives": Fault(
        inside=cut_after_commit
    ),
    "the server crashes before the answer to COMMIT arrives": Fault(
        beside=kill_during_commit
    ),
    "the answer to COMMIT takes longer than `commit_timeout`": Fault(
        beside=answer_commit_too_late, commit_timeout=0.2
    ),
    "the client goes away while COMMIT is under way": Fault(
        beside=cancel_during_commit
    ),
}


def table() -> list[list[str]]:
    """Read the rows of the page's only table, its head included."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def answer_of(response: Response | BaseException, fault: Fault) -> str:
    """Tell what the client got, in the words of the table."""
    if isinstance(response, BaseException):
        assert isinstance(response, asyncio.CancelledError)
        return "nothing"
    if response.status == fault.status:
        assert response.error is None
        return "the response"
    assert response.error is not None
    retry = " with `Retry-After`" * ("retry-after" in response.headers)
    return f"{response.status}{retry}"


async def insert_side_by_side(db: Database, *numbers: int) -> list[int]:
    """Send a request per number at once; tell the statuses."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.insert(scope["number"])
        await respond(send)

    outer = uow.UnitOfWorkMiddleware(app, db)
    responses = await asyncio.gather(
        *(request(outer, scope=http_scope(number=number)) for number in numbers)
    )
    return [response.status for response in responses]


def test_the_rows_of_the_table_are_the_ones_tested() -> None:
    """A row without a test, or a test without a row, is noticed."""
    head, _, *rows = table()
    assert HEAD == head
    assert list(FAULTS) == [row[0] for row in rows]


@pytest.mark.parametrize("driver", KINDS)
@pytest.mark.parametrize("name", FAULTS)
async def test_fault(name: str, mortal: Mortal) -> None:
    """What the page says of this row is what the world outside sees."""
    [row] = [row for row in table() if row[0] == name]
    fault, backend = FAULTS[name], mortal.backend
    hooks: list[str] = []

    async def handler() -> None:
        for register in (uow.after_commit, uow.after_response, uow.after_rollback):
            register(hooks.append, register.__name__)
        await shop.insert(SUBJECT)
        await fault.inside(to)

    await shop.create(backend)
    async with backend.proxy() as proxy:
        # Straight to the server where nothing is done on the way.
        direct = fault.before is not nothing
        url = backend.url if direct else backend.through(proxy.port)
        db = Database.from_url(url)
        assert [200, 200, 200] == await insert_side_by_side(db, 1, 2, 3)
        to = Request(mortal, proxy)

        await fault.before(to)
        to.task = asyncio.create_task(
            handle(
                handler, db, status=fault.status, commit_timeout=fault.commit_timeout
            )
        )
        [response, _] = await asyncio.gather(
            to.task, fault.beside(to), return_exceptions=True
        )
        assert 0 == checked_out(db)
        await mortal.start()

        _, answer, work, hooks_that_run = row
        assert isinstance(response, (Response, BaseException))
        assert answer == answer_of(response, fault)
        assert re.findall(r"`(\w+)`", hooks_that_run) == hooks
        await eventually(0, backend.open_transactions)
        kept = [SUBJECT] * (work == "kept")
        assert [1, 2, 3, *kept] == await shop.items(backend)
        assert [200, 200, 200] == await insert_side_by_side(db, 4, 5, 6)
        assert 0 == checked_out(db)
        await db.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_crash_gives_the_transaction_id_to_another(mortal: Mortal) -> None:
    """What PostgreSQL says of an id after a crash may be about somebody else's work.

    The id of a transaction of which nothing had reached the disk is used again.
    """
    backend = mortal.backend
    hooks: list[str] = []

    async def handler() -> None:
        uow.after_commit(hooks.append, "after_commit")
        await shop.insert(SUBJECT)

    await shop.create(backend)
    async with backend.proxy() as proxy:
        url = backend.through(proxy.port)
        db = Database.from_url(url, resolve_unknown=True)
        cut = proxy.cut_before(is_commit)
        task = asyncio.create_task(handle(handler, db, commit_timeout=5))
        await cut.fired.wait()
        await mortal.crash()
        others = [f"INSERT INTO items (id) VALUES ({number})" for number in range(9)]
        await backend.execute(*others)
        response = await task
        assert 0 == checked_out(db)
        await db.dispose()

    assert list(range(9)) == await shop.items(backend)
    assert response.status in {500, 503}
    assert [] == hooks
