"""`Idempotency`: what is kept of a response, and what of a request is looked at."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import asgi_uow as uow
from asgi_uow import Database, Idempotency, Outcome
from asgi_uow._entrypoints import idempotency
from tests.support import shop
from tests.support.asgi import BODY, START, Response
from tests.support.databases import DATABASES, on
from tests.support.keys import Shop, create_table, is_replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from tests.servers import Backend

pytestmark = on("aiosqlite")

KIB = 1024
LARGE = 64 * KIB


@pytest.fixture(autouse=True)
async def _table(backend: Backend) -> None:
    await create_table(backend)


def sending(*messages: Message) -> Callable[[Shop], ASGIApp]:
    """Make an application that inserts an item and sends these messages."""

    def of(site: Shop) -> ASGIApp:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await site.work()
            for message in messages:
                await send(dict(message))

        return app

    return of


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": START, "status": status, "headers": headers}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": BODY, "body": body, "more_body": more}


async def twice(site: Shop, **request: Any) -> tuple[Response, Response]:
    return await site.post(**request), await site.post(**request)


@on(*DATABASES)
async def test_every_byte(db: Database) -> None:
    """Status, headers in their order and each byte of the body are as they were."""
    body = bytes(range(256)) * 256
    headers = (b"x-b", b"\xe9"), (b"X-A", b"1"), (b"x-b", b"2")
    site = Shop(db, app=sending(start(*headers, status=202), part(body)))
    first, second = await twice(site)

    assert [(START, 202), (BODY, None)] == [
        (each["type"], each.get("status")) for each in second.messages
    ]
    assert [*headers, (b"idempotency-replayed", b"true")] == second.messages[0][
        "headers"
    ]
    assert body == first.messages[1]["body"] == second.messages[1]["body"]


async def test_no_headers_and_no_body(db: Database) -> None:
    """A response may have neither."""
    site = Shop(db, app=sending({"type": START, "status": 204}, {"type": BODY}))
    _, second = await twice(site)
    assert 204 == second.status
    assert [] == second.chunks
    assert 1 == site.runs


async def test_headers_that_are_not_kept(db: Database) -> None:
    """What is of one connection, or a secret of who asked first, is not sent again."""
    kept = (b"content-type", b"text/plain")
    others = [
        (name, b"x")
        for name in (b"Set-Cookie", b"date", b"server", b"connection", b"Keep-Alive")
    ]
    site = Shop(db, app=sending(start(*others, kept), part(b"ok")))
    first, second = await twice(site)
    assert 6 == len(first.messages[0]["headers"])
    assert {"content-type", "idempotency-replayed"} == {*second.headers}


async def test_headers_that_can_be_read_once(db: Database) -> None:
    """Sanic's are a generator."""
    headers = (pair for pair in [(b"x-a", b"1")])
    site = Shop(
        db, app=sending({"type": START, "status": 200, "headers": headers}, part(b"ok"))
    )
    first, second = await twice(site)
    assert "1" == first.headers["x-a"] == second.headers["x-a"]


async def test_what_was_kept_without_a_response(db: Database, backend: Backend) -> None:
    """DDL on MySQL keeps a key before there is a response; nothing is done again."""
    site = Shop(db)
    await site.post()
    await backend.execute(
        "UPDATE idempotency_keys SET status = NULL, fingerprint = NULL"
    )
    response = await site.post()
    assert 409 == response.status
    assert 1 == site.runs


async def test_parts_are_sent_again_as_one(db: Database) -> None:
    """A body that came in parts, at once, is kept."""
    parts = [part(b"a", more=True), part(b"b", more=True), part(b"c")]
    site = Shop(db, app=sending(start(), *parts))
    first, second = await twice(site)
    assert ["a", "b", "c"] == first.chunks
    assert ["abc"] == second.chunks


@on(*DATABASES)
async def test_what_is_too_large(db: Database, backend: Backend) -> None:
    """It is sent in the parts in which it came; a repetition is told of it."""
    parts = [part(b"a" * 60, more=True), part(b"b" * 60, more=True), part(b"c")]
    options = Idempotency(max_body=100)
    site = Shop(db, app=sending(start(), *parts), idempotency=options)
    first, second = await twice(site)

    assert ["a" * 60, "b" * 60, "c"] == first.chunks
    assert 409 == second.status
    assert "too large" in second.chunks[0]
    assert "retry-after" not in second.headers
    assert [1] == await shop.items(backend)
    assert ["commit"] == site.hooks


