"""The inspector's answers: what its page is told of the last units, and how."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_uow import (
    Database,
    Outcome,
    UnitOfWork,
    after_commit,
    before_commit,
    current_read_session,
    set_rollback_only,
    unit_of_work,
)
from asgi_uow.errors import CommitFailedError, ConfigurationError
from asgi_uow.inspector import ENDS, UNUSED, WHY, Inspector
from asgi_uow.observers import (
    CommitFailed,
    Event,
    HeldIdle,
    HookFailed,
    HookFinished,
    HookStarted,
    ImplicitCommit,
    ReleaseFailed,
    RetryScheduled,
    Statements,
    Step,
    UnitClosed,
    UnitFinished,
    UnitStarted,
    Usage,
)
from asgi_uow.testing import lose_commit_answer
from tests.support.asgi import handle, http_scope, request
from tests.support.databases import on
from tests.support.private import Cause, inspected, make_unit
from tests.support.shop import SELECT, insert, insert_orphan

if TYPE_CHECKING:
    from asgi_uow._asgi import ASGIApp
    from tests.servers import SQLiteBackend
    from tests.support.asgi import Handler, Response

pytestmark = on("aiosqlite")

SHOP = "postgresql+asyncpg://app:***@db.internal/shop?password=hidden"
STOCK = "sqlite+aiosqlite:////data/stock.db"
BROKEN = ZeroDivisionError("a bug of ann@example.com")
SECOND = 1_000_000_000
T0 = 1_700_000_000 * SECOND


def step(kind: Any, start: float, text: str = "", database: str = SHOP) -> Step:
    return Step(kind, database, "write", start, 0.25, text, failed=False)


ROLLED_BACK = ["connection", "statement", "rollback"]
STEPS = (
    step("connection", 0.0),
    step("statement", 0.5, "INSERT INTO items (id) VALUES (?)"),
    step("commit", 1.0),
)


@pytest.fixture
def inspector(db: Database) -> Inspector:
    return Inspector(db, debug=True)


def finished(
    outcome: Outcome = Outcome.COMMITTED,
    cause: Cause | None = None,
    reason: str | None = None,
    method: str | None = "POST",
    databases: tuple[str, ...] = (SHOP,),
) -> UnitFinished:
    what = outcome, cause, reason, databases, 1.5, 0.5
    usage = Usage(SHOP, "write", Statements(1, 0.25, 0.25), 0.25, 1.0, 0.5)
    return UnitFinished(*what, method, "/items", usage=(usage,), at=T0 + SECOND)


def closed(status: int | None = 201, timeline: tuple[Step, ...] = STEPS) -> UnitClosed:
    return UnitClosed(status, (1.5, 1.75), timeline, at=T0 + 2 * SECOND)


def tell(inspector: Inspector, unit: UnitOfWork, *events: Event) -> UnitOfWork:
    """Tell what happened to a unit as the unit does."""
    for event in events:
        inspector.observe(dataclasses.replace(event, unit=unit))
    return unit


async def get(app: ASGIApp, path: str = "/", **scope: object) -> Response:
    response = await request(app, scope=http_scope(path, **scope))
    assert response.error is None
    return response


async def units(inspector: Inspector, after: object = "") -> list[dict[str, Any]]:
    query = f"after={after}".encode()
    response = await get(inspector, "/units", query_string=query)
    assert "application/json; charset=utf-8" == response.headers["content-type"]
    return json.loads("".join(response.chunks))["units"]  # type: ignore[no-any-return]


# Who may see it


@pytest.mark.parametrize("options", [{}, {"debug": False}, {"debug": 1}], ids=str)
async def test_refuses_without_debug(db: Database, options: dict[str, Any]) -> None:
    """What it shows is not for strangers: whoever mounts it has to say so."""
    with pytest.raises(ConfigurationError, match="debug=True"):
        Inspector(db, **options)


@pytest.mark.parametrize("databases", [(), ("sqlite://",)], ids=["none", "a URL"])
def test_no_database(databases: tuple[Any, ...]) -> None:
    """What is no `Database` is refused."""
    with pytest.raises(TypeError, match=r"Inspector\(db, debug=True\) needs"):
        Inspector(*databases, debug=True)


# What it answers


@pytest.mark.parametrize(
    ("path", "kind", "content"),
    [
        ("/", "text/html", "<title>Units of work</title>"),
        ("/page.css", "text/css", ".uow {"),
        ("/page.js", "text/javascript", "export function draw"),
        ("/units", "application/json", '"units": []'),
    ],
)
async def test_files(inspector: Inspector, path: str, kind: str, content: str) -> None:
    """Each is served with its type; HEAD gives the same headers and no body."""
    response = await get(inspector, path)
    head = await get(inspector, path, method="HEAD")

    [body] = response.chunks
    assert (200, 200) == (response.status, head.status)
    assert content in body
    assert f"{kind}; charset=utf-8" == response.headers["content-type"]
    assert str(len(body.encode())) == response.headers["content-length"]
    assert response.headers == head.headers
    assert [] == head.chunks


async def test_headers(inspector: Inspector) -> None:
    """Browsers load nothing from elsewhere, keep nothing, and tell nobody of it."""
    headers = (await get(inspector)).headers

    policy = headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'"} <= set(policy)
    assert "unsafe" not in headers["content-security-policy"]
    assert "nosniff" == headers["x-content-type-options"]
    assert "no-store" == headers["cache-control"]
    assert "no-referrer" == headers["referrer-policy"]


async def test_page_needs_nothing_from_elsewhere(inspector: Inspector) -> None:
    """No file has an address, and no text is parsed as HTML."""
    paths = ("/", "/page.css", "/page.js")
    files = "".join([(await get(inspector, path)).chunks[0] for path in paths])

    for word in ("http:", "https:", "@import", "innerHTML", "insertAdjacentHTML"):
        assert word not in files


@pytest.mark.parametrize("path", ["/nothing", "/page.html", "/../page.js", "/units/1"])
async def test_not_found(inspector: Inspector, path: str) -> None:
    """There is nothing else."""
    assert 404 == (await get(inspector, path)).status


@pytest.mark.parametrize("path", ["/", "/units", "/nothing"])
async def test_method(inspector: Inspector, path: str) -> None:
    """It changes nothing, so that other methods are refused."""
    response = await get(inspector, path, method="POST")

    assert 405 == response.status
    assert "GET, HEAD" == response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("/page.js", ""),
        ("/uow/page.js", "/uow"),
        ("/api/uow/page.js", "/api/uow"),
        ("/page.js", "/uow"),  # what mounts in some frameworks is told
        ("/uow/page.js", "/api/uow"),  # a proxy has cut "/api" off
        ("/uow/page.js", "/uow/"),
        ("/page.js", None),
    ],
)
async def test_below_a_mount(inspector: Inspector, path: str, root_path: Any) -> None:
    """It finds its files wherever it is mounted."""
    assert 200 == (await get(inspector, path, root_path=root_path)).status


@pytest.mark.parametrize(
    ("path", "root_path", "raw_path", "place"),
    [
        ("/uow", "/uow", b"/uow", "./uow/"),
        ("/a b", "/a b", None, "./a%20b/"),
        ("/", "/uow", b"/api/uow", "./uow/"),
        ("/", "", b"/\xe4%20b", "./%E4%20b/"),
    ],
)
async def test_without_a_slash(
    inspector: Inspector, path: str, root_path: str, raw_path: bytes, place: str
) -> None:
    """The browser is sent to where relative addresses of the page are right."""
    response = await get(inspector, path, root_path=root_path, raw_path=raw_path)

    assert 307 == response.status
    assert place == response.headers["location"]


@pytest.mark.parametrize("prefix", ["", "/api"], ids=["alone", "behind a proxy"])
@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_mounted(inspector: Inspector, framework: Any, prefix: str) -> None:
    """Frameworks that mount it, and servers with a root path, reach it."""
    mounted = framework(routes=[Mount("/uow", inspector)])
    app = Starlette(routes=[Mount("/dev", mounted)])

    for path in ("/dev/uow/", "/dev/uow/units"):
        response = await get(app, prefix + path, root_path=prefix)
        assert 200 == response.status


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_http_alone(inspector: Inspector, kind: str) -> None:
    """Servers are told that it has no lifespan, as ASGI has it."""
    response = await request(inspector, scope={"type": kind})

    assert isinstance(response.error, RuntimeError)
    assert [] == response.messages


# What it is told by real requests


async def write() -> None:
    await insert(1)


async def read() -> None:
    await current_read_session().execute(SELECT)


async def dry_run() -> None:
    await insert(1)
    set_rollback_only("dry run")


async def crash() -> None:
    await insert(1)
    raise BROKEN


async def object_to_it() -> None:
    await insert(1)
    before_commit(crash)


async def mail() -> None:
    await insert(1)
    after_commit(write_a_note)


async def write_a_note() -> None:
    await insert(2)


REQUESTS: list[tuple[Handler, int, str, list[str]]] = [
    (write, 201, "Committed.", ["connection", "statement", "commit"]),
    (mail, 201, "Committed.", ["connection", "statement", "commit", "hook"]),
    (read, 200, UNUSED, ["connection", "statement"]),
    (write, 409, "Rolled back: the response was 409.", ROLLED_BACK),
    (dry_run, 200, "Rolled back: set_rollback_only('dry run') was", ROLLED_BACK),
    (crash, 200, "Rolled back: an exception left the handler.", ROLLED_BACK),
    (
        object_to_it,
        200,
        "Rolled back: a before_commit hook failed.",
        [*ROLLED_BACK[:2], "statement", "rollback", "hook"],
    ),
]


@pytest.mark.parametrize(
    ("handler", "status", "sentence", "kinds"),
    REQUESTS,
    ids=[f"{handler.__name__}, {status}" for handler, status, _, _ in REQUESTS],
)
async def test_request(
    inspector: Inspector,
    db: Database,
    handler: Handler,
    status: int,
    sentence: str,
    kinds: list[str],
) -> None:
    """What a request did is told without anybody who asks for it."""
    await handle(handler, db, status=status, observers=())

    unit = (await units(inspector))[0]
    assert unit["sentence"].startswith(sentence)
    assert kinds == [each["kind"] for each in unit["steps"]]
    assert ("GET", "/", True) == (unit["method"], unit["path"], unit["closed"])


async def test_refused_commit(inspector: Inspector, db: Database) -> None:
    """The step that failed is marked, and the driver's code is told."""
    await handle(insert_orphan, db)

    [unit] = await units(inspector)
    assert "Rolled back: the database refused to commit it." == unit["sentence"]
    [note] = unit["notes"]
    assert note.startswith("Raised as CommitFailedError; driver code SQLITE_CONSTRAINT")
    assert ["commit"] == [x["kind"] for x in unit["steps"] if x["failed"]]


