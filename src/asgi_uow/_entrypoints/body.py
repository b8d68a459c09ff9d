"""The body of a request: kept while it is read, for a replay, or hashed for a key."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from typing import TYPE_CHECKING

import anyio

from asgi_uow.errors import KeyInUseError

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive

GONE: dict[str, str] = {"type": "http.disconnect"}


class Progress:
    """How far the attempts of one request are, or of one function."""

    number: int = 1
    is_gone: bool = False  # has the client closed its connection?
    is_last: bool = False  # whatever comes: something has left, or cannot be had again
    pause: float | None = None  # seconds before the next attempt, if there is to be one


class Position:
    """How far one attempt has read."""

    attempt: int
    given: int = 0
    is_ended: bool = False


class Body:
    """What the client has sent so far; each attempt reads it from the beginning."""

    is_complete = False
    _lock: asyncio.Lock | None = None  # for the server's receive(), of all attempts

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._bytes = bytearray()

    def reader(self, attempts: Progress) -> Receive:
        """Give what an attempt receives with."""
        at = Position()
        at.attempt = attempts.number
        return functools.partial(self._read, attempts, at)

    async def _read(self, attempts: Progress, at: Position) -> Message:
        message = self._known(attempts, at)
        if message is not None:
            return message
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            # Whoever waited before may have it, also one that an attempt has left.
            message = self._known(attempts, at)
            return message or self._take(await self._receive(), attempts, at)

    def _known(self, attempts: Progress, at: Position) -> Message | None:
        if attempts.is_gone or at.attempt != attempts.number:
            return GONE.copy()
        if at.is_ended or not (at.given < len(self._bytes) or self.is_complete):
            return None
        chunk = bytes(self._bytes[at.given :])
        at.given, at.is_ended = len(self._bytes), self.is_complete
        return {"type": "http.request", "body": chunk, "more_body": not at.is_ended}

    def _take(self, message: Message, attempts: Progress, at: Position) -> Message:
        is_left = at.attempt != attempts.number
        if message["type"] != "http.request":
            attempts.is_gone = attempts.is_last = True
        else:
            self.is_complete = not message.get("more_body", False)
            if is_left or not attempts.is_last or attempts.pause is not None:
                self._bytes += message.get("body", b"")
                attempts.is_last = attempts.is_last or len(self._bytes) > self._most
        if is_left:
            return GONE.copy()
        at.given, at.is_ended = len(self._bytes), self.is_complete
        return message


class HashedBody:
    """The body of a request: read ahead, hashed as it comes, never stored."""

    _is_ended = is_gone = False
    _size = 0

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: list[Message] = []
        self._hash = hashlib.sha256()

    async def fetch(self, least: int) -> None:
        """Read so many bytes; whoever is slow holds no connection then."""
        while self._size < least and not (self._is_ended or self.is_gone):
            self._ahead.append(await self._next())

    async def receive(self) -> Message:
        return self._ahead.pop(0) if self._ahead else await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        chunk = message.get("body", b"")
        self._hash.update(chunk)
        self._size += len(chunk)
        if message["type"] != "http.request":
            self.is_gone = True
        elif not message.get("more_body", False):
            self._is_ended = True
        return message

    @property
    def fingerprint(self) -> str:
        """What was read: how much, whether that was all, and its hash."""
        return f"{self._size} {self._is_ended:d} {self._hash.hexdigest()}"

    async def is_like(self, fingerprint: str, seconds: float) -> bool:
        """Tell whether the body is that of another request, as far as that was read.

        Raises `KeyInUseError` if so much does not come in time.
        """
        size, was_ended, hashed = fingerprint.split(" ")
        left, same = int(size), hashlib.sha256()
        with anyio.CancelScope(deadline=anyio.current_time() + seconds):
            while True:
                chunk = b"".join(each.get("body", b"") for each in self._ahead)
                same.update(chunk[:left])
                left -= len(chunk)
                has_enough = left < 0 or (left == 0 and was_ended == "0")
                if has_enough or self._is_ended or self.is_gone:
                    is_whole = was_ended == "0" or (left == 0 and self._is_ended)
                    return is_whole and same.hexdigest() == hashed
                self._ahead = [await self._next()]
        raise KeyInUseError
