"""A TCP proxy that counts round trips and cuts or holds chosen ones."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from tests.servers.process import HOST, POLL_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

Chunk = tuple[bytes, str | None]

_MYSQL_QUIT = 0x01
_MYSQL_COMMANDS = {
    0x02: "INIT_DB ",
    0x03: "",
    0x0E: "PING",
    0x16: "PREPARE ",
    0x1F: "RESET_CONNECTION",
}
_POSTGRESQL_STARTUP = 3  # the protocol's major version; other codes ask for TLS


@dataclass(eq=False)
class Rule:
    """What happens once, to the next round trip that fits; then `fired` is set."""

    action: Literal["cut_before", "cut_after", "garble", "hold", "refuse"]
    predicate: Callable[[str], bool]
    fired: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Hold(Rule):
    """An answer of the server that is kept back until `release()`.

    `fired` is set when the client has asked, `answered` when the server has
    done what it was asked for.
    """

    answered: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        self.released.set()


@dataclass(eq=False)
class Refusal(Rule):
    """An error that another server would give, in place of the answer of this one.

    The server executes `instead`, which has to be answered with one message: it leaves
    the transaction as that other server would.
    """

    instead: bytes = b""
    error: Callable[[bytes], bytes] = bytes
    answer: bytes = b""

    def replace(self, data: bytes) -> bytes:
        """Give the error once the answer to `instead` is there, nothing before."""
        self.answer += data
        return self.error(self.answer)


class RecordingProxy:
    """Forwards to a server on this machine, knows its protocol, speaks no TLS.

    A round trip is what a client sends and waits for: a command packet on
    MySQL; a simple Query, a Sync or a Flush on PostgreSQL. Its name is its SQL
    without a final semicolon, "PREPARE ..." if PostgreSQL shall only parse it,
    "PING" and the like for MySQL's other commands. Handshakes and goodbyes are
    no trips; `connections` counts the accepted ones.
    """

    def __init__(self, kind: str, server_port: int, *, delay_ms: float = 0) -> None:
        self.trips: list[str] = []
        self.connections = 0
        self.delay_ms = delay_ms
        self.port = 0
        self._chunks = {"mariadb": mysql_chunks, "postgresql": postgresql_chunks}[kind]
        self._garbles = {"mariadb": 3, "postgresql": 0}[kind]  # sequence number, type
        refusals = {"mariadb": mysql_refusal, "postgresql": postgresql_refusal}
        self._refusal = refusals[kind]
        self._server_port = server_port
        self._rules: list[Rule] = []
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self.audible, self.honest = asyncio.Event(), asyncio.Event()
        self.thaw()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._listener.close()
        self.thaw()
        while self._tasks:  # again, for a client that was just coming in
            self.cut()
            await asyncio.wait(self._tasks, timeout=POLL_SECONDS)
        await self._listener.wait_closed()

    def clear(self) -> None:
        """Forget the trips recorded so far."""
        self.trips.clear()

    def cut(self) -> None:
        """Cut every connection now."""
        for link in self._links:
            link.cut()

    def freeze(self) -> None:
        """Forward nothing any more, in no direction, also for new clients.

        To them it is a server that was stopped: it accepts, and says nothing.
        """
        self.audible.clear()

    def hide_ends(self) -> None:
        """Do not tell clients that the server has hung up."""
        self.honest.clear()

    def thaw(self) -> None:
        self.audible.set()
        self.honest.set()

    def cut_before(self, predicate: Callable[[str], bool]) -> Rule:
        """Cut instead of forwarding the next trip that fits."""
        return self._add(Rule("cut_before", predicate))

    def cut_after(self, predicate: Callable[[str], bool]) -> Rule:
        """Forward the next trip that fits, cut when the server has answered.

        The server has done what it was asked for, the client cannot know.
        """
        return self._add(Rule("cut_after", predicate))

    def garble_answer(self, predicate: Callable[[str], bool]) -> Rule:
        """Forward the next trip that fits, make its answer one that nobody can read.

        On MySQL it is a packet out of order, on PostgreSQL a message of no known type.
        """
        return self._add(Rule("garble", predicate))

    def hold_answer(self, predicate: Callable[[str], bool]) -> Hold:
        """Forward the next trip that fits, keep the answer back."""
        hold = Hold("hold", predicate)
        self._add(hold)
        return hold

    def refuse(
        self,
        predicate: Callable[[str], bool],
        code: str,
        message: str,
        *,
        instead: str,
    ) -> Rule:
        """Have the server execute `instead` of the next trip that fits, and answer
        with an error; `code` is a SQLSTATE, after MySQL's number and a space there.
        """
        return self._add(
            Refusal("refuse", predicate, **self._refusal(code, message, instead))
        )

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule

    def note(self, trip: str) -> Rule | None:
        """Record a trip, return the rule it meets."""
        self.trips.append(trip)
        for rule in self._rules:
            if rule.predicate(trip):
                self._rules.remove(rule)
                return rule
        return None

    def garbled(self, data: bytes) -> bytes:
        at = self._garbles
        return data[:at] + bytes([data[at] ^ 0x1F]) + data[at + 1 :]

    async def pause(self) -> None:
        await self.audible.wait()
        await asyncio.sleep(self.delay_ms / 1000)

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream = await asyncio.open_connection(HOST, self._server_port)
        except OSError:  # the server is down: so is this connection
            writer.transport.abort()
        else:
            link = _Link(self, (reader, writer), upstream)
            self._links.add(link)
            await link.run(self._chunks(reader))
            self._links.remove(link)
        finally:
            self._tasks.remove(task)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One client's connection and its connection to the server."""

    def __init__(self, proxy: RecordingProxy, client: Stream, server: Stream) -> None:
        self._proxy = proxy
        self._client = client[1]
        self._server_reader, self._server = server
        self._pending: Rule | None = None
        self._has_trips = False
        self._holds: list[Hold] = []

    async def run(self, chunks: AsyncIterator[Chunk]) -> None:
        await asyncio.gather(self._upward(chunks), self._downward())

    def cut(self) -> None:
        self._let_go()
        self._client.transport.abort()
        self._server.transport.abort()

    async def _upward(self, chunks: AsyncIterator[Chunk]) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async for data, trip in chunks:
                rule = None if trip is None else self._proxy.note(trip)
                self._has_trips |= trip is not None
                if rule is not None and rule.action == "cut_before":
                    self.cut()
                    rule.fired.set()
                    break
                self._pending = rule
                if isinstance(rule, Hold):
                    self._holds.append(rule)
                sent = rule.instead if isinstance(rule, Refusal) else data
                await self._proxy.pause()
                self._server.write(sent)
                await self._server.drain()
                if isinstance(rule, Hold):
                    rule.fired.set()
        self._hang_up()

    async def _downward(self) -> None:
        with suppress(ConnectionError):
            while data := await self._server_reader.read(65536):
                rule = self._pending
                if isinstance(rule, Hold):
                    rule.answered.set()
                    await rule.released.wait()
                elif rule is not None and rule.action == "garble":
                    data = self._proxy.garbled(data)
                    rule.fired.set()
                elif isinstance(rule, Refusal):
                    data = rule.replace(data)
                    rule.fired.set()
                elif rule is not None:
                    self.cut()
                    rule.fired.set()
                    break
                self._pending = None if data else rule
                await self._proxy.pause()
                self._client.write(data)
                await self._client.drain()
        if self._has_trips:  # not who asked to cancel a statement, and waits for this
            await self._proxy.honest.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        """Close after sending what is still to be sent."""
        self._let_go()
        self._client.close()
        self._server.close()

    def _let_go(self) -> None:
        for hold in self._holds:
            hold.release()


