"""What an end means: the outcome, and the failure that is raised for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from asgi_uow import errors
from asgi_uow._databases.driver_errors import means
from asgi_uow._decision import RETRY_AFTER, Cause, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asgi_uow._unit.participant import Participant


class HookStoppedError(Exception):
    """Carries the name of the `before_commit` hook whose error is its cause."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """What became of the work, and what is to be raised if it was not kept."""

    outcome: Outcome
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause: Cause | None = None
    error: BaseException | None = None
    detail: str = ""

    def failure(self, outages: list[Exception]) -> errors.UnitOfWorkFailedError | None:
        """Make the failure; it asks for a retry if nothing was kept and it may help."""
        if self.cause is None:
            return None
        later = False
        if self.outcome is Outcome.ROLLED_BACK and self.error is not None:
            later = is_outage(self.error, outages) or means(self.error, "conflict")
        retry_after = RETRY_AFTER if later else None
        detail = self.detail
        failure = self.kind(
            self.outcome, self.cause, detail=detail, retry_after=retry_after
        )
        failure.__cause__ = self.error
        return failure


COMMITTED, ROLLED_BACK = Ended(Outcome.COMMITTED), Ended(Outcome.ROLLED_BACK)


def stopped_by(error: BaseException) -> Ended:
    """Tell what it means that the preparation was stopped by `error`."""
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause, detail = Cause.COMMIT_FAILED, ""
    if isinstance(error, HookStoppedError) and error.__cause__ is not None:
        kind, cause, detail = errors.BeforeCommitError, Cause.BEFORE_COMMIT, str(error)
        error = error.__cause__
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    elif not isinstance(error, Exception):
        cause = Cause.CANCELLED
    return Ended(Outcome.ROLLED_BACK, kind, cause, error, detail)


def partial_for_ddl(
    ended: Ended, cause: Cause | None, participants: Iterable[Participant]
) -> Ended:
    """Tell whether DDL has kept a part of what is to be rolled back."""
    for each in participants:
        statement = each.writer and each.writer.sync_session.journal.implicit_commit
        if statement and ended.outcome is Outcome.ROLLED_BACK:
            cause = ended.cause or cause or Cause.COMMIT_FAILED
            kind, error = errors.PartialCommitError, ended.error
            detail = f"MySQL committed by itself for {statement!r}"
            return Ended(Outcome.PARTIAL, kind, cause, error, detail)
    return ended


def is_outage(error: BaseException, outages: list[Exception]) -> bool:
    """Tell whether `error` is, or follows from, one of the `outages`."""
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error] if outages else []
    while ahead:
        cause = ahead.pop()
        # A task group's only error, raised again by Starlette, has the group as
        # its context, and is in the group.
        if cause is None or any(cause is each for each in seen):
            continue
        if any(cause is each for each in outages):
            return True
        seen.append(cause)
        ahead.append(cause.__cause__ or cause.__context__)
        if isinstance(cause, BaseExceptionGroup):
            ahead.extend(cause.exceptions)
    return False
