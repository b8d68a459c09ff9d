"""The facts, each stated once."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from websockets.asyncio.client import connect

from tests.integration.asgi_servers.case import FACTS, ending_fact, fact
from tests.integration.asgi_servers.child import Answer, Gate, get
from tests.servers import eventually
from tests.servers.process import HOST
from tests.support import shop

if TYPE_CHECKING:
    from tests.integration.asgi_servers.child import Child

__all__ = ["FACTS"]


@fact
async def committed_first(child: Child) -> None:
    """The row is there when the status line reaches the client."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/streams/{number}?port={gate.port}"))
        assert 200 == await client.read_status()
        assert await child.kept(number)
        await (await gate.reached()).let_go()
        await client.read_to_end()


@fact
async def failed_commit(child: Child) -> None:
    """A failed COMMIT is one complete 500, a problem in JSON; nothing is kept."""
    number = next(child.numbers)
    received = await child.ask(f"/items/{number}?broken")
    assert 1 == received.count("HTTP/1.1 ")
    answer = Answer.parse(received)
    assert 500 == answer.status
    assert "application/problem+json" == answer.headers["content-type"]
    assert 500 == json.loads(answer.text)["status"]
    assert not await child.kept(number)
    assert "rolled back" == await child.told(number)
    await child.check_no_leak()


@fact
async def streamed(child: Child) -> None:
    """A streamed response arrives as a whole, and reads what was committed."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/streams/{number}?port={gate.port}"))
        await (await gate.reached()).let_go()
        answer = Answer.parse(await client.read_to_end())
    assert (200, "kept: 1.") == (answer.status, answer.text)
    await child.check_no_leak()


@fact
async def left_in_handler(child: Child) -> None:
    """A client that leaves stops no handler: its work is committed."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/items/{number}?hold={gate.port}"))
        held = await gate.reached()
        await client.leave()
        await held.let_go()
    await eventually("committed", lambda: child.told(number))
    assert await child.kept(number)
    await child.check_no_leak()


@fact
async def left_and_cancelled(child: Child) -> None:
    """A handler that is cancelled since the client has left is rolled back."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/items/{number}?hold={gate.port}"))
        held = await gate.reached()
        await client.leave()
        await held.left()
    await eventually("rolled back", lambda: child.told(number))
    assert not await child.kept(number)
    await child.check_no_leak()


@fact
async def left_in_commit(child: Child) -> None:
    """A client that leaves during COMMIT, or a cancellation, does not stop it."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/items/{number}?hold_commit={gate.port}"))
        held = await gate.reached()
        await client.leave()
        await eventually(int(child.server.cancels), lambda: child.state("cancelling"))
        assert not await child.kept(number)
        await held.let_go()
    await eventually("committed", lambda: child.told(number))
    assert await child.kept(number)
    await child.check_no_leak()


@fact
async def left_in_stream(child: Child) -> None:
    """A client that leaves during a stream undoes nothing and leaves nothing open."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/streams/{number}?port={gate.port}"))
        assert 200 == await client.read_status()
        held = await gate.reached()
        assert 0 == await child.state("checked_out")
        await client.leave()
        await held.left()
    await child.check_no_leak()
    assert await child.kept(number)


@fact
async def idle_streams(child: Child) -> None:
    """Streams that have read and wait hold no connection, however many they are."""
    numbers = [next(child.numbers) for _ in range(20)]  # more than the pools have
    async with Gate() as gate:
        paths = [f"/streams/{number}?port={gate.port}" for number in numbers]
        clients = [await child.send(get(path)) for path in paths]
        held = [await gate.reached() for _ in clients]
        assert 0 == await child.state("checked_out")
        for each in held:
            await each.let_go()
        answers = [Answer.parse(await each.read_to_end()) for each in clients]
    assert ["kept: 1."] * len(clients) == [each.text for each in answers]
    await child.check_no_leak()


@ending_fact
async def terminated_and_finished(child: Child) -> None:
    """After SIGTERM a request in flight is finished, the engines are closed."""
    number = next(child.numbers)
    log = child.backend.path.with_name(f"{child.backend.path.name}-wal")
    async with Gate() as gate:
        client = await child.send(get(f"/items/{number}?hold={gate.port}"))
        held = await gate.reached()
        assert log.exists()
        child.terminate()
        await held.let_go()
        answer = Answer.parse(await client.read_to_end())
    assert await child.end() in child.server.exit_codes
    assert not log.exists()  # SQLite removes it when the last connection is closed
    assert 200 == answer.status
    assert await child.kept(number)


@ending_fact
async def terminated_and_cut(child: Child) -> None:
    """After SIGTERM a request that does not end is cut off, nothing of it is kept."""
    number = next(child.numbers)
    async with Gate() as gate:
        client = await child.send(get(f"/items/{number}?hold={gate.port}"))
        held = await gate.reached()
        child.terminate()
        await held.left()
        assert "HTTP/1.1 200" not in await client.read_to_end()
        assert await child.end() in child.server.exit_codes
    assert not await child.kept(number)
    assert 0 == await child.backend.open_transactions()


@fact
async def pipelined(child: Child) -> None:
    """Two pipelined requests have a unit and a fate each."""
    first, second = next(child.numbers), next(child.numbers)
    client = await child.send(
        get(f"/items/{first}?status=409", close=False), get(f"/items/{second}")
    )
    received = await client.read_to_end()
    statuses = [part[:3] for part in received.split("HTTP/1.1 ")[1:]]
    assert ["409", "200"] == statuses
    assert 2 == received.count("true")
    assert not await child.kept(first)
    assert await child.kept(second)


@fact
async def kept_alive(child: Child) -> None:
    """What fails on a connection does not touch the connection's next request."""
    numbers = [next(child.numbers) for _ in range(4)]
    queries = ["?status=409", "", "?status=500", ""]
    async with child.client as client:
        answers = [
            await client.get(f"/items/{number}{query}")
            for number, query in zip(numbers, queries, strict=True)
        ]
    assert [409, 200, 500, 200] == [each.status_code for each in answers]
    assert [True] * 4 == [each.json() for each in answers]
    assert [False, True, False, True] == [await child.kept(each) for each in numbers]


@fact
async def websocket(child: Child) -> None:
    """A websocket has no unit; each message opens one, and is kept when answered."""
    async with connect(f"ws://{HOST}:{child.port}/feed") as feed:
        for _ in range(2):
            number = next(child.numbers)
            await feed.send(str(number))
            assert "NoUnitOfWorkError" == await feed.recv()
            assert await child.kept(number)


@fact
async def load(child: Child) -> None:
    """Of 100 requests by 10 clients each that succeeds has its row, and no other."""
    numbers = [next(child.numbers) for _ in range(100)]

    async def run(share: list[int]) -> list[int]:
        queries = ["?broken" * (number % 5 == 0) for number in share]
        paths = [f"/items/{n}{query}" for n, query in zip(share, queries, strict=True)]
        return [(await child.get(path)).status_code for path in paths]

    shares = [numbers[start::10] for start in range(10)]
    answers = await asyncio.gather(*map(run, shares))
    succeeded = {
        number
        for share, several in zip(shares, answers, strict=True)
        for number, status in zip(share, several, strict=True)
        if status == 200
    }
    assert {number for number in numbers if number % 5} == succeeded
    assert succeeded == set(numbers).intersection(await shop.items(child.backend))
    await child.check_no_leak()