async def test_exactly_as_large(db: Database) -> None:
    """`max_body` bytes are kept."""
    site = Shop(
        db,
        app=sending(start(), part(b"a" * 100)),
        idempotency=Idempotency(max_body=100),
    )
    assert is_replayed((await twice(site))[1])


async def test_an_event_stream_is_not_held(db: Database, backend: Backend) -> None:
    """Its start commits and leaves at once; a repetition is told that it was done."""
    seen: list[object] = []

    def of(site: Shop) -> ASGIApp:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await site.work()
            await send(start((b"content-type", b"text/event-stream; charset=utf-8")))
            seen.extend(await shop.items(backend))
            await send(part(b"data: 1"))

        return app

    first, second = await twice(Shop(db, app=of))
    assert [1] == seen
    assert ["data: 1"] == first.chunks
    assert 409 == second.status


async def test_a_slow_stream_is_passed_on(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no length and still comes in parts after a while is not held."""
    monkeypatch.setattr(idempotency, "HOLD_SECONDS", -1.0)
    parts = [part(b"a", more=True), part(b"b")]
    _, second = await twice(Shop(db, app=sending(start(), *parts)))
    assert 409 == second.status
    length = start((b"Content-Length", b"2"))
    site = Shop(db, app=sending(length, *parts))
    site.runs = 1  # the item that is there
    await site.post(b"other")
    assert is_replayed(await site.post(b"other"))


async def test_messages_of_extensions(db: Database) -> None:
    """A file that the server sends is passed on; a repetition is told it was done."""
    file = {"type": "http.response.pathsend", "path": "/etc/hostname"}
    site = Shop(db, app=sending(start(), file))
    first = await site.post()
    assert [START, file["type"]] == first.types
    assert 409 == (await site.post()).status


async def test_messages_before_the_start(db: Database) -> None:
    """A hint that comes first goes at once, and the response is kept."""
    hint = {"type": "http.response.early_hint", "links": []}
    site = Shop(db, app=sending(hint, start(), part(b"ok")))
    assert [hint["type"], START, BODY] == (await site.post()).types
    assert is_replayed(await site.post())


async def test_messages_of_something_else(db: Database) -> None:
    """What is no response goes through with it."""
    other = {"type": "websocket.http.response.start"}
    site = Shop(db, app=sending(start(), other, part(b"ok")))
    assert [START, other["type"], BODY] == (await site.post()).types
    assert is_replayed(await site.post())


async def test_a_response_without_an_end(db: Database, backend: Backend) -> None:
    """What the application has sent is sent, and is not kept as a response."""
    site = Shop(db, app=sending(start(), part(b"half", more=True)))
    first, second = await twice(site)
    assert ["half"] == first.chunks
    assert 409 == second.status
    assert [1] == await shop.items(backend)


async def test_no_response_at_all(db: Database, backend: Backend) -> None:
    """An application that sends nothing has done nothing."""
    site = Shop(db, app=sending())
    await twice(site)
    assert 2 == site.runs
    assert [] == await shop.items(backend)


async def test_an_error_after_the_start(db: Database, backend: Backend) -> None:
    """What fails while its response is held was not answered, and keeps nothing."""

    def of(site: Shop) -> ASGIApp:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await site.work()
            await send(start())
            raise LookupError

        return app

    response = await Shop(db, app=of).post()
    assert [] == response.messages
    assert isinstance(response.error, LookupError)
    assert [] == await shop.items(backend)


async def test_a_response_that_cannot_be_kept(db: Database, backend: Backend) -> None:
    """If the table refuses the response nothing is kept, and the answer is an error."""
    await backend.execute(
        "CREATE TRIGGER refuses BEFORE UPDATE ON idempotency_keys"
        " BEGIN SELECT raise(ABORT, 'no'); END"
    )
    site = Shop(db)
    response = await site.post()
    assert 500 == response.status
    assert [] == await shop.items(backend)
    assert ["rollback"] == site.hooks


async def test_rollback_only_keeps_no_key(db: Database, backend: Backend) -> None:
    """`set_rollback_only` leaves the response as it is, and a repetition runs."""

    async def give_up() -> None:
        uow.set_rollback_only("a dry run")

    site = Shop(db)
    site.before = give_up
    first, second = await twice(site)
    assert [201, 201] == [first.status, second.status]
    assert not is_replayed(second)
    assert [] == await shop.items(backend)


async def test_an_error_that_is_kept(db: Database) -> None:
    """With `force_commit` the response of a kept key may be an error, again."""

    async def keep() -> None:
        uow.force_commit()

    site = Shop(db)
    site.before, site.status = keep, 409
    _, second = await twice(site)
    assert 409 == second.status
    assert is_replayed(second)
    assert 1 == site.runs


# The body of the request


def reading(site: Shop) -> ASGIApp:
    """Read all of the body; say how long it is."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message["body"])
            more = message["more_body"]
        await site.work()
        await send(start())
        await send(part(b"%d" % size))

    return app


def bodies(*sizes: int, last: bytes = b"") -> tuple[bytes, ...]:
    return (*(b"a" * size for size in sizes), last)


@pytest.mark.parametrize("sizes", [(), (KIB,), (LARGE,), (LARGE - 1, 2), (LARGE,) * 5])
async def test_the_application_reads_the_body(
    db: Database, sizes: tuple[int, ...]
) -> None:
    """It gets each byte once, however large the body is."""
    site = Shop(db, app=reading)
    first, second = await twice(site, body=bodies(*sizes))
    assert [str(sum(sizes))] == first.chunks == second.chunks
    assert is_replayed(second)


@pytest.mark.parametrize(
    "other",
    [
        bodies(LARGE, LARGE, last=b"b"),
        bodies(LARGE, LARGE, last=b"aa"),
        bodies(LARGE, LARGE),
        bodies(LARGE, last=b"b" + b"a" * LARGE),
        bodies(1),
    ],
)
async def test_another_large_body(db: Database, other: tuple[bytes, ...]) -> None:
    """Also what comes after the first 64 kB tells two bodies apart."""
    site = Shop(db, app=reading)
    await site.post(body=bodies(LARGE, LARGE, last=b"a"))
    assert is_replayed(await site.post(body=bodies(2 * LARGE, last=b"a")))
    assert 422 == (await site.post(body=other)).status
    assert 1 == site.runs


async def test_a_body_that_was_not_read(db: Database) -> None:
    """What the application never read cannot be told apart."""
    site = Shop(db, app=sending(start(), part(b"ok")))
    await site.post(body=bodies(LARGE, LARGE))
    for last in (b"", b"b", b"b" * LARGE):
        assert is_replayed(await site.post(body=bodies(LARGE, last=last)))
    assert 422 == (await site.post(body=(b"b" * LARGE, b""))).status
    assert 422 == (await site.post(body=bodies(KIB))).status


async def test_a_client_that_leaves_while_it_sends(
    db: Database, backend: Backend
) -> None:
    """A request of which not all has come does nothing, and keeps no key."""
    site = Shop(db)
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    response = await site.post(receive=receive)
    assert [] == response.messages
    assert 0 == site.runs
    assert [] == await shop.items(backend)


async def test_a_slow_client_holds_no_connection(db: Database) -> None:
    """Nothing is claimed before the body is here."""
    site, waits, goes_on = Shop(db), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        waits.set()
        await goes_on.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: site.post(receive=receive))
        await waits.wait()
        assert 0 == site.app.databases[0].engine.pool.checkedout()  # type: ignore[attr-defined]
        goes_on.set()
    assert 1 == site.runs


@pytest.mark.parametrize("left", ["waits", "has left"])
async def test_a_repetition_whose_body_does_not_come(db: Database, left: str) -> None:
    """It is told to come again; nobody waits for ever to compare."""
    site = Shop(db, app=reading, idempotency=Idempotency(wait=0.01))
    await site.post(body=bodies(LARGE, LARGE))
    messages = [{"type": "http.request", "body": b"a" * LARGE, "more_body": True}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        if left == "waits":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    response = await site.post(receive=receive)
    assert (409 if left == "waits" else 422) == response.status
    assert 1 == site.runs


@on(*DATABASES)
async def test_the_outcome_of_a_kept_key(db: Database) -> None:
    """The unit of a request with a key is one like any other."""
    site = Shop(db)
    await site.post()
    [unit] = site.units
    assert Outcome.COMMITTED is unit.outcome
    assert not unit.replayed
