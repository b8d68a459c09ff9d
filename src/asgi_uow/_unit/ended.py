"""What became of the work of a unit, and what is raised if it was not committed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from asgi_uow import errors
from asgi_uow._decision import RETRY_AFTER, Cause, Outcome

if TYPE_CHECKING:
    from asgi_uow._sessions.managed import Shared


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    outcome: Outcome
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause: Cause | None = None
    error: BaseException | None = None
    detail: str = ""

    def failure(self, cause: Cause, shared: Shared) -> errors.UnitOfWorkFailedError:
        """Make the failure; it asks for a retry if nothing was kept and it may help."""
        may_help = self.outcome is Outcome.ROLLED_BACK and shared.may_repeat(self.error)
        after = RETRY_AFTER if may_help else None
        failure = self.kind(self.outcome, cause, detail=self.detail, retry_after=after)
        failure.__cause__ = self.error
        return failure


COMMITTED, ROLLED_BACK = Ended(Outcome.COMMITTED), Ended(Outcome.ROLLED_BACK)


def stopped_by(error: BaseException, hook: str | None = None) -> Ended:
    """Tell what an error of the flush means, or of a `before_commit` hook."""
    kind: type[errors.UnitOfWorkFailedError] = errors.CommitFailedError
    cause = Cause.COMMIT_FAILED if isinstance(error, Exception) else Cause.CANCELLED
    if hook is not None and isinstance(error, Exception):
        kind, cause = errors.BeforeCommitError, Cause.BEFORE_COMMIT
    if isinstance(error, TimeoutError):
        cause = Cause.TIMEOUT
    return Ended(Outcome.ROLLED_BACK, kind, cause, error, hook or "")
