"""Idempotency keys of HTTP requests: done once, and answered as often as it is asked.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import TYPE_CHECKING, Any

import anyio
import sqlalchemy as sa

from asgi_uow._asgi import BODY, RETRY_AFTER, START, described, respond
from asgi_uow._databases.configuration import check
from asgi_uow._databases.engines import check_databases
from asgi_uow._databases.keys import TABLE, Claim, is_expired, table_of
from asgi_uow._entrypoints.body import HashedBody
from asgi_uow._unit.block import unit_of_work
from asgi_uow._unit.claims import claim_key, end_with
from asgi_uow._unit.unit import require
from asgi_uow.errors import KeyInUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from asgi_uow._asgi import ASGIApp, Message, Receive, Scope, Send
    from asgi_uow._databases.engines import Engines
    from asgi_uow._unit.unit import UnitOfWork

READ_FIRST = 65536  # bytes of a request's body that come before its key is claimed
HOLD_SECONDS = 1.0  # then a response without a length that comes in parts is a stream
BATCH = 500  # rows that are deleted in one transaction
KEY = re.compile(rb"[\x20-\x7e]{1,255}")
# https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1, what a server adds, secrets, and
# what belongs to the one who asked first.
NOT_STORED = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"date", b"server"),
    *(b"set-cookie", b"proxy-authorization"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idempotency:
    """Does the work of requests with one `Idempotency-Key` once, and answers them all.

    `UnitOfWorkMiddleware(app, db, idempotency=Idempotency())`: the key is claimed in
    the transaction of the work, in the first database, and the response is kept there
    too. Whoever sends the key again gets it, with `Idempotency-Replayed: true`, and the
    application does not run; what was rolled back is done. Needs the table that
    `idempotency_table(metadata)` describes.

    `header`: that has the key, 1 to 255 visible ASCII characters, else 400. `methods`:
    of the requests whose key counts. `required`: without one they are a 400.
    `scope(scope)`: a string that says whose keys these are, such as the account: else
    whoever sends key and body has the answer, before the application looks who it is.
    `max_body`: bytes of a response that is kept; a larger one, or a stream, is sent as
    it comes, and a repetition is told with a 409 that all was done. `wait`: seconds for
    the first request; then a 409 with `Retry-After`. `keep`: seconds until
    `delete_expired` takes a key.

    The same key with another method, path, query or body is a 422. Up to 64 kB of the
    body are read before the application runs. Raises `ConfigurationError` for an option
    that cannot work.
    """

    header: str = "Idempotency-Key"
    methods: Collection[str] = ("POST", "PATCH")
    required: bool = False
    scope: Callable[[Scope], str] | None = None
    max_body: int = 65536
    wait: float = 10.0
    keep: float = 86400.0
    table: str = TABLE

    def __post_init__(self) -> None:
        check(vars(self))
        object.__setattr__(self, "methods", frozenset(map(str.upper, self.methods)))

    async def delete_expired(self, db: Engines) -> int:
        """Delete the keys that are older than `keep` seconds; for a job, not a request.

        In transactions of 500 rows, each a unit of work of its own. Gives their number.
        """
        check_databases("delete_expired(db)", (db,))
        table = table_of(self.table)
        deleted = 0
        while True:
            async with unit_of_work(db, independent=True) as unit:
                is_old = is_expired(table, self.keep)
                old = sa.select(table.c.id).where(is_old).limit(BATCH)
                found = (await unit.session().scalars(old)).all()
                # Again: somebody may have claimed one of them meanwhile.
                these = table.delete().where(table.c.id.in_(found), is_old)
                await unit.session().execute(these)
            deleted += len(found)
            if len(found) < BATCH:
                return deleted

    def covers(self, scope: Scope) -> bool:
        """Tell whether the key of this request counts."""
        return scope["type"] == "http" and scope["method"] in self.methods

    def keys(self, scope: Scope) -> list[bytes]:
        """Give the keys of a request, of which there should be one."""
        if not self.covers(scope):
            return []
        name = self.header.lower().encode()
        return [value for key, value in scope["headers"] if key.lower() == name]

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Give the application as a unit of work is to call it."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not (keys := self.keys(scope)):
                if self.required and self.covers(scope):
                    detail = f"This request needs the header {self.header}."
                    return await respond(send, *described(400, detail))
                return await app(scope, receive, send)
            key = keys[0].strip().removeprefix(b'"').removesuffix(b'"')
            if keys[1:] or not KEY.fullmatch(key):
                detail = f"{self.header} is one key of 1 to 255 visible ASCII "
                detail += "characters."
                return await respond(send, *described(400, detail))
            unit = require("an idempotency key")
            if any(each.journal.claim is not None for each in unit.writers):
                return await app(scope, receive, send)  # one around has the key
            keyed = _Keyed(self, app, scope, send)
            return await keyed.serve(unit, self._claim(scope, key), receive)

        return serve

    def _claim(self, scope: Scope, key: bytes) -> Claim:
        # Typed or not, it may return anything.
        whose: Any = "" if self.scope is None else self.scope(scope)
        if not isinstance(whose, str):
            message = f"Idempotency's scope has to return a string, not {whose!r}."
            raise TypeError(message)
        path = scope.get("raw_path") or scope["path"].encode()
        request = scope["method"].encode(), path, scope.get("query_string", b"")
        return Claim.of(table_of(self.table), f"http:{whose}", key.decode(), *request)


class _Keyed:
    """One request with a key."""

    def __init__(
        self, options: Idempotency, app: ASGIApp, scope: Scope, send: Send
    ) -> None:
        self._options, self._app, self._scope, self._send = options, app, scope, send
        self._held: list[Message] = []  # of the response, until its end
        self._size = 0
        self._is_passing = False
        self._until = math.inf  # when a response that is not whole is a stream

    async def serve(self, unit: UnitOfWork, claim: Claim, receive: Receive) -> None:
        self._unit, self._claim, self._body = unit, claim, HashedBody(receive)
        await self._body.fetch(READ_FIRST)
        if self._body.is_gone:
            return None  # not all of the request has come
        try:
            self._turn, row = await claim_key(unit, claim, self._options.wait)
            if row is not None:
                self._turn.close()
                return await self._repeat(unit, row)
        except KeyInUseError as error:
            return await respond(self._send, *described(409, str(error), RETRY_AFTER))
        with self._turn:
            await self._app(self._scope, self._body.receive, self._hold)
            if self._held:  # it has no end, and is the server's to judge
                await self._pass(None)
        return None

    async def _repeat(self, unit: UnitOfWork, row: Any) -> None:
        """Answer from what is kept: the work was done."""
        unit.set_rollback_only("its key was used before")
        unit.replayed = True
        if row.request != self._claim.request:
            told = 422, "This idempotency key was used for another method or path."
        elif row.fingerprint is None:
            told = 409, "A part of this was kept before; whether all was is not known."
        elif not await self._body.is_like(row.fingerprint, self._options.wait):
            told = 422, "This idempotency key was used with another body."
        elif row.status is None:
            told = 409, "This was done; its response was not kept, as it was too large."
        else:
            lines, _, body = row.response.partition(b"\n")
            pairs = [*json.loads(lines), ("idempotency-replayed", "true")]
            headers = [tuple(part.encode("latin-1") for part in pair) for pair in pairs]
            await self._send({"type": START, "status": row.status, "headers": headers})
            await self._send({"type": BODY, "body": body})
            return
        await respond(self._send, *described(*told))

    async def _hold(self, message: Message) -> None:
        """Hold the response until its end; or pass it on, if it is too large."""
        kind, has_more = message["type"], message.get("more_body", False)
        if self._is_passing or not (self._held or kind == START):
            return await self._send(message)
        if kind == START:  # whose headers may be a generator
            message = {**message, "headers": [*message.get("headers", ())]}
            fields = {name.lower(): value for name, value in message["headers"]}
            content: bytes = fields.get(b"content-type", b"")
            is_stream = content.startswith(b"text/event-stream")
            if b"content-length" not in fields:
                self._until = anyio.current_time() + HOLD_SECONDS
        elif kind == BODY:
            self._size += len(message.get("body", b""))
            is_late = has_more and anyio.current_time() > self._until
            is_stream = is_late or self._size > self._options.max_body
        else:  # of an extension: a file, a trailer
            is_stream = kind.startswith("http.response.")
        self._held.append(message)
        if is_stream:
            await self._pass(None)
        elif kind == BODY and not has_more:
            await self._pass(self._held[0])
        return None

    async def _pass(self, start: Message | None) -> None:
        """Commit, with the response if that is to be kept; then send it."""
        self._is_passing = True
        values: dict[str, object] = {}
        if start is not None:
            headers = [
                [name.decode("latin-1"), value.decode("latin-1")]
                for name, value in start["headers"]
                if name.lower() not in NOT_STORED
            ]
            body = b"".join(each.get("body", b"") for each in self._held[1:])
            response = json.dumps(headers).encode() + b"\n" + body
            values = {"status": start["status"], "response": response}

        def done() -> dict[str, object]:
            return {**values, "fingerprint": self._body.fingerprint}

        end_with(self._unit, self._claim, done)
        held, self._held = self._held, []
        for message in held:
            await self._send(message)
            self._turn.close()  # the first has ended the unit: others have its answer
