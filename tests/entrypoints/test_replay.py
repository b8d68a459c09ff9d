"""`Retry`: a request that met a conflict is replayed, and what must not be is not."""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.sessions import SessionMiddleware

import asgi_uow as uow
from asgi_uow import Database, Outcome, Retry, UnitOfWorkMiddleware, errors
from asgi_uow.observers import CommitFailed, RetryScheduled, UnitFinished
from tests.servers.process import HOST, free_port
from tests.support import shop
from tests.support.asgi import (
    BODY,
    START,
    Client,
    Response,
    endpoint,
    http_scope,
    no_body,
    respond,
)
from tests.support.conflicts import (
    CODES,
    READ,
    WRITE,
    conflict,
    conflicting_shop,
    rival_of,
)
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    is_commit,
    on,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from asgi_uow._asgi import Message, Receive, Scope, Send
    from tests.servers import Backend, ServerBackend
    from tests.servers.backend import MariaDBBackend

pytestmark = on(*DRIVERS)

SOON: dict[str, Any] = {"backoff": 0.001}


class Site:
    """An application whose first attempts, as many as told, meet a conflict."""

    def __init__(self, backend: Backend, conflicts: int = 1) -> None:
        self.backend = backend
        self.conflicts = conflicts
        self.attempts: list[tuple[int, bool]] = []
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.response = Response()
        self.answer: Callable[[Send], Awaitable[None]] | None = None
        """How it answers a conflict; by default it does not handle the error."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unit = uow.current_unit_of_work()
        self.response.units.append(unit)
        self.attempts.append((unit.attempt, unit.is_last_attempt))
        self.scopes.append(scope)
        uow.after_commit(self.response.hooks.append, "commit")
        uow.after_rollback(self.response.hooks.append, "rollback")
        self.bodies.append(await read(receive))
        try:
            if len(self.attempts) <= self.conflicts:
                await conflict(self.backend)
            await uow.current_session().execute(WRITE)
        except DBAPIError:
            if self.answer is None:
                raise
            return await self.answer(send)
        await respond(send)
        return None

    async def serve(
        self,
        db: Database,
        retry: Retry | None = None,
        *,
        body: tuple[bytes, ...] = (),
        scope: Scope = None,
        **options: Any,
    ) -> Response:
        retry = Retry(**SOON) if retry is None else retry
        options = {"observers": [self.response.events], **options}
        app = UnitOfWorkMiddleware(self, db, retry=retry, **options)
        receive = sending(*body)
        return await Client(app).request(
            scope=scope or http_scope(), receive=receive, into=self.response
        )

    async def kept(self) -> object:
        return await self.backend.scalar(READ)


def sending(*chunks: bytes) -> Receive:
    """Give a request's body in these parts, once."""
    parts = [*chunks] or [b""]

    async def receive() -> Message:
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    return receive


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def test_it_is_replayed(backend: Backend) -> None:
    """The client sees the second attempt alone; hooks of the first are not called."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)
        response = await site.serve(db, body=(b"one", b"two"))
        assert (200, None) == (response.status, response.error)
        assert [(1, False), (2, False)] == site.attempts
        assert [b"onetwo", b"onetwo"] == site.bodies
        assert ["rollback", "commit"] == response.hooks
        outcomes = [each.outcome for each in response.units]
        assert [Outcome.ROLLED_BACK, Outcome.COMMITTED] == outcomes
        assert 1 == await site.kept()
        [told] = response.events.of(RetryScheduled)
        assert (2, CODES[backend.name]) == (told.attempt, told.code)
        assert 0 <= told.seconds <= 0.001
        assert [] == response.events.of(CommitFailed)
        assert 2 == len(response.events.of(UnitFinished))
        assert [0, 0] == checked_out(db)


async def answer(send: Send) -> None:
    await respond(send, 409)


async def test_an_answer_to_the_conflict(backend: Backend) -> None:
    """What the application made of the error is held, and replaced."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)
        site.answer = answer
        response = await site.serve(db)
        assert (200, None, 2) == (response.status, response.error, len(site.attempts))
        assert ["rollback", "commit"] == response.hooks