async def test_lost_answer(inspector: Inspector, db: Database) -> None:
    """What nobody knows is said."""
    async with lose_commit_answer(db):
        await handle(write, db)

    [unit] = await units(inspector)
    assert unit["sentence"].startswith("Unknown: the answer to COMMIT was lost")


async def test_block(inspector: Inspector, db: Database) -> None:
    """A unit outside of requests is shown while it lasts, and has no response."""
    async with db:
        await db.write.execute(SELECT)
        [unit] = await units(inspector)
        assert ("running", None) == (unit["outcome"], unit["path"])

    [unit] = await units(inspector)
    assert ("committed", None) == (unit["outcome"], unit["response"])


async def test_unit_of_a_hook(inspector: Inspector, db: Database) -> None:
    """A hook that asks for a session has an entry of its own, which says so."""
    await handle(mail, db, status=201)

    [_, hook] = await units(inspector)
    assert ("after_commit write_a_note", 1) == (hook["hook"], hook["hook_of"])
    assert "Committed." == hook["sentence"]


# What else it may be told


async def test_committed(inspector: Inspector, db: Database) -> None:
    """The page is told figures, steps in their order, and one sentence."""
    tell(inspector, make_unit(db), UnitStarted(at=T0), finished(), closed())

    [unit] = await units(inspector)
    assert "Committed." == unit["sentence"]
    assert ("POST", "/items", 201) == (unit["method"], unit["path"], unit["status"])
    assert {"count": 1, "seconds": 0.25, "slowest": 0.25} == unit["statements"]
    assert (0.25, 1.0, 0.5) == (unit["waited"], unit["held"], unit["idle"])
    assert ["connection", "statement", "commit"] == [x["kind"] for x in unit["steps"]]
    assert [0.0, 0.5, 1.0] == [x["start"] for x in unit["steps"]]
    assert [1.5, 1.75] == unit["response"]
    assert T0 == unit["at"] * 1_000_000