async def mysql_chunks(reader: asyncio.StreamReader) -> AsyncIterator[Chunk]:
    """Packets: length (3 bytes), sequence number, payload.

    A command has number 0; logging in and long commands go on from 1.
    """
    while True:
        head = await reader.readexactly(4)
        body = await reader.readexactly(int.from_bytes(head[:3], "little"))
        is_trip = head[3] == 0 and body[0] != _MYSQL_QUIT
        yield head + body, _mysql_name(body) if is_trip else None


def _mysql_name(body: bytes) -> str:
    name = _MYSQL_COMMANDS.get(body[0])
    return f"COM_{body[0]}" if name is None else name + name_of(body[1:])


async def postgresql_chunks(reader: asyncio.StreamReader) -> AsyncIterator[Chunk]:
    """Messages: type (1 byte, absent before the startup), length, payload."""
    version = 0
    while version != _POSTGRESQL_STARTUP:
        head = await reader.readexactly(4)
        body = await reader.readexactly(int.from_bytes(head) - 4)
        version = int.from_bytes(body[:2])
        yield head + body, None
    statements: dict[bytes, str] = {}
    batch, parsed, bound = b"", list[str](), list[str]()
    while True:
        head = await reader.readexactly(5)
        body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
        batch += head + body
        match head[:1]:
            case b"P":  # Parse: name, SQL, types
                name, sql, _ = body.split(b"\0", 2)
                statements[name] = name_of(sql)
                parsed.append(f"PREPARE {statements[name]}")
            case b"B":  # Bind: portal, name, values
                _, name, _ = body.split(b"\0", 2)
                bound.append(statements[name])
            case b"D" | b"E" | b"C":  # Describe, Execute, Close: wait for Sync
                pass
            case b"Q":
                yield batch, name_of(body)
                batch = b""
            case b"S" | b"H":  # Sync, Flush
                # A Flush of nothing is not answered.
                idle = "SYNC" if head[:1] == b"S" else None
                yield batch, "; ".join(bound or parsed) or idle
                batch, parsed, bound = b"", [], []
            case _:  # passwords, copied data, goodbye
                yield batch, None
                batch = b""


def name_of(text: bytes) -> str:
    return text.decode(errors="replace").strip("\0 \n;")


def mysql_refusal(code: str, message: str, instead: str) -> dict[str, Any]:
    """An error packet: 0xff, the number (2 bytes), "#" and the SQLSTATE, the text."""
    number, _, state = code.partition(" ")
    text = f"#{state or 'HY000'}{message}".encode()
    packet = b"\xff" + int(number).to_bytes(2, "little") + text

    def framed(body: bytes, sequence: int) -> bytes:
        return len(body).to_bytes(3, "little") + bytes([sequence]) + body

    def error(answer: bytes) -> bytes:
        is_whole = len(answer) >= 4 + int.from_bytes(answer[:3], "little")
        return framed(packet, 1) if is_whole else b""

    return {"instead": framed(b"\x03" + instead.encode(), 0), "error": error}


def postgresql_refusal(code: str, message: str, instead: str) -> dict[str, Any]:
    """ErrorResponse, and ReadyForQuery with the state that `instead` has led to."""
    fields = f"SERROR\0VERROR\0C{code}\0M{message}\0\0".encode()

    def framed(kind: bytes, body: bytes) -> bytes:
        return kind + (len(body) + 4).to_bytes(4) + body

    def error(answer: bytes) -> bytes:
        ready = answer[-6:] if answer[-6:-1] == b"Z\0\0\0\x05" else b""
        return framed(b"E", fields) + ready if ready else b""

    return {"instead": framed(b"Q", instead.encode() + b"\0"), "error": error}