@on(*SERVER_DRIVERS)
async def test_an_answer_when_used_up(backend: Backend) -> None:
    """Where the database has given the work up, the client is asked to come again."""
    async with conflicting_shop(backend) as db:
        site = Site(backend, conflicts=2)
        site.answer = answer
        response = await site.serve(db, Retry(attempts=2, **SOON))
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert isinstance(response.error, errors.DoomedError)


@on("aiosqlite")
@pytest.mark.parametrize(("own", "sent"), [(409, 409), (500, 503), (502, 502)])
async def test_an_own_answer_when_used_up(
    backend: Backend, own: int, sent: int
) -> None:
    """Where it has not, the application's is sent, but for that it broke down."""

    async def answer(send: Send) -> None:
        await respond(send, own)

    async with conflicting_shop(backend) as db:
        site = Site(backend, conflicts=2)
        site.answer = answer
        response = await site.serve(db, Retry(attempts=2, **SOON))
        assert (sent, 2) == (response.status, len(site.attempts))
        assert (sent == 503) == ("retry-after" in response.headers)
        assert ["rollback"] * 2 == response.hooks


async def test_used_up(backend: Backend) -> None:
    """After the last attempt the client is asked to come again; nothing was kept."""
    async with conflicting_shop(backend) as db:
        site = Site(backend, conflicts=3)
        response = await site.serve(db)
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert isinstance(response.error, DBAPIError)
        assert [(1, False), (2, False), (3, True)] == site.attempts
        assert ["rollback"] * 3 == response.hooks
        assert 2 == len(response.events.of(RetryScheduled))
        assert 0 == await site.kept()


async def test_the_scope(backend: Backend) -> None:
    """Each attempt finds it as it came in; the server's has what the last one left."""
    server, tls = object(), [object()]
    scope = http_scope(
        state={"who": "ann"}, path_params={"id": 1}, app=server, extensions={"tls": tls}
    )
    mine, seen = scope["state"], list[object]()
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(inner: Scope, receive: Receive, send: Send) -> None:
            seen.append((dict(inner["state"]), dict(inner["path_params"])))
            inner["state"]["attempt"] = uow.current_unit_of_work().attempt
            inner["path_params"].clear()
            inner["route"] = f"route of {len(seen)}"
            inner["found"] = {"by": "a router"}
            del inner["raw_path"]

            async def sending(message: Message) -> None:
                await send(message)
                seen.append(scope["route"])

            await site(inner, receive, sending)

        response = Response()
        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        await Client(wrapped).request(scope=scope, into=response, receive=sending())
    as_it_came = ({"who": "ann"}, {"id": 1})
    assert [as_it_came, as_it_came, "route of 2", "route of 2"] == seen
    assert site.scopes[0] is not site.scopes[1]
    assert mine is scope["state"]
    assert [server] * 2 == [each["app"] for each in site.scopes]
    assert [tls] * 2 == [each["extensions"]["tls"] for each in site.scopes]
    assert {"who": "ann", "attempt": 2} == mine
    assert {"by": "a router"} == scope["found"]
    assert "raw_path" not in scope


class Noting(dict[str, object]):
    """One that notes changes, as Starlette's session does."""

    is_changed = False

    def __setitem__(self, key: str, value: object) -> None:
        self.is_changed = True
        super().__setitem__(key, value)