@pytest.mark.parametrize(
    ("outcome", "cause", "sentence"),
    [
        (Outcome.ROLLED_BACK, Cause.EXCEPTION, "an exception left the handler"),
        (Outcome.ROLLED_BACK, Cause.STATUS, "the response was 409"),
        (Outcome.ROLLED_BACK, Cause.DOOMED, "an error of the database was swallowed"),
        (Outcome.ROLLED_BACK, Cause.BEFORE_COMMIT, "a before_commit hook failed"),
        (Outcome.ROLLED_BACK, Cause.COMMIT_FAILED, "the database refused to commit"),
        (Outcome.ROLLED_BACK, Cause.CANCELLED, "the handler was cancelled"),
        (Outcome.ROLLED_BACK, Cause.TIMEOUT, "time was up"),
        (Outcome.ROLLED_BACK, Cause.ABANDONED, "the handler was never left"),
        (Outcome.UNKNOWN, Cause.TIMEOUT, "Unknown: the answer to COMMIT was lost"),
        (Outcome.UNKNOWN, Cause.DOOMED, "Unknown: something else has ended the"),
        (Outcome.PARTIAL, Cause.COMMIT_FAILED, "Kept in part: a part was committed"),
    ],
)
async def test_why(
    inspector: Inspector, db: Database, outcome: Outcome, cause: Cause, sentence: str
) -> None:
    """Every outcome and cause has a sentence."""
    tell(inspector, make_unit(db), finished(outcome, cause), closed(409))

    [unit] = await units(inspector)
    start = "Rolled back: " if outcome is Outcome.ROLLED_BACK else ""
    assert unit["sentence"].startswith(start + sentence)
    assert outcome.value == unit["outcome"]


