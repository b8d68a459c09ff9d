"""The body of a request that may be replayed, kept while the application reads it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive


class Attempts(Protocol):
    """Those of one request."""

    number: int
    pause: float | None
    is_last: bool


class Body:
    """What the client has sent so far; each attempt reads it from the beginning."""

    is_complete = is_gone = False
    _lock: asyncio.Lock | None = None  # for the server's receive(), of all attempts

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._bytes = bytearray()

    def reader(self, attempts: Attempts) -> Receive:
        number, given, is_ended = attempts.number, 0, False

        async def receive() -> Message:
            nonlocal given, is_ended
            self._lock = self._lock or asyncio.Lock()
            async with self._lock:
                is_left = number != attempts.number  # behind, by an earlier attempt
                is_known = given < len(self._bytes) or self.is_complete
                if is_left or self.is_gone:
                    return {"type": "http.disconnect"}
                if is_known and not is_ended:
                    chunk = bytes(self._bytes[given:])
                    given, is_ended = len(self._bytes), self.is_complete
                    return _request(chunk, more=not is_ended)
                message = await self._receive()
                self._note(message, attempts)
                is_left = number != attempts.number
                given, is_ended = len(self._bytes), self.is_complete
                return {"type": "http.disconnect"} if is_left else message

        return receive

    def _note(self, message: Message, attempts: Attempts) -> None:
        if message["type"] != "http.request":
            self.is_gone = attempts.is_last = True
            return
        self.is_complete = not message.get("more_body", False)
        if not attempts.is_last or attempts.pause is not None:
            self._bytes += message.get("body", b"")
            attempts.is_last = attempts.is_last or len(self._bytes) > self._most


def _request(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}
