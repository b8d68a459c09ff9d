"""The answer to a request whose work was not kept, when nobody else gives one."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from asgi_uow._asgi import respond
from asgi_uow._decision import RETRY_AFTER

if TYPE_CHECKING:
    from asgi_uow._asgi import Receive, Scope, Send

FAILURE = "asgi_uow.failure"  # the key in the scope of what an `error_app` answers


async def problem_details(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Answer with what `problem` gives for the failure in the scope."""
    await respond(send, *problem(scope[FAILURE]))


def problem(failure: Exception) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body of a small `application/problem+json` (RFC 9457).

    503 with `Retry-After` (RFC 9110, 10.2.3) where the work is proven not kept and
    trying again may help, otherwise 500. Says nothing about the cause.
    """
    # A failure of our own says so itself; any other is a database out of reach.
    retry_after: int | None = getattr(failure, "retry_after", RETRY_AFTER)
    if retry_after is None:
        return described(500, "The request could not be completed.")
    return described(503, "Nothing was changed; please try again.", retry_after)


def described(
    status: int, detail: str, retry_after: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Give status, headers and body of a problem that has no type of its own."""
    title = HTTPStatus(status).phrase
    about = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    body = json.dumps(about).encode()
    headers = {"content-type": "application/problem+json"}
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    return status, {**headers, "content-length": str(len(body))}, body