def test_every_cause_has_a_sentence() -> None:
    """Also one that is still to come."""
    assert {None, *Cause} == set(WHY)
    assert set(Outcome) == set(ENDS)


@pytest.mark.parametrize(
    ("event", "status", "sentence"),
    [
        (
            finished(Outcome.ROLLED_BACK, Cause.EXPLICIT, "dry run"),
            200,
            "Rolled back: set_rollback_only('dry run') was called.",
        ),
        (
            finished(Outcome.ROLLED_BACK, Cause.EXPLICIT, method=None),
            None,
            "Rolled back: nothing asked to commit it, and commit_on_exit is False.",
        ),
        (
            finished(Outcome.ROLLED_BACK, Cause.EXCEPTION, method=None),
            None,
            "Rolled back: an exception left the block.",
        ),
        (
            finished(Outcome.ROLLED_BACK, Cause.STATUS),
            202,
            "Rolled back: the response was 202, and commit_when said no.",
        ),
        (
            finished(databases=()),
            200,
            "Nothing to commit: the write session executed nothing.",
        ),
    ],
    ids=["reason", "by option", "block", "commit_when", "nothing"],
)
async def test_who_decided(
    inspector: Inspector,
    db: Database,
    event: UnitFinished,
    status: int | None,
    sentence: str,
) -> None:
    """The sentence names what the decision came from."""
    tell(inspector, make_unit(db), event, closed(status))

    [unit] = await units(inspector)
    assert sentence == unit["sentence"]


