"""Sanic's own server: what each kind of response does to the unit of work."""

from __future__ import annotations

import pytest
from websockets.asyncio.client import connect

from tests.integration.sanic.child import Child, get, kept, notes
from tests.servers import SQLiteBackend, eventually

OUTCOMES = {
    "/answer/text/1": (200, True),
    "/answer/created/2": (201, True),
    "/answer/empty/3": (204, True),
    "/answer/not-modified/4": (304, True),
    "/answer/redirect/5": (302, True),
    "/answer/conflict/6": (409, False),
    "/answer/file/7": (200, True),
    "/answer/file-stream/8": (200, True),
    "/answer/old-stream/9": (200, True),
    "/stream/10": (200, True),
    "/raise/not-found/11": (404, False),
    "/raise/crash/12": (500, False),
    "/raise/teapot/13": (200, True),
}


@pytest.mark.parametrize("path", OUTCOMES)
async def test_response(path: str, site: Child, store: SQLiteBackend) -> None:
    """Below 400 the work is kept and its hook has run, otherwise neither."""
    number = int(path.rpartition("/")[2])

    response = await site.get(path)

    assert OUTCOMES[path] == (response.status_code, await kept(store, number))
    note = "committed" if OUTCOMES[path][1] else "rolled back"
    assert [note] == await notes(store, number)


async def test_stream_is_whole(site: Child) -> None:
    """The chunks of both kinds of streams arrive, in order."""
    assert ["one two", "one two"] == [
        (await site.get(path)).text for path in ("/stream/20", "/answer/old-stream/21")
    ]


async def test_head(site: Child, store: SQLiteBackend) -> None:
    """A HEAD request is a unit of work like any other, without a body."""
    async with site.client as client:
        response = await client.head("/answer/text/22")

    assert (200, "") == (response.status_code, response.text)
    assert await kept(store, 22)


async def test_expect_continue(site: Child, store: SQLiteBackend) -> None:
    """`100 Continue` decides nothing; the response after it does."""
    expect = ("expect: 100-continue", "content-length: 2", "connection: close")
    head = get("/answer/conflict/23", *expect).replace("GET", "POST")
    connection = await site.send(head)
    interim = await connection.reader.readuntil(b"\r\n\r\n")
    connection.writer.write(b"{}")
    final = await connection.read_to_end()

    assert interim.startswith(b"HTTP/1.1 100 ")
    assert final.startswith("HTTP/1.1 409 ")
    assert not await kept(store, 23)


# COMMIT fails


@pytest.mark.parametrize(
    "path",
    [
        "/answer/text/31",
        "/answer/redirect/32",
        "/answer/file-stream/33",
        "/answer/old-stream/34",
        "/stream/35",
        "/raise/teapot/36",
        "/liar/text/37",
    ],
)
async def test_failed_commit(path: str, site: Child, store: SQLiteBackend) -> None:
    """No success is sent, also not by an exception handler: a 500 is, and is small."""
    number = int(path.rpartition("/")[2])

    response = await site.get(f"{path}?broken=1")

    assert 500 == response.status_code
    assert "application/problem+json" == response.headers["content-type"]
    assert {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "The request could not be completed.",
    } == response.json()
    assert not await kept(store, number)
    assert ["rolled back"] == await notes(store, number)


async def test_failed_commit_answered_by_the_application(
    site: Child, store: SQLiteBackend
) -> None:
    """A handler for `UnitOfWorkFailedError` gets the failure and its answer is sent."""
    response = await site.get("/mine/text/38?broken=1")

    assert 507 == response.status_code
    assert {"cause": "commit_failed"} == response.json()
    assert not await kept(store, 38)


# One connection, several requests


async def test_keep_alive(site: Child, store: SQLiteBackend) -> None:
    """Each request of a connection has a unit of its own, also after a failure."""
    paths = ["/unit", "/answer/text/41?broken=1", "/unit", "/answer/text/42", "/unit"]
    async with site.client as client:
        responses = [await client.get(path) for path in paths]

    assert [200, 500, 200, 200, 200] == [each.status_code for each in responses]
    assert [True, True, True] == [each.json() for each in responses[::2]]
    assert [False, True] == [await kept(store, number) for number in (41, 42)]


async def test_pipelined(site: Child, store: SQLiteBackend) -> None:
    """Requests that come in at once do not get each other's unit."""
    connection = await site.send(
        get("/raise/crash/43"),
        get("/unit"),
        get("/answer/text/44"),
        get("/answer/conflict/45"),
        get("/unit", "connection: close"),
    )
    text = await connection.read_to_end()

    assert ["500", "200", "200", "409", "200"] == [
        line.split()[0] for line in text.split("HTTP/1.1 ")[1:]
    ]
    assert 2 == text.count("\r\n\r\ntrue")
    numbers = (43, 44, 45)
    assert [False, True, False] == [await kept(store, each) for each in numbers]


async def test_malformed_request(site: Child) -> None:
    """What is refused before it is handled has no unit, and leaves nothing behind."""
    connection = await site.send("nonsense\r\n\r\n")
    text = await connection.read_to_end()

    assert text.startswith("HTTP/1.1 400 ")
    assert (await site.get("/unit")).json()


# Beside and after the response


async def test_task_left_behind(site: Child, store: SQLiteBackend) -> None:
    """`add_task` that goes on after the response is refused, `async with db:` works."""
    await site.get("/later/51")
    await site.get("/open")
    await eventually(["UnitOfWorkClosedError"], lambda: notes(store, 51))


async def test_task_beside_the_handler(site: Child, store: SQLiteBackend) -> None:
    """`add_task` before the decision finds the unit; from a hook it has its own."""
    assert ["NestedUnitOfWorkError"] == (await site.get("/beside/55")).json()
    await eventually(["done"], lambda: notes(store, 55))


async def test_stream_writes_too_late(site: Child, store: SQLiteBackend) -> None:
    """What a stream writes after its first chunk is refused; what was kept stays."""
    response = await site.get("/stream-and-crash/52")

    assert (200, "one ") == (response.status_code, response.text)
    assert await kept(store, 52)
    assert 0 == await site.state("checked_out")


async def test_websocket(site: Child, store: SQLiteBackend) -> None:
    """A websocket handler has no unit; `async with db:` per message works."""
    async with connect(f"ws://127.0.0.1:{site.port}/feed") as websocket:
        for number in ("53", "54"):
            await websocket.send(number)
            assert "NoUnitOfWorkError" == await websocket.recv()

    assert await kept(store, 53)
    assert await kept(store, 54)


# The client goes away


async def test_disconnect_in_the_handler(site: Child, store: SQLiteBackend) -> None:
    """The work is rolled back, hooks say so, and the connection is back."""
    connection = await site.send(get("/hang/61"))
    await eventually(1, store.open_transactions)
    await connection.leave()
    await eventually(["rolled back"], lambda: notes(store, 61))

    assert not await kept(store, 61)
    assert 0 == await site.state("checked_out")


async def test_disconnect_in_the_stream(site: Child, store: SQLiteBackend) -> None:
    """What was kept stays; the connection of the read session comes back."""
    connection = await site.send(get("/stream-and-hang/62"))
    await connection.reader.readuntil(b"one ")
    await connection.leave()
    await eventually(0, lambda: site.state("checked_out"))

    assert await kept(store, 62)


async def test_database_is_in_the_context(site: Child) -> None:
    """`setup(app)` has made the database from `app.config`; it is `app.ctx.db`."""
    assert await site.state("is_ctx_db")
