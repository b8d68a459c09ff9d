"""The application that Sanic's own server serves in child processes of the tests.

`python -m tests.integration.sanic.site PORT`, or `sanic` with that name and `:app`; the
database comes from the environment, as Sanic reads it: `SANIC_DATABASE_URL`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from sanic import (
    Blueprint,
    HTTPResponse,
    Request,
    Sanic,
    empty,
    file,
    json,
    redirect,
    text,
)
from sanic.exceptions import NotFound
from sanic.response import ResponseStream, file_stream

import asgi_uow as uow
from asgi_uow.errors import AsgiUowError, NestedUnitOfWorkError, UnitOfWorkFailedError
from asgi_uow.sanic import setup
from tests.promises.faults.mortal import checked_out
from tests.support import shop

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Incoming: TypeAlias = Request[Any, Any]

Sanic.start_method = cast("Any", os.environ.get("START_METHOD", "spawn"))
app = Sanic("site", configure_logging=False)
app.config.GRACEFUL_SHUTDOWN_TIMEOUT = 0.2
db = setup(app, hook_timeout=None)  # on a busy machine they wait for their turn
opened = asyncio.Event()
units: list[object] = []


async def note(what: str, number: int) -> None:
    """Write a row in the unit of a hook."""
    statement = "INSERT INTO notes (what, number) VALUES (:what, :number)"
    await uow.current_session().execute(statement, what=what, number=number)


async def insert(request: Incoming, number: int) -> None:
    """Insert an item; with `?broken=1` so that COMMIT fails."""
    uow.after_commit(note, "committed", number)
    uow.after_rollback(note, "rolled back", number)
    await shop.insert(number)
    if "broken" in request.args:
        statement = "UPDATE items SET parent = 404 WHERE id = :number"
        await uow.current_session().execute(statement, number=number)


@app.main_process_ready
async def connect_before_the_fork(_: Any) -> None:
    """Leave a connection in the pool of the process that starts the workers."""
    async with db:
        await uow.current_session().execute("SELECT 1")


# Every way to answer


async def stream(request: Incoming, number: int) -> None:
    response: Any = await request.respond(content_type="text/plain")
    await insert(request, number)
    await response.send("one ")
    await response.send("two")
    await response.eof()


def old_stream(_: Incoming) -> ResponseStream:
    async def write(response: Any) -> None:
        await response.write("one ")
        await response.write("two")

    return ResponseStream(write)


ANSWERS: dict[str, Callable[[Incoming], Any]] = {
    "text": lambda _: text("ok"),
    "created": lambda _: json({}, status=201),
    "empty": lambda _: empty(),
    "not-modified": lambda _: empty(304),
    "redirect": lambda _: redirect("/elsewhere"),
    "conflict": lambda _: text("no", status=409),
    "file": lambda _: file(__file__),
    "file-stream": lambda _: file_stream(__file__),
    "old-stream": old_stream,
}


async def answer(request: Incoming, kind: str, number: int) -> Any:
    await insert(request, number)
    response = ANSWERS[kind](request)
    return await response if asyncio.iscoroutine(response) else response


METHODS = ["GET", "HEAD", "POST"]
app.add_route(answer, "/answer/<kind:str>/<number:int>", METHODS)
app.add_route(stream, "/stream/<number:int>")


# Exceptions


class TeapotError(Exception):
    """Answered by an exception handler, with a success."""


RAISED: dict[str, type[Exception]] = {
    "not-found": NotFound,
    "crash": ZeroDivisionError,
    "teapot": TeapotError,
}


@app.get("/raise/<kind:str>/<number:int>")
async def fail(request: Incoming, kind: str, number: int) -> None:
    await insert(request, number)
    raise RAISED[kind]


async def brew(_: Incoming, __: Exception) -> HTTPResponse:
    return text("tea")


app.exception(TeapotError)(brew)


# Who answers a failed COMMIT

mine = Blueprint("mine", url_prefix="/mine")
liar = Blueprint("liar", url_prefix="/liar")


async def say_so(_: Incoming, error: UnitOfWorkFailedError) -> HTTPResponse:
    return json({"cause": error.cause.value}, status=507)


mine.exception(UnitOfWorkFailedError)(say_so)


async def claim_success(_: Incoming, __: Exception) -> HTTPResponse:
    return text("ok")


liar.exception(UnitOfWorkFailedError)(claim_success)


for blueprint in (mine, liar):
    blueprint.add_route(answer, "/<kind:str>/<number:int>", name="answer")
    app.blueprint(blueprint)


# The unit of work and the connection


@app.get("/unit")
async def unit(_: Incoming) -> HTTPResponse:
    """Say whether this unit is untouched, and nobody else's."""
    mine = uow.current_unit_of_work()
    is_new = mine.state.value == "new" and mine not in units
    units.append(mine)
    return json(is_new)


