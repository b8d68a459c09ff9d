"""A page for development: what became of the last units of work, and why.

`app.mount("/uow", Inspector(db, debug=True))`, then open `/uow/`. It shows what was
done in the process that serves it, and is gone with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import deque
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote
from weakref import WeakKeyDictionary

from sqlalchemy import make_url

from asgi_uow import observers as of
from asgi_uow._asgi import respond
from asgi_uow._databases.engines import check_databases
from asgi_uow._decision import ERROR_STATUS, Cause, Outcome
from asgi_uow._unit.options import inspect
from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asgi_uow._asgi import Receive, Scope, Send
    from asgi_uow._databases.engines import Engines

__all__ = ["Inspector"]

MOST_UNITS, MOST_DIGITS = 200, 20
FILES = resources.files("asgi_uow") / "_inspector"
PAGES = {"/": "html", "/page.css": "css", "/page.js": "javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src "
    "'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
ENDS = {
    Outcome.COMMITTED: "Committed.",
    Outcome.ROLLED_BACK: "Rolled back: {why}.",
    Outcome.UNKNOWN: "Unknown: the answer to COMMIT was lost; the work may be kept.",
    Outcome.PARTIAL: "Kept in part: a part was committed, the rest was not.",
}
ENDED = "Unknown: something else has ended the transaction, and nobody knows how."
UNUSED = "Nothing to commit: the write session executed nothing."
WHY: Mapping[Cause | None, str] = {
    None: "nothing asked to commit it, and commit_on_exit is False",
    Cause.EXCEPTION: "an exception left the {code}",
    Cause.STATUS: "the response was {status}",
    Cause.EXPLICIT: "set_rollback_only({reason!r}) was called",
    Cause.DOOMED: "an error of the database was swallowed, and the transaction could "
    "not be committed any more",
    Cause.BEFORE_COMMIT: "a before_commit hook failed",
    Cause.COMMIT_FAILED: "the database refused to commit it",
    Cause.CANCELLED: "the {code} was cancelled before COMMIT was sent",
    Cause.TIMEOUT: "time was up before it was committed",
    Cause.ABANDONED: "the {code} was never left, and nothing refers to it any more",
}
NOTES: Mapping[type[of.Event], str] = {
    of.CommitFailed: "Raised as {0.error.__class__.__name__}; driver code {0.code}.",
    of.RetryScheduled: "Done again {0.seconds:.3f} s later, as attempt {0.attempt}.",
    of.HeldIdle: "A connection was held for {0.seconds:.3g} s while nothing was "
    "executed: {0.place}",
    of.HookFailed: "{0.phase} {0.hook} failed: {0.error.__class__.__name__}.",
    of.ImplicitCommit: "MySQL committed in the middle of the unit: {0.statement}.",
    of.ReleaseFailed: "{0.operation} failed: {0.error.__class__.__name__}.",
}


@dataclasses.dataclass(eq=False)
class Entry:
    """What is shown of one unit; it does not refer to the unit."""

    at: int  # when the unit was opened, as `time.time_ns()` counts
    number: int = 0
    revision: int = 0
    hook: str = ""  # whose own unit it is
    hook_of: int = 0  # the number of the unit that hook was registered for
    finished: of.UnitFinished | None = None
    closed: of.UnitClosed | None = None
    hooks: list[Mapping[str, object]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list[str])

    def take(self, event: of.Event) -> None:
        if isinstance(event, of.UnitFinished):
            self.finished = dataclasses.replace(event, unit=None)
        elif isinstance(event, of.UnitClosed):
            self.closed = dataclasses.replace(event, unit=None)
            texts = [step for step in event.timeline if step.kind == "statement"]
            total = self.finished.statements.count if self.finished else 0
            if total > len(texts):
                self.notes.append(f"{total - len(texts)} statements are not shown.")
        elif note := NOTES.get(type(event)):
            self.notes.append(note.format(event))

    def take_hook(self, event: of.HookFinished) -> None:
        """Keep when a hook ran that was registered for this unit."""
        start = (event.at - self.at) / 1e9 - event.seconds
        text, failed = f"{event.phase} {event.hook}", event.error is not None
        about = {"text": text, "start": start, "seconds": event.seconds}
        self.hooks.append({"kind": "hook", **about, "failed": failed})

    def sentence(self) -> str:
        if (finished := self.finished) is None:
            return "It is not decided yet."
        outcome, cause, reason = finished.outcome, finished.cause, finished.reason
        if outcome is Outcome.COMMITTED and not finished.databases:
            return UNUSED
        if outcome is Outcome.UNKNOWN and cause is Cause.DOOMED:
            return ENDED
        code = "hook" if self.hook else "handler" if finished.method else "block"
        status: object = (self.closed and self.closed.status) or "an error"
        if isinstance(status, int) and status < ERROR_STATUS:
            status = f"{status}, and commit_when said no"
        if cause is Cause.EXPLICIT and reason is None:
            cause = None
        why = WHY[cause].format(code=code, reason=reason, status=status)
        return ENDS[outcome].format(why=why)

    def to_json(self) -> Mapping[str, object]:
        """Show everything: no value of a parameter, no query, no URL is in it."""
        about, closed = self.finished, self.closed
        steps = [dataclasses.asdict(step) for step in closed.timeline] if closed else []
        several = len({step["database"] for step in steps}) > 1
        for step in steps:
            step["database"] = several and _label(step["database"])
        sums = "seconds", "waited", "held", "idle"
        names = "method", "path", "attempt", "replayed", *sums
        return {
            **{name: getattr(self, name) for name in ("number", "hook", "hook_of")},
            **{name: getattr(about, name, None) for name in names},
            "at": self.at // 1_000_000,
            "outcome": about.outcome.value if about else "running",
            "statements": about and dataclasses.asdict(about.statements),
            "sentence": self.sentence(),
            "status": closed and closed.status,
            "response": closed and closed.response,
            "closed": closed is not None,
            "steps": [*steps, *self.hooks],
            "notes": self.notes,
        }


class Inspector:
    """An ASGI application that shows the last 200 units of work of `databases`.

    Of each: a timeline of connections, statements (SQL with placeholders, without
    values), savepoints, COMMIT, hooks and response, the outcome and why. It loads
    nothing from elsewhere. Whoever reaches it sees paths and SQL, so mount it in
    development only: without `debug=True` it raises `ConfigurationError`. Raises
    `TypeError` for what is no `Database`.
    """

    def __init__(self, *databases: Engines, debug: bool = False) -> None:
        check_databases("Inspector(db, debug=True)", databases)
        if debug is not True:
            message = "Inspector shows paths and SQL to everybody who reaches it: say "
            message += "debug=True where that is right, as in development."
            raise ConfigurationError(message)
        self._entries: WeakKeyDictionary[object, Entry] = WeakKeyDictionary()
        self._last: deque[Entry] = deque(maxlen=MOST_UNITS)
        self._numbers, self._revisions = itertools.count(1), itertools.count(1)
        self._revision = 0
        inspect(databases, self.observe)

    def observe(self, event: of.Event, /) -> None:
        """Take in an event of a unit; `inspect()` calls it for units of `databases`."""
        entry = self._entries.setdefault(event.unit, Entry(event.at))
        if not entry.number and isinstance(event, of.UnitStarted | of.UnitFinished):
            entry.number = next(self._numbers)
            entry.at = event.at - int(1e9 * getattr(event, "seconds", 0))
            self._last.append(entry)
        if isinstance(event, of.HookStarted | of.HookFinished):
            owner = self._entries.get(event.of, entry)
            if owner is not entry:
                entry.hook, entry.hook_of = f"{event.phase} {event.hook}", owner.number
            if isinstance(event, of.HookFinished):
                owner.take_hook(event)
                owner.revision = next(self._revisions)
        entry.take(event)
        entry.revision = self._revision = next(self._revisions)

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        if scope["type"] != "http":  # servers take it as an answer about the lifespan
            message = f"Inspector answers HTTP requests, not {scope['type']}."
            raise RuntimeError(message)
        status, kind, body, more = self._answer(scope)
        headers = HEADERS | {"content-type": f"{kind}; charset=utf-8"} | more
        headers["content-length"] = str(len(body))
        await respond(send, status, headers, b"" if scope["method"] == "HEAD" else body)

    def _answer(self, scope: Scope) -> tuple[int, str, bytes, dict[str, str]]:
        """Give status, type, body and more headers."""
        path, plain = _below_mount(scope), ("text/plain", b"")
        raw, errors = scope.get("raw_path"), "surrogateescape"
        asked = quote(raw, "/%") if raw else quote(scope["path"], errors=errors)
        if scope["method"] not in {"GET", "HEAD"}:
            return 405, *plain, {"allow": "GET, HEAD"}
        if path == "/" and not asked.endswith("/"):  # relative URLs need that
            return 307, *plain, {"location": f"./{asked.rpartition('/')[2]}/"}
        if path in PAGES:
            name = path.strip("/") or "page.html"
            return 200, f"text/{PAGES[path]}", (FILES / name).read_bytes(), {}
        if path != "/units":
            return 404, *plain, {}
        after = parse_qs(scope["query_string"]).get(b"after", [b""])[0]
        is_number = after.isdigit() and len(after) < MOST_DIGITS
        revision, since = self._revision, int(after) if is_number else 0
        units = [each.to_json() for each in tuple(self._last) if each.revision > since]
        content = {"revision": revision, "units": units}
        return 200, "application/json", json.dumps(content).encode(), {}


def _below_mount(scope: Scope) -> str:
    """Give the path inside a mount; some servers, and proxies, cut a part off."""
    path, root = scope["path"], (scope.get("root_path") or "").rstrip("/")
    while root and not f"{path}/".startswith(f"{root}/"):
        _, slash, rest = root[1:].partition("/")
        root = slash + rest
    return path.removeprefix(root) or "/"


def _label(database: str) -> str:
    url = make_url(database)
    return f"{url.get_backend_name()} {(url.database or '').rpartition('/')[2]}"
