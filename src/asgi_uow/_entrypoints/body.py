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

        def known() -> Message | None:
            nonlocal given, is_ended
            # An earlier attempt may have left a reader behind.
            if number != attempts.number or self.is_gone:
                return {"type": "http.disconnect"}
            if is_ended or not (given < len(self._bytes) or self.is_complete):
                return None
            chunk = bytes(self._bytes[given:])
            given, is_ended = len(self._bytes), self.is_complete
            return _request(chunk, more=not is_ended)

        async def receive() -> Message:
            nonlocal given, is_ended
            if (message := known()) is not None:
                return message
            self._lock = self._lock or asyncio.Lock()
            async with self._lock:
                if (message := known()) is not None:  # whoever waited before has it
                    return message
                message = await self._receive()
                is_left = number != attempts.number
                self._note(message, attempts, is_left=is_left)
                if is_left:
                    return {"type": "http.disconnect"}
                given, is_ended = len(self._bytes), self.is_complete
                return message

        return receive

    def _note(self, message: Message, attempts: Attempts, *, is_left: bool) -> None:
        if message["type"] != "http.request":
            self.is_gone = attempts.is_last = True
            return
        self.is_complete = not message.get("more_body", False)
        if is_left or not attempts.is_last or attempts.pause is not None:
            self._bytes += message.get("body", b"")
            attempts.is_last = attempts.is_last or len(self._bytes) > self._most


def _request(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}