async def test_running(inspector: Inspector, db: Database) -> None:
    """A unit is shown from its beginning on: who holds a connection is in the list."""
    idle = HeldIdle(1.25, "shop.py, line 7, in order", SHOP)
    unit = tell(inspector, make_unit(db), UnitStarted(at=T0), idle)

    [shown] = await units(inspector)
    assert ("running", False) == (shown["outcome"], shown["closed"])
    assert "It is not decided yet." == shown["sentence"]
    assert ["shop.py, line 7" in note for note in shown["notes"]] == [True]

    tell(inspector, unit, finished(Outcome.ROLLED_BACK, Cause.STATUS))

    [shown] = await units(inspector)
    assert "Rolled back: the response was an error." == shown["sentence"]


@pytest.mark.parametrize(
    ("event", "note"),
    [
        (
            CommitFailed(
                CommitFailedError(Outcome.ROLLED_BACK, Cause.COMMIT_FAILED),
                Outcome.ROLLED_BACK,
                Cause.COMMIT_FAILED,
                "23505",
            ),
            "Raised as CommitFailedError; driver code 23505.",
        ),
        (
            RetryScheduled(2, 0.05, BROKEN, "40001"),
            "Done again 0.050 s later, as attempt 2.",
        ),
        (
            HookFailed("after_commit", "send_mail", BROKEN),
            "after_commit send_mail failed: ZeroDivisionError.",
        ),
        (
            ImplicitCommit("CREATE TABLE"),
            "MySQL committed in the middle of the unit: CREATE TABLE.",
        ),
        (
            ReleaseFailed("closing the session", BROKEN),
            "closing the session failed: ZeroDivisionError.",
        ),
    ],
    ids=lambda each: type(each).__name__,
)
async def test_notes(
    inspector: Inspector, db: Database, event: Event, note: str
) -> None:
    """What went wrong is said with the name of the error, without its message."""
    tell(inspector, make_unit(db), UnitStarted(), event)

    [unit] = await units(inspector)
    assert [note] == unit["notes"]


async def test_hooks(inspector: Inspector, db: Database) -> None:
    """A hook is a bar in the unit that registered it; its own unit names it."""
    unit, own = make_unit(db), make_unit(db)
    about = "after_commit", "send_mail"
    tell(inspector, unit, UnitStarted(at=T0), finished())
    tell(inspector, own, HookStarted(*about, of=unit), UnitStarted(at=T0), finished())
    end = HookFinished(*about, 0.5, BROKEN, of=unit, at=T0 + 2 * SECOND)
    tell(inspector, own, end)

    [first, second] = await units(inspector)
    [bar] = first["steps"]
    assert ("hook", "after_commit send_mail") == (bar["kind"], bar["text"])
    assert (1.5, 0.5, True) == (bar["start"], bar["seconds"], bar["failed"])
    assert ("after_commit send_mail", 1) == (second["hook"], second["hook_of"])


async def test_hook_without_a_session(inspector: Inspector, db: Database) -> None:
    """A hook that opened no unit of its own is no entry; one before COMMIT has none."""
    unit = make_unit(db)
    tell(inspector, unit, UnitStarted(at=T0))
    tell(
        inspector, make_unit(db), HookFinished("after_commit", "a", 0.5, None, of=unit)
    )
    tell(inspector, unit, HookFinished("before_commit", "b", 0.5, None, of=unit))

    [shown] = await units(inspector)
    assert ["after_commit a", "before_commit b"] == [x["text"] for x in shown["steps"]]
    assert "" == shown["hook"]


