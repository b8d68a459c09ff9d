"""The body of a request that may be replayed, kept while the application reads it."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive

GONE: dict[str, str] = {"type": "http.disconnect"}


class Attempts(Protocol):
    """Those of one request."""

    number: int
    pause: float | None
    is_last: bool


class Position:
    """How far one attempt has read."""

    attempt: int
    given: int = 0
    is_ended: bool = False


class Body:
    """What the client has sent so far; each attempt reads it from the beginning."""

    is_complete = is_gone = False
    _lock: asyncio.Lock | None = None  # for the server's receive(), of all attempts

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._bytes = bytearray()

    def reader(self, attempts: Attempts) -> Receive:
        """Give what an attempt receives with."""
        at = Position()
        at.attempt = attempts.number
        return functools.partial(self._read, attempts, at)

    async def _read(self, attempts: Attempts, at: Position) -> Message:
        message = self._known(attempts, at)
        if message is not None:
            return message
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            # Whoever waited before may have it, also one that an attempt has left.
            message = self._known(attempts, at)
            if message is None:
                message = await self._receive()
                is_left = at.attempt != attempts.number
                self._note(message, attempts, is_left=is_left)
                if is_left:
                    return GONE.copy()
                at.given, at.is_ended = len(self._bytes), self.is_complete
            return message

    def _known(self, attempts: Attempts, at: Position) -> Message | None:
        if self.is_gone or at.attempt != attempts.number:
            return GONE.copy()
        if at.is_ended or not (at.given < len(self._bytes) or self.is_complete):
            return None
        chunk = bytes(self._bytes[at.given :])
        at.given, at.is_ended = len(self._bytes), self.is_complete
        return {"type": "http.request", "body": chunk, "more_body": not at.is_ended}

    def _note(self, message: Message, attempts: Attempts, *, is_left: bool) -> None:
        if message["type"] != "http.request":
            self.is_gone = attempts.is_last = True
            return
        self.is_complete = not message.get("more_body", False)
        if is_left or not attempts.is_last or attempts.pause is not None:
            self._bytes += message.get("body", b"")
            attempts.is_last = attempts.is_last or len(self._bytes) > self._most
