"""Report what went wrong to Sentry: `observers=(LoggingObserver(), SentryObserver())`.

Needs the extra `sentry`. Nothing is switched on by installing it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sentry_sdk

from .observers import CommitFailed, HookFailed, ReleaseFailed

if TYPE_CHECKING:
    from .observers import Event

__all__ = ["SentryObserver"]


class SentryObserver:
    """Sends failures to Sentry with the extras `comment` and `handler`.

    `comment` says what was being done, `handler` names the hook, if it was one. The
    current Sentry client is used. No statement parameters and no URLs are attached.
    """

    def __call__(self, event: Event, /) -> None:
        """Capture the exception of a failure; ignore everything else."""
        match event:
            case CommitFailed():
                comment = f"unit of work not kept: {event.outcome.value}"
                self._capture(event.error, comment, None)
            case HookFailed():
                self._capture(event.error, f"{event.phase} hook failed", event.hook)
            case ReleaseFailed():
                self._capture(event.error, f"{event.operation} failed", None)
            case _:  # a unit that finished, or DDL: nothing was raised
                pass

    @staticmethod
    def _capture(error: BaseException, comment: str, handler: str | None) -> None:
        with sentry_sdk.new_scope() as scope:
            scope.set_extra("comment", comment)
            scope.set_extra("handler", handler)
            scope.capture_exception(error)