async def test_the_last_200(inspector: Inspector, db: Database) -> None:
    """Older units are forgotten."""
    for _ in range(203):
        tell(inspector, make_unit(db), finished())

    assert [*range(4, 204)] == [unit["number"] for unit in await units(inspector)]


async def test_what_is_new(inspector: Inspector, db: Database) -> None:
    """A page asks for what has changed since; what is no number asks for all."""
    first, second = (
        tell(inspector, make_unit(db), UnitStarted(at=T0)) for _ in range(2)
    )
    answer = await get(inspector, "/units")
    revision = json.loads(answer.chunks[0])["revision"]
    assert [] == await units(inspector, revision)

    tell(inspector, first, finished())
    assert [1] == [unit["number"] for unit in await units(inspector, revision)]
    tell(inspector, second, finished())
    for everything in ("", "0", "-1", "x", "1.5"):
        assert [1, 2] == [unit["number"] for unit in await units(inspector, everything)]


async def test_too_many_steps(db: Database) -> None:
    """Of very many statements the first are kept, and how it ended."""
    inspector = Inspector(db, debug=True)
    async with db:
        for _ in range(600):
            await db.write.execute("SELECT 1")

    [unit] = await units(inspector)
    kinds = [each["kind"] for each in unit["steps"]]
    assert ["connection", *["statement"] * 499, "commit"] == kinds
    assert ["101 statements are not shown."] == unit["notes"]


async def test_too_many_reads(inspector: Inspector, db: Database) -> None:
    """Nor are the connections of such a unit's reads shown, each of which has one."""

    async def work() -> None:
        for _ in range(300):
            await read()
        await write()

    await handle(work, db)

    [unit] = await units(inspector)
    kinds = [step["kind"] for step in unit["steps"]]
    assert 500 + 2 == len(kinds)
    assert ["connection", "commit"] == kinds[500:]
    assert ["51 statements are not shown."] == unit["notes"]


async def test_several_databases(inspector: Inspector, db: Database) -> None:
    """Each step says which it was for; of its URL that is the kind and the name."""
    timeline = (step("commit", 1.0), step("commit", 2.0, database=STOCK))
    tell(inspector, make_unit(db), finished(), closed(201, timeline))

    [unit] = await units(inspector)
    named = [each["database"] for each in unit["steps"]]
    assert ["postgresql shop", "sqlite stock.db"] == named
    for word in ("app", "***", "db.internal", "password", "/data", "ann@"):
        assert word not in json.dumps(unit)


async def test_only_its_databases(inspector: Inspector, sqlite: SQLiteBackend) -> None:
    """Units of other databases are left out."""
    other = Database.from_url(sqlite.url)
    async with other:
        await other.write.execute("CREATE TABLE things (id INTEGER)")

    assert [] == await units(inspector)
    await other.dispose()


async def test_unit_of_two_databases(db: Database, sqlite: SQLiteBackend) -> None:
    """Each thing is shown once, and by each inspector."""
    other = Database.from_url(sqlite.url)
    both, one = Inspector(db, other, debug=True), Inspector(other, debug=True)
    async with unit_of_work(db, other):
        await db.write.execute(SELECT)
        await other.write.execute("SELECT 1")
        after_commit(write_nothing)

    for inspector in (both, one):
        [unit] = await units(inspector)
        kinds = [step["kind"] for step in unit["steps"]]
        assert ["connection", "statement"] * 2 + ["commit"] * 2 + ["hook"] == kinds
    await other.dispose()


async def write_nothing() -> None:
    """Be a hook."""


async def test_nothing_is_kept_alive(db: Database) -> None:
    """Units, and what their errors refer to, go when they would; so does it itself."""
    inspector = Inspector(db, debug=True)
    unit = make_unit(db)
    tell(inspector, unit, UnitStarted(), finished(), closed())
    of_unit, of_inspector = weakref.ref(unit), weakref.ref(inspector)

    del unit
    gc.collect()
    assert of_unit() is None
    del inspector
    gc.collect()
    assert of_inspector() is None
    assert db not in inspected