async def test_dictionaries_of_other_kinds(backend: Backend) -> None:
    """Each attempt finds them as they came in; the server's scope has the last ones."""
    counts = defaultdict[str, int](int)
    scope = http_scope(session=Noting(who="ann"), counts=counts)
    seen: list[object] = []
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(inner: Scope, receive: Receive, send: Send) -> None:
            mine = inner["session"]
            seen.append((dict(mine), mine.is_changed, dict(inner["counts"])))
            mine["attempt"] = uow.current_unit_of_work().attempt
            inner["counts"]["attempts"] += 1
            await site(inner, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        await Client(wrapped).request(scope=scope, receive=sending())
    assert [({"who": "ann"}, False, {})] * 2 == seen
    assert {"who": "ann", "attempt": 2} == scope["session"]
    assert {"attempts": 1} == scope["counts"]


async def answering(_: Scope, __: Receive, send: Send) -> None:
    await respond(send)


@pytest.mark.parametrize("changes", [False, True])
async def test_a_session(backend: Backend, *, changes: bool) -> None:
    """A session of a middleware around is sent if the last attempt changes it."""
    sessions: list[dict[str, object]] = []
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            sessions.append(dict(scope["session"]))
            if changes or len(sessions) == 2:
                scope["session"][f"attempt {len(sessions)}"] = True
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        client = Client(SessionMiddleware(wrapped, "a secret"))
        first = await client.request(receive=sending())
        assert [{}, {}] == sessions
        headers = [(b"cookie", first.cookie)]
        site.attempts.clear()
        site.conflicts = int(changes)
        second = await client.request(headers=headers, receive=sending())
        assert {"attempt 2": True} == sessions[2] == sessions[-1]
        # Older versions of Starlette send it always.
        plain = Client(SessionMiddleware(answering, "a secret"))
        always = "set-cookie" in (await plain.request(headers=headers)).headers
        assert (changes or always) == ("set-cookie" in second.headers)


async def test_a_list_in_a_session(backend: Backend) -> None:
    """Nothing in a session is of the attempt before, however deep it is."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["session"]["carts"]["mine"].append(len(site.attempts))
            scope["session"]["seen"][0]["at"] = len(site.attempts)
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        session = {"carts": {"mine": ["tea"]}, "seen": [{"at": None}]}
        scope = http_scope(session=session)
        await Client(wrapped).request(scope=scope, receive=sending())
        assert {"carts": {"mine": ["tea", 1]}, "seen": [{"at": 1}]} == scope["session"]


async def test_a_context_variable(backend: Backend) -> None:
    """What the first attempt sets is not there in the second; the last ones stay."""
    seen: list[tuple[str, str]] = []
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append((name.get(), other.get()))
            name.set("changed")
            other.set(f"set by {len(seen)}")
            await site(scope, receive, send)

        token = name.set("as before")
        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        await Client(wrapped).request(receive=sending())
        assert ("changed", "set by 2") == (name.get(), other.get())
        name.reset(token)
    assert [("as before", "")] * 2 == seen


name: ContextVar[str] = ContextVar("name", default="")
other: ContextVar[str] = ContextVar("other", default="")


async def swallow(site: Site, scope: Scope, receive: Receive, send: Send) -> None:
    """Handle what no application should."""
    try:
        await site(scope, receive, send)
    except BaseException:  # noqa: BLE001
        await respond(send, 500)


async def in_a_group(site: Site, scope: Scope, receive: Receive, send: Send) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(site, scope, receive, send)


async def raise_another(site: Site, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await site(scope, receive, send)
    finally:
        reason = "raised while the attempt was ended"
        if site.attempts == [(1, False)]:
            raise ValueError(reason)


async def through_starlette(
    site: Site, scope: Scope, receive: Receive, send: Send
) -> None:
    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Any:
        return await call_next(request)

    await BaseHTTPMiddleware(site, pass_on)(scope, receive, send)


@pytest.mark.parametrize(
    "wrap", [swallow, in_a_group, raise_another, through_starlette]
)
async def test_an_attempt_is_ended(backend: Backend, wrap: Callable[..., Any]) -> None:
    """Whatever is around the handler, its error answer is not sent."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)
        site.answer = answer

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await wrap(site, scope, receive, send)

        wrapped = UnitOfWorkMiddleware(
            app, db, retry=Retry(**SOON), observers=[site.response.events]
        )
        response = await Client(wrapped).request(receive=sending(), into=site.response)
        assert (200, None) == (response.status, response.error)
        assert 1 == await site.kept()


# What must not be replayed


async def not_replayed(
    site: Site, db: Database, retry: Retry | None = None, **options: Any
) -> Response:
    """Serve a request; it has one attempt, and nothing is kept."""
    response = await site.serve(db, retry, **options)
    assert 1 == len(site.attempts)
    assert [] == response.events.of(RetryScheduled)
    assert 0 == await site.kept()
    return response


async def test_the_method(backend: Backend) -> None:
    """POST and PATCH have to be named; so has what RFC 9110 does not know."""
    for method in ("POST", "PATCH", "LOCK"):
        async with conflicting_shop(backend) as db:
            scope = http_scope(method=method)
            response = await not_replayed(Site(backend), db, scope=scope)
            assert 503 == response.status
            retry = Retry(methods=[method.lower()], **SOON)
            assert 200 == (await Site(backend).serve(db, retry, scope=scope)).status
        await backend.execute("DROP TABLE counters", *DROPS[backend.name])


DROPS = {
    "sqlite": ["DROP TABLE items", "DROP TABLE parents"],
    "mariadb": ["DROP TABLE items"],
    "postgresql": ["DROP TABLE items", "DROP TABLE parents"],
}


async def test_when(backend: Backend) -> None:
    """`when` may exclude a request by its scope."""
    async with conflicting_shop(backend) as db:
        retry = Retry(when=lambda scope: scope["path"] != "/", **SOON)
        await not_replayed(Site(backend), db, retry)


async def test_a_large_body(backend: Backend) -> None:
    """With a body of more than `max_body` bytes there is one attempt."""
    async with conflicting_shop(backend) as db:
        retry = Retry(max_body=5, **SOON)
        response = await not_replayed(Site(backend), db, retry, body=(b"one", b"two"))
        assert 503 == response.status
        site = Site(backend)
        assert 200 == (await site.serve(db, retry, body=(b"on", b"two"))).status
        assert [b"ontwo"] * 2 == site.bodies


async def test_a_body_that_was_read_in_part(backend: Backend) -> None:
    """The next attempt has the parts that were read, then those that were not."""
    async with conflicting_shop(backend) as db:
        site, begun = Site(backend, conflicts=0), list[bytes]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if not begun:
                begun.append((await receive())["body"])
                await conflict(backend)
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending(b"one", b"two"))
        assert (200, [b"one"], [b"onetwo"]) == (response.status, begun, site.bodies)


