"""Report what went wrong to Sentry: `observers=(SentryObserver(), LoggingObserver())`.

In this order: Sentry's logging integration reports what is logged, and of two reports
of one exception it keeps the first. Needs the extra `sentry`; nothing is switched on
by installing it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sentry_sdk
from sentry_sdk.utils import event_from_exception, get_error_message

from asgi_uow._databases.driver_errors import Redactor, code_of
from asgi_uow.observers import CommitFailed, HookFailed, ReleaseFailed

if TYPE_CHECKING:
    from asgi_uow.observers import Event

__all__ = ["SentryObserver"]


class SentryObserver:
    """Sends failures to Sentry, by way of the client that is current.

    The extra `comment` says what was being done, `handler` names the hook, if it was
    one, `code` is the driver's; a commit also has `outcome` and `cause`. One issue is
    made per hook and phase, or per outcome, cause and code.

    Local variables are left out: they hold people's data, and the engine's URL with
    its password. So do the messages of database errors: unless the client has
    `send_default_pii=True`, class, code and the statement without literals remain.
    """

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, CommitFailed):
            outcome, cause = event.outcome.value, event.cause.value
            about = {"comment": f"unit of work not kept: {outcome}"}
            about |= {"outcome": outcome, "cause": cause}
            _capture(event.error, about, outcome, cause, str(event.code))
        elif isinstance(event, HookFailed):
            about = {"comment": f"{event.phase} hook failed", "handler": event.hook}
            _capture(event.error, about, event.phase, event.hook)
        elif isinstance(event, ReleaseFailed):
            comment = f"{event.operation} failed"
            _capture(event.error, {"comment": comment}, comment)


def _capture(error: BaseException, about: dict[str, str], *group: str) -> None:
    client = sentry_sdk.get_client()
    event, hint = event_from_exception(
        error,
        client_options={**client.options, "include_local_variables": False},
        mechanism={"type": "asgi_uow", "handled": True},
    )
    if not client.should_send_default_pii():
        redact = Redactor(error, get_error_message)
        for exception in event.get("exception", {}).get("values", ()):
            exception["value"] = redact(str(exception["value"] or ""))
    event["fingerprint"] = ["{{ default }}", *group]
    with sentry_sdk.new_scope() as scope:
        for name, value in {"handler": None, "code": code_of(error), **about}.items():
            scope.set_extra(name, value)
        scope.capture_event(event, hint=hint)
