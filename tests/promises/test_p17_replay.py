"""P17: a replayed request is like one that came in a moment later.

Clients that read, compute and write at once lose updates, unless the database refuses
some of them; with `Retry` no client hears of that.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import DBAPIError

import asgi_uow as uow
from asgi_uow import Retry, UnitOfWorkMiddleware
from asgi_uow.observers import CommitFailed, RetryScheduled
from tests.support.asgi import Client, Response, http_scope, no_body, respond
from tests.support.conflicts import READ, conflicting_shop
from tests.support.databases import DRIVERS, checked_out, on

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend

pytestmark = on(*DRIVERS)

CLIENTS = 8
ROUNDS = int(os.environ.get("ASGI_UOW_ROUNDS", "25"))
RETRY = Retry(attempts=1000, methods=["POST"], backoff=0.002, max_backoff=0.02)


@pytest.mark.parametrize("handles", [False, True], ids=["raises", "answers 409"])
async def test_no_update_is_lost(
    backend: Backend, record_property: Callable[[str, object], None], *, handles: bool
) -> None:
    """All is counted, once, and every client has its 200; so do the hooks."""
    hooks: Counter[str] = Counter()
    response = Response()

    async def count_up(scope: Scope, receive: Receive, send: Send) -> None:
        uow.after_commit(hooks.update, ["commit"])
        uow.after_rollback(hooks.update, ["rollback"])
        session = uow.current_session()
        if backend.name != "sqlite":  # there every transaction is
            uow.isolation_level("SERIALIZABLE")
        try:
            value = await session.scalar(READ)
            await session.execute("UPDATE counters SET value = :new", new=value + 1)
        except DBAPIError:
            if not handles:
                raise
            await respond(send, 409)
        else:
            await respond(send)

    async with conflicting_shop(backend, pool_size=CLIENTS, max_overflow=0) as db:
        app = UnitOfWorkMiddleware(
            count_up, db, retry=RETRY, observers=[response.events]
        )
        answers: list[Response] = []

        async def client() -> None:
            for _ in range(ROUNDS):
                scope = http_scope(method="POST")
                answers.append(await Client(app).request(scope=scope, receive=no_body))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        assert {200: CLIENTS * ROUNDS} == Counter(each.status for each in answers)
        assert CLIENTS * ROUNDS == await backend.scalar(READ)
        replays = len(response.events.of(RetryScheduled))
        assert {"commit": CLIENTS * ROUNDS, "rollback": replays} == hooks
        assert [] == response.events.of(CommitFailed)
        assert replays > 0
        record_property("replays", replays)
        assert [0, 0] == checked_out(db)