async def test_what_reads_on(backend: Backend) -> None:
    """What an attempt has left behind takes nothing of the next one's body."""
    async with conflicting_shop(backend) as db:
        site, is_second = Site(backend), asyncio.Event()
        left: list[asyncio.Task[Message]] = []

        async def read_on(receive: Receive) -> Message:
            await is_second.wait()
            return await receive()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if left:
                is_second.set()
                assert "http.disconnect" == (await left[0])["type"]
            else:
                left.append(asyncio.create_task(read_on(receive)))
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        await Client(wrapped).request(receive=sending(b"one", b"two"))
        assert [b"onetwo"] * 2 == site.bodies


async def test_a_client_that_left(backend: Backend) -> None:
    """After a disconnect nobody waits for another attempt."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            gone = sending()
            assert "http.disconnect" == (await receive())["type"]
            await site(scope, gone, send)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        await Client(wrapped).request(receive=receive)
        assert 1 == len(site.attempts)


async def test_something_was_sent(backend: Backend) -> None:
    """What comes before the start, such as early hints, is not sent twice."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.early_hint", "links": []})
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending())
        assert 1 == len(site.attempts)
        assert ["http.response.early_hint", START, BODY] == response.types


async def test_the_deadline(backend: Backend) -> None:
    """An attempt that would begin after the deadline of the first does not begin."""
    async with conflicting_shop(backend) as db:
        retry = Retry(backoff=1e6, max_backoff=1e6)
        response = await not_replayed(Site(backend), db, retry, deadline=5)
        assert 503 == response.status
        site = Site(backend)
        site.answer = answer
        response = await site.serve(db, deadline=5)
        assert 200 == response.status
        first, second = [each.until for each in response.units]
        assert first == second is not None


async def test_rollback_only(backend: Backend) -> None:
    """Who asks for a rollback has it, and the response that goes with it."""

    async def give_up(send: Send) -> None:
        uow.set_rollback_only("enough")
        await respond(send, 409)

    async with conflicting_shop(backend) as db:
        site = Site(backend)
        site.answer = give_up
        assert 409 == (await not_replayed(site, db)).status


async def test_something_was_kept(backend: Backend) -> None:
    """Once a unit of the request has kept something, it is not done again."""
    async with conflicting_shop(backend) as db:
        site = Site(backend)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with uow.unit_of_work(db, independent=True):
                await shop.insert(7)
            await site(scope, receive, send)

        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending())
        assert ([], 1) == (response.messages, len(site.attempts))
        assert isinstance(response.error, DBAPIError)
        assert [7] == await shop.items(backend)


async def test_no_conflict(backend: Backend) -> None:
    """An error that would come again is raised at once."""
    async with conflicting_shop(backend) as db:
        await backend.execute("INSERT INTO items (id) VALUES (1)")
        app = endpoint(lambda: shop.insert(1))
        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending())
        assert isinstance(response.error, IntegrityError)
        assert [] == response.messages


