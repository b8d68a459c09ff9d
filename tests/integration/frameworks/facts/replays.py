"""What met a conflict is done again, as if it had come in a moment later."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import httpx
from sqlalchemy.exc import DBAPIError

from asgi_uow import Retry, after_commit, after_rollback, current_unit_of_work
from asgi_uow.observers import RetryScheduled, UnitFinished
from tests.integration.frameworks.case import database_fact, fact, write
from tests.integration.frameworks.site import Reply, Site
from tests.support.conflicts import conflict, prepare_conflicts

if TYPE_CHECKING:
    from asgi_uow._asgi import ASGIApp
    from tests.integration.frameworks.case import Case
    from tests.integration.frameworks.site import Upload

CONTENT = bytes(range(256)) * 400
FORM: dict[str, Any] = {
    "data": {"title": "a title"},
    "files": {"file": ("a file.bin", CONTENT)},
}
RETRY = Retry(methods=["POST"], backoff=0.001, max_body=2 * len(CONTENT))
CALLER: ContextVar[str] = ContextVar("CALLER")


class TakenError(Exception):
    """What an application makes of a conflict, to answer it."""


class Form:
    """Serves a form; its first attempts, as many as told, meet a conflict."""

    def __init__(self, case: Case, conflicts: int, *, answers: bool) -> None:
        self.case = case
        self.conflicts = conflicts
        self.answers = answers
        """Whether an error handler answers the conflict."""
        self.seen: list[dict[str, object]] = []
        """What came in, for each attempt."""
        self.hooks: list[str] = []

    @classmethod
    async def prepare(cls, case: Case, conflicts: int, *, answers: bool) -> Form:
        """Make what its attempts have their conflicts over, too."""
        await prepare_conflicts(case.backend, case.db)
        return cls(case, conflicts, answers=answers)

    @property
    def site(self) -> Site:
        return Site(
            uploads={"/forms": self.handle},
            error_handlers={TakenError: lambda: Reply("taken", 409)},
        )

    def app(self) -> ASGIApp:
        return self.case.app(self.site, retry=RETRY)

    def mounted(self, path: str) -> ASGIApp:
        """Mount it in an application of the same framework, which has the unit."""
        mounts = {path: self.case.framework.application(self.site)}
        return self.case.app(Site(mounts=mounts), retry=RETRY)

    async def handle(self, upload: Upload) -> Reply:
        attempt = current_unit_of_work().attempt
        scope, state = upload.scope, upload.scope["state"]
        self.seen.append(
            {
                "number": upload.number,
                "title": upload.title,
                "file": (upload.filename, upload.content == CONTENT),
                "user": state["user"],
                "place": (scope["path"], scope.get("root_path", "")),
                "left behind": (state.get("attempt"), CALLER.get(None)),
            }
        )
        state["user"], state["attempt"] = "nobody", attempt
        CALLER.set(f"attempt {attempt}")
        after_commit(self.hooks.append, f"{attempt} committed")
        after_rollback(self.hooks.append, f"{attempt} rolled back")
        if attempt <= self.conflicts:
            await self.meet_conflict()
        await write(attempt)
        return Reply(f"attempt {attempt}", 202)

    async def meet_conflict(self) -> None:
        try:
            await conflict(self.case.backend)
        except DBAPIError as error:
            if self.answers:
                raise TakenError from error
            raise

    async def check(self, status: int, text: str) -> None:
        """The client has the last attempt's response; each found what had come in."""
        last = self.conflicts + 1
        assert (202, f"attempt {last}") == (status, text)
        assert last == len(self.seen)
        assert [
            {
                "number": 7,
                "title": "a title",
                "file": ("a file.bin", True),
                "user": "ann",
                "place": self.seen[0]["place"],
                "left behind": (None, None),
            }
        ] * last == self.seen
        undone = [f"{number} rolled back" for number in range(1, last)]
        assert [*undone, f"{last} committed"] == self.hooks
        assert [last] == await self.case.kept()
        told = [each for each in self.case.events if isinstance(each, RetryScheduled)]
        assert [*range(2, last + 1)] == [each.attempt for each in told]
        assert [UnitFinished] * last == self.case.ends()


async def send_form(form: Form, app: ASGIApp, path: str = "/forms/7") -> None:
    """Send the form, in parts, as a server does that knows who sends it."""
    request = httpx.Request("POST", "http://server", **FORM)
    content = request.read()
    async with form.case.run(app) as server:
        exchange = await server.request(
            path,
            method="POST",
            headers=[(key.lower(), value) for key, value in request.headers.raw],
            state={"user": "ann"},
            body=[content[:1000], content[1000:70_000], content[70_000:]],
        )
    assert exchange.error is None
    assert exchange.is_complete
    await form.check(exchange.status, "".join(exchange.chunks))


@database_fact
async def replayed(case: Case) -> None:
    """A POST that met a conflict is replayed: form, file, path, state as they came."""
    form = await Form.prepare(case, 1, answers=False)
    await send_form(form, form.app())


@database_fact
async def replayed_answer(case: Case) -> None:
    """A conflict that an error handler answers, twice, is replayed as well, twice."""
    form = await Form.prepare(case, 2, answers=True)
    await send_form(form, form.app())


@fact
async def replayed_mount(case: Case) -> None:
    """A POST to a mounted application is replayed there, under the same path."""
    form = await Form.prepare(case, 1, answers=True)
    await send_form(form, form.mounted("/mounted"), "/mounted/forms/7")
