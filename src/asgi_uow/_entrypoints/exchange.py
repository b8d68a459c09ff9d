"""One request's way out: the decision at its first start, and what is forwarded."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import anyio

from asgi_uow import _decision
from asgi_uow._asgi import FAILURE, START
from asgi_uow._concurrency import run_to_completion
from asgi_uow._decision import ERROR_STATUS, SETTLED, Cause, Outcome
from asgi_uow._reading.route import written_position
from asgi_uow._unit.finish import conflict_of, finish
from asgi_uow._unit.unit import COMMITTED
from asgi_uow.errors import (
    ConcurrentUseError,
    UnitOfWorkClosedError,
    UnitOfWorkFailedError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import CommitWhen, Headers
    from asgi_uow._reading.causal import CausalReads
    from asgi_uow._sessions.record import Recorder
    from asgi_uow._sessions.session import Session
    from asgi_uow._unit.unit import UnitOfWork

POSITION_SECONDS = 2.0  # for learning a position; then the client reads the writer


class Again(BaseException):
    """Ends an attempt of the application, whatever exceptions that handles."""


class Stage(enum.Enum):
    """Where a request is on its way out."""

    OPEN = "the application has sent no start"
    DECIDING = "a start is held until the unit of work has ended"
    PASSING = "what is sent is forwarded: the response, or an answer to the failure"
    REFUSED = "the work was not kept, so only an error is forwarded"
    REPLAYED = "what it asks for is done again: nothing of this attempt is forwarded"


# Python 3.11 takes long for each member of an enum.
OPEN, DECIDING, PASSING, REFUSED, REPLAYED = Stage


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the options of the middleware say about responses."""

    commit_when: CommitWhen
    error_app: ASGIApp | None
    causal_reads: CausalReads | None