async def test_the_pool(backend: Backend) -> None:
    """Who waited too long for a connection does not wait again."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}
    async with conflicting_shop(backend, **options) as db:
        site = Site(backend)
        async with db.engine.connect():
            response = await site.serve(db)
        assert (503, 1) == (response.status, len(site.attempts))


@pytest.mark.parametrize("attempts", [1, 2])
async def test_cancelled(backend: Backend, attempts: int) -> None:
    """A request that was cancelled is not replayed, whichever attempt it is in."""
    async with conflicting_shop(backend) as db:
        site, reached = Site(backend, conflicts=2), asyncio.Event()

        async def answer_or_wait(send: Send) -> None:
            if len(site.attempts) == attempts:
                reached.set()
                await asyncio.Event().wait()
            await respond(send, 409)

        site.answer = answer_or_wait
        serving = asyncio.create_task(site.serve(db))
        await reached.wait()
        serving.cancel()
        await asyncio.wait([serving])
        assert (serving.cancelled(), attempts) == (True, len(site.attempts))
        assert [0, 0] == checked_out(db)


@on(*SERVER_DRIVERS)
async def test_the_outcome_is_unknown(backend: ServerBackend) -> None:
    """A COMMIT whose answer was lost may have been carried out."""
    async with behind_proxy(backend) as (db, proxy):
        await backend.execute("CREATE TABLE counters (value INTEGER)")
        await backend.execute("INSERT INTO counters VALUES (0)")
        proxy.cut_after(is_commit)
        site = Site(backend, conflicts=0)
        response = await site.serve(db)
        assert (500, 1) == (response.status, len(site.attempts))
        assert isinstance(response.error, errors.OutcomeUnknownError)
        assert 1 == await site.kept()


@on(*SERVER_DRIVERS)
async def test_a_lost_connection(backend: ServerBackend) -> None:
    """One that was lost before COMMIT was sent: the next attempt has another."""
    async with behind_proxy(backend) as (db, proxy):
        await backend.execute("CREATE TABLE counters (value INTEGER)")
        await backend.execute("INSERT INTO counters VALUES (0)")
        cut = iter([True])
        proxy.cut_before(lambda trip: is_commit(trip) and next(cut, False))
        site = Site(backend, conflicts=0)
        response = await site.serve(db)
        assert 500 == response.status  # COMMIT was on its way
        site = Site(backend, conflicts=0)
        lost = iter([True])
        proxy.cut_before(lambda trip: trip.startswith("UPDATE") and next(lost, False))
        response = await site.serve(db)
        assert (200, 2) == (response.status, len(site.attempts))


@on("asyncmy", "asyncpg")  # those whose own error does not say so
async def test_a_silent_server(backend: ServerBackend) -> None:
    """Nor does it matter that the wait for a connection was too long."""
    name = "timeout" if backend.name == "postgresql" else "connect_timeout"
    with socket.create_server((HOST, 0)) as silent:
        url = backend.through(silent.getsockname()[1])
        db = Database.from_url(url, connect_args={name: 0.2})
        site = Site(backend, conflicts=0)
        response = await site.serve(db)
        assert (503, "1") == (response.status, response.headers["retry-after"])
        assert [(1, False), (2, False), (3, True)] == site.attempts


@on("asyncpg")
async def test_a_silent_server_for_the_flush(backend: ServerBackend) -> None:
    """So it is where the unit connects to flush what it was given."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(uow.current_unit_of_work().attempt)
        uow.current_session().add(shop.Item(id=1))
        await respond(send)

    with socket.create_server((HOST, 0)) as silent:
        url = backend.through(silent.getsockname()[1])
        db = Database.from_url(url, connect_args={"timeout": 0.2})
        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending())
    assert (503, [1, 2, 3]) == (response.status, attempts)


@on("asyncmy")
async def test_past_the_session(backend: MariaDBBackend) -> None:
    """A lock was not granted to a statement that the session knows nothing of."""
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = await uow.current_session().connection()
        attempts.append(uow.current_unit_of_work().attempt)
        try:
            await connection.exec_driver_sql(f"{READ} FOR UPDATE NOWAIT")
        finally:
            await rival.rollback()
        await respond(send)

    async with conflicting_shop(backend) as db, rival_of(backend) as rival:
        await rival.exec_driver_sql(f"{READ} FOR UPDATE")
        wrapped = UnitOfWorkMiddleware(app, db, retry=Retry(**SOON))
        response = await Client(wrapped).request(receive=sending())
        assert (200, [1, 2]) == (response.status, attempts)