@app.get("/hang/<number:int>")
async def hang(request: Incoming, number: int) -> None:
    await insert(request, number)
    await asyncio.Event().wait()


@app.get("/stream-and-hang/<number:int>")
async def stream_and_hang(request: Incoming, number: int) -> None:
    await insert(request, number)
    response: Any = await request.respond(content_type="text/plain")
    await response.send("one ")
    await uow.current_read_session().execute("SELECT 1")
    await asyncio.Event().wait()


@app.get("/stream-and-crash/<number:int>")
async def stream_and_crash(request: Incoming, number: int) -> None:
    await insert(request, number)
    response: Any = await request.respond(content_type="text/plain")
    await response.send("one ")
    await uow.current_session().execute("SELECT 1")


def what_is_raised() -> str:
    """Ask for the session of a request where there is none."""
    raised = "nothing"
    try:
        uow.current_session()
    except AsgiUowError as error:
        raised = type(error).__name__
    return raised


@app.get("/later/<number:int>")
async def later(request: Incoming, number: int) -> HTTPResponse:
    """Leave a task behind that goes on once `/open` is asked for."""

    async def go_on() -> None:
        await opened.wait()
        raised = what_is_raised()
        async with db:
            await note(raised, number)

    request.app.add_task(go_on())
    return text("ok")


@app.get("/beside/<number:int>")
async def beside(request: Incoming, number: int) -> HTTPResponse:
    """Start a task that opens a unit at once; another one when this has committed."""
    raised: list[str] = []

    async def go_on() -> None:
        try:
            async with db:
                await note("done", number)
        except NestedUnitOfWorkError as error:
            raised.append(type(error).__name__)

    async def start() -> None:
        request.app.add_task(go_on())

    await request.app.add_task(go_on())
    uow.after_commit(start)
    return json(raised)


@app.get("/open")
async def open_(_: Incoming) -> HTTPResponse:
    opened.set()
    return text("ok")


async def feed(_: Incoming, websocket: Any) -> None:
    async for message in websocket:
        raised = what_is_raised()
        async with db:
            await shop.insert(int(message))
        await websocket.send(raised)


app.add_websocket_route(feed, "/feed")


@app.get("/response-timeout/<seconds:float>")
async def set_timeout(_: Incoming, seconds: float) -> HTTPResponse:
    """Set it for the connections that are opened from now on."""
    app.update_config({"RESPONSE_TIMEOUT": seconds})
    return text("ok")


@app.get("/stop")
async def stop(_: Incoming) -> HTTPResponse:
    """Have the main process stop all workers, and itself."""
    app.m.terminate()
    return text("ok")


@app.get("/state")
async def state(_: Incoming) -> HTTPResponse:
    """What a test cannot see from outside."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return json(
        {
            "cancelling": sum(bool(task.cancelling()) for task in others),
            "checked_out": checked_out(db),
            "is_ctx_db": app.ctx.db is db,
            "pid": os.getpid(),
        }
    )


if __name__ == "__main__":
    app.run("127.0.0.1", int(sys.argv[1]), single_process=True, motd=False)
