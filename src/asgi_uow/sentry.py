"""Report what went wrong to Sentry: `observers=(SentryObserver(), LoggingObserver())`.

In this order: Sentry's logging integration reports what is logged, and of two reports
of one exception it keeps the first. Needs the extra `sentry`; nothing is switched on
by installing it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import sentry_sdk
from sentry_sdk.utils import event_from_exception

from .observers import CommitFailed, HookFailed, ReleaseFailed

if TYPE_CHECKING:
    from .observers import Event

__all__ = ["SentryObserver"]

PARAMETERS = re.compile(r"\n\[parameters: .*", re.DOTALL)
"""What SQLAlchemy appends to a message unless the engine has `hide_parameters`."""


class SentryObserver:
    """Sends failures to Sentry with the extras `comment` and `handler`.

    `comment` says what was being done, `handler` names the hook, if it was one. The
    current Sentry client is used. Local variables and statement parameters are left
    out: they hold people's data, and the engine's URL with its password.
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
        options = sentry_sdk.get_client().options
        event, hint = event_from_exception(
            error,
            client_options={**options, "include_local_variables": False},
            mechanism={"type": "asgi_uow", "handled": True},
        )
        for exception in event.get("exception", {}).get("values", ()):
            exception["value"] = PARAMETERS.sub("", exception["value"] or "")
        with sentry_sdk.new_scope() as scope:
            scope.set_extra("comment", comment)
            scope.set_extra("handler", handler)
            scope.capture_event(event, hint=hint)