@on(*SERVER_DRIVERS)
async def test_out_of_reach(backend: ServerBackend) -> None:
    """While nobody listens, as in a failover, each attempt connects anew."""
    db = Database.from_url(backend.through(free_port()))
    site = Site(backend, conflicts=0)
    response = await site.serve(db)
    assert (503, "1") == (response.status, response.headers["retry-after"])
    assert [(1, False), (2, False), (3, True)] == site.attempts


# Outside a request


async def test_run(backend: Backend) -> None:
    """A function in a unit of its own is called again, and its result returned."""
    async with conflicting_shop(backend) as db:
        attempts: list[int] = []
        hooks: list[str] = []

        async def work(number: int, *, by: str) -> str:
            attempts.append(uow.current_unit_of_work().attempt)
            uow.after_commit(hooks.append, "commit")
            uow.after_rollback(hooks.append, "rollback")
            if len(attempts) < 3:
                await conflict(backend)
            await uow.current_session().execute(WRITE)
            return f"{number} by {by}"

        assert "7 by ann" == await Retry(**SOON).run(db, work, 7, by="ann")
        assert [1, 2, 3] == attempts
        assert ["rollback", "rollback", "commit"] == hooks
        assert 1 == await backend.scalar(READ)
        attempts.clear()
        with pytest.raises(DBAPIError):
            await Retry(attempts=2, **SOON).run(db, work, 7, by="ann")
        assert [1, 2] == attempts
        assert [0, 0] == checked_out(db)


async def test_run_refuses(db: Database) -> None:
    """What cannot be run is refused where it is given."""
    with pytest.raises(TypeError, match="has to be async"):
        await Retry().run(db, lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="at least one Database, not str"):
        await Retry().run("db", no_body)  # type: ignore[arg-type]


@on("asyncpg", "psycopg")
async def test_a_conflict_at_commit(backend: Backend) -> None:
    """One that only COMMIT tells of; SERIALIZABLE and clusters have many."""
    async with conflicting_shop(backend) as db:
        await backend.execute(
            "CREATE TABLE refusals (id INTEGER)",
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$",
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON refusals"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        attempts: list[int] = []

        async def work() -> str:
            attempts.append(uow.current_unit_of_work().attempt)
            await uow.current_session().execute(WRITE)
            if len(attempts) == 1:
                await uow.current_session().execute("INSERT INTO refusals VALUES (1)")
            return "done"

        assert "done" == await Retry(**SOON).run(db, work)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await work()
            await respond(send)

        attempts.clear()
        response = Response()
        wrapped = UnitOfWorkMiddleware(
            app, db, retry=Retry(**SOON), observers=[response.events]
        )
        response = await Client(wrapped).request(receive=sending(), into=response)
        assert (200, None) == (response.status, response.error)
        assert [1, 2] == attempts
        assert 2 == await backend.scalar(READ)
        assert ["40001"] == [each.code for each in response.events.of(RetryScheduled)]
        assert [] == response.events.of(CommitFailed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, "attempts must be a whole number above 0"),
        ({"attempts": "3"}, "attempts must be"),
        ({"max_body": -1}, "max_body must be"),
        ({"methods": "POST"}, "methods must be"),
        ({"methods": ["POST,PUT"]}, "methods must be"),
        ({"backoff": float("inf")}, "backoff must be"),
        ({"backoff": 10**400}, "backoff must be"),
        ({"when": True}, "when must be"),
        ({"backoff": -1}, "backoff must be"),
        ({"max_backoff": None}, "max_backoff must be"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    """An option that cannot work is refused."""
    with pytest.raises(errors.ConfigurationError, match=message):
        Retry(**options)


async def test_an_option_of_the_middleware(db: Database) -> None:
    """Only a `Retry` is one."""
    with pytest.raises(errors.ConfigurationError, match="retry must be Retry"):
        UnitOfWorkMiddleware(respond, db, retry=3)  # type: ignore[arg-type]
