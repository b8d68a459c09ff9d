"""The answer to a request whose work was not kept, when nobody else gives one."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from asgi_uow._decision import RETRY_AFTER

if TYPE_CHECKING:
    from asgi_uow._asgi import Receive, Scope, Send

START = "http.response.start"
FAILURE = "asgi_uow.failure"  # the key in the scope of what an `error_app` answers


async def problem_details(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Answer with what `problem` gives for the failure in the scope."""
    status, fields, body = problem(scope[FAILURE])
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": START, "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def problem(failure: Exception) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body of a small `application/problem+json` (RFC 9457).

    503 with `Retry-After` (RFC 9110, 10.2.3) where the work is proven not kept and
    trying again may help, otherwise 500. Says nothing about the cause.
    """
    # A failure of our own says so itself; any other is a database out of reach.
    retry_after: int | None = getattr(failure, "retry_after", RETRY_AFTER)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    detail = "The request could not be completed."
    headers = {"content-type": "application/problem+json"}
    if retry_after is not None:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        detail = "Nothing was changed; please try again."
        headers["retry-after"] = str(retry_after)
    about = {"type": "about:blank", "title": status.phrase, "status": status.value}
    body = json.dumps({**about, "detail": detail}).encode()
    headers["content-length"] = str(len(body))
    return status.value, headers, body