class Exchange:
    """What is between the application's `send` and the server's."""

    # Set by the middleware: a request that touches nothing runs no __init__.
    unit: UnitOfWork
    forward: Send
    rules: Rules
    stage: Stage

    is_secure: bool = False
    settled: asyncio.Event | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Decide at the first start; after a failure let only an error answer pass."""
        if self.stage is PASSING:
            return self.forward(message)
        unit = self.unit
        if (
            self.stage is OPEN
            and unit.shared is None
            and message["type"] == START
            and self.rules.commit_when is _decision.commit_below_400
        ):
            # Nothing was asked of the unit, so the status alone decides.
            if message["status"] < ERROR_STATUS:
                unit.state, unit.outcome = COMMITTED
            else:
                unit.conclude_unused(Cause.STATUS)
            self.stage = PASSING
            return self.forward(message)
        return self._send(message)

    async def _send(self, message: Message) -> None:
        if self.stage is DECIDING:  # another task's start
            await self._settle()
        is_start = message["type"] == START
        if is_start and self.stage is OPEN:
            message = await self._decide(message)
        elif is_start and self.stage is REFUSED and message["status"] >= ERROR_STATUS:
            self.stage = PASSING
        if self.stage is REFUSED or self.stage is REPLAYED:
            operation = "sending a response"
            raise self.unit.failure or UnitOfWorkClosedError(operation, self.unit.state)
        await self.forward(message)
        if is_start and self.unit.state in SETTLED:
            self.unit.move(_decision.RESPONDING)

    async def conclude(
        self, scope: Scope, receive: Receive, error: BaseException | None
    ) -> None:
        """End a unit that saw no start; answer, and raise, what nobody answered."""
        if self.stage is DECIDING:
            await run_to_completion(self._settle())
        elif self.stage is OPEN:
            self.stage = REFUSED
            why = Cause.ABANDONED if error is None else _decision.exception_cause(error)
            with suppress(UnitOfWorkFailedError):  # of the unit: answered below
                await finish(self.unit, _decision.rollback(why))
        failure = self._unanswered(error)
        if failure is None or self.stage is REPLAYED:
            return
        error_app = self.rules.error_app
        if error_app is not None and self.stage is not PASSING:
            scope[FAILURE] = failure
            try:
                await error_app(scope, receive, self._answer)
            finally:
                self.stage = PASSING
                scope.pop(FAILURE, None)  # it refers to frames, and those to the scope
        try:
            if failure is not error:
                raise failure from failure.__cause__
        finally:
            del failure, error  # their tracebacks refer to this frame

    def _unanswered(self, error: BaseException | None) -> Exception | None:
        """Give what has to be answered for, if the application did not do so."""
        shared = self.unit.shared
        if shared is not None and self.unit.again is not None:
            self.stage = REPLAYED
        if not (shared and isinstance(error, Exception | None)):
            return None
        if self.unit.failure is None:
            rolled_back = self.unit.outcome is Outcome.ROLLED_BACK
            return error if rolled_back and shared.may_repeat(error) else None
        return None if self.stage is PASSING else self.unit.failure

    async def _answer(self, message: Message) -> None:
        """Pass what an `error_app` sends; it may not claim a success."""
        if message["type"] == START and message["status"] < ERROR_STATUS:
            text = "an error_app has to answer with a status at or above 400"
            raise ValueError(text)
        await self.forward(message)

    async def _settle(self) -> None:
        if self.settled is None:
            self.settled = asyncio.Event()
        await self.settled.wait()

    async def _decide(self, message: Message) -> Message:
        unit, rules = self.unit, self.rules
        streams = _refuse_inside_call(unit.writers)
        self.stage = DECIDING
        # Sanic's headers are a generator, and are read twice: here and outside.
        headers: Headers = list(message.get("headers", ()))
        broken: BaseException | None = None
        try:
            decision = _decision.decide_response(
                status=message["status"],
                headers=headers,
                rollback_only=unit.state is _decision.ROLLBACK_ONLY,
                doomed=unit.doomed_by is not None,
                forced=unit.forced,
                commit_when=rules.commit_when,
            )
            is_good = message["status"] < ERROR_STATUS
            if not decision.commit and self._is_used_up(decision, message["status"]):
                unit.doom = unit.doomed_by or conflict_of(unit, None)
                decision = _decision.rollback(Cause.DOOMED, replace_response=True)
            elif streams and is_good and not decision.replace_response:
                await _refuse_streams(unit)
        except BaseException as error:  # noqa: BLE001  # becomes the cause of the failure
            broken, cause = error, _decision.exception_cause(error)
            decision = _decision.rollback(cause, replace_response=True)
        try:
            await finish(unit, decision, broken)
            if unit.again is not None:
                raise Again
            if rules.causal_reads is not None:
                await self._add_causal_token(rules.causal_reads, headers)
            if unit.options.server_timing and unit.shared is not None:
                _add_timing(cast("Recorder", unit.shared.recorder), headers)
        finally:
            is_known = unit.failure is None and unit.state in SETTLED
            self.stage = PASSING if is_known else REFUSED
            self.stage = self.stage if unit.again is None else REPLAYED
            if self.settled is not None:
                self.settled.set()
        return {**message, "headers": headers}

    def _is_used_up(self, decision: _decision.Decision, status: int) -> bool:
        """Tell whether the client is to come again, and not to see this answer."""
        unit = self.unit
        if unit.attempts is None or not unit.attempts.is_used_up:
            return False
        # A 500 is what frameworks make of an error that nobody has handled.
        is_broken = decision.cause is Cause.STATUS and status == _decision.SERVER_ERROR
        is_asked = is_broken or decision.cause is Cause.DOOMED
        return is_asked and conflict_of(unit, unit.doomed_by) is not None

    async def _add_causal_token(self, causal: CausalReads, headers: Headers) -> None:
        """Tell the client of a unit that wrote what its next reads must see."""
        shared = self.unit.shared
        found: dict[Engines, str] = {}
        for db in () if shared is None else tuple(shared.committed):
            if (position := await written_position(db, POSITION_SECONDS)) is not None:
                found[db] = position
        if found:
            known = causal.merge(self.unit.must_see.positions, found)
            headers.append(causal.response_header(known, secure=self.is_secure))


def _add_timing(recorder: Recorder, headers: Headers) -> None:
    """Tell a browser's developer tools what has taken how many milliseconds.

    https://www.w3.org/TR/server-timing/
    """
    usage = recorder.usage()
    found = {
        "pool": sum(each.waited for each in usage),
        "db": sum(each.statements.seconds for each in usage),
        "commit": recorder.ending,
        "hooks": recorder.hook_seconds,
    }
    parts = (f"{name};dur={1000 * each:.3f}" for name, each in found.items())
    headers.append((b"server-timing", ", ".join(parts).encode()))


def _refuse_inside_call(writers: tuple[Session, ...]) -> bool:
    """Doom the unit, and raise, where its end would wait for its own caller.

    Tells whether there are streams.
    """
    streams = False
    for writer in writers:
        if (owner := writer.own_lock.owner) and owner is asyncio.current_task():
            what = "The start of a response", "this task is in a call"
            raise writer.journal.doom(ConcurrentUseError(*what))
        streams = streams or bool(writer.streams)
    return streams


async def _refuse_streams(unit: UnitOfWork) -> None:
    """Raise for a stream that would break a response off; the end closes others."""
    for writer in unit.writers:
        turns = 10  # in which the loop closes generators left behind
        while writer.streams and any(
            writer.streams[each]() for each in writer.open_streams
        ):
            if not turns:
                what = "The start of a response", "a stream() is still to be read"
                raise ConcurrentUseError(*what)
            with anyio.fail_after(unit.options.commit_timeout):
                async with writer.own_lock:
                    await asyncio.sleep(0)
            turns -= 1
