"""P16: of all requests with one idempotency key one is kept, and answers them all.

Clients send the same key at once, from two event loops, so that they meet in the
process and in the database. Handlers fail and answers to COMMIT get lost, as a seed
says. Each client repeats its request until it has a final answer.

`ASGI_UOW_CLIENTS=50 ASGI_UOW_KEYS=200 pytest tests/promises/test_p16_exactly_once.py`
is the full size. What happened is counted in the properties of a report:
`--junitxml=report.xml -o junit_family=xunit1`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest
from anyio import to_thread

import asgi_uow as uow
from asgi_uow import Database, Idempotency, Outcome, UnitOfWorkMiddleware
from asgi_uow.observers import CommitFailed, UnitFinished
from tests.servers import ServerBackend, eventually
from tests.support import shop
from tests.support.asgi import BODY, START, Client, Handler, Response, endpoint
from tests.support.databases import (
    DRIVERS,
    SERVER_DRIVERS,
    behind_proxy,
    checked_out,
    is_commit,
    on,
)
from tests.support.keys import create_table, is_replayed
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import Backend, RecordingProxy
    from tests.servers.proxy import Rule

CLIENTS = int(os.environ.get("ASGI_UOW_CLIENTS", "8"))
KEYS = int(os.environ.get("ASGI_UOW_KEYS", "10"))
LOOPS = 2  # event loops, each with half of the clients
AT_ONCE = 5  # keys that a loop has in work
ATTEMPTS = 20  # of one client
COMMIT_TIMEOUT = 2.0  # what holds an answer back keeps it for longer
CLAIM = "INSERT INTO idempotency_keys"
HEADER = b"idempotency-key"
AGAIN = {409, 500, 503}

TABLE = "CREATE TABLE work (name VARCHAR(20) NOT NULL, run INTEGER NOT NULL)"
Answer = tuple[int, tuple[tuple[str, str], ...], str]


class Plan:
    """Which handlers fail the first time, and what befalls which COMMIT."""

    FAULTS: ClassVar = ("cut_before", "cut_after", "garble_answer", "hold_answer")
    """Methods of the proxy, in turn for half of the COMMITs."""
    FAILING: ClassVar = 0.3

    def __init__(self, seed: int) -> None:
        dice = random.Random(seed)
        self.keys = [f"key-{number}" for number in range(KEYS)]
        failing = dice.sample(self.keys, round(KEYS * self.FAILING))
        self.failures = dict(zip(failing, itertools.cycle(["raise", "409"])))
        # There are as many at least: each key has one.
        commits = sorted(dice.sample(range(1, KEYS + 1), KEYS // 2))
        self.faults = list(zip(commits, itertools.cycle(self.FAULTS)))


class Faults:
    """What befalls the COMMITs that pass a proxy; nothing without one."""

    def __init__(self) -> None:
        self._commits = 0
        self._rules: list[tuple[str, Rule]] = []

    def add(self, plan: Plan, proxy: RecordingProxy) -> None:
        proxy.cut_before(self._count)
        for number, fault in plan.faults:
            is_it = functools.partial(self._is_commit, number)
            self._rules.append((fault, getattr(proxy, fault)(is_it)))

    def _count(self, trip: str) -> bool:
        """Count a COMMIT; as the condition of a rule that never holds."""
        self._commits += is_commit(trip)
        return False

    def _is_commit(self, number: int, trip: str) -> bool:
        return is_commit(trip) and number == self._commits

    @property
    def waiting(self) -> list[str]:
        """The faults that have not happened."""
        return [name for name, rule in self._rules if not rule.fired.is_set()]

    @property
    def struck(self) -> Counter[str]:
        return Counter(name for name, rule in self._rules if rule.fired.is_set())


@asynccontextmanager
async def under_fire(
    backend: Backend, plan: Plan
) -> AsyncGenerator[tuple[str, Faults]]:
    """Give the URL of a database whose COMMITs meet the faults; SQLite has none."""
    faults = Faults()
    if isinstance(backend, ServerBackend):
        async with backend.proxy() as proxy:
            faults.add(plan, proxy)
            yield backend.through(proxy.port), faults
    else:
        yield backend.url, faults


class HandlerError(Exception):
    """What a handler raises after it has written."""


class Trial:
    """An application, its clients, and what they were told."""

    def __init__(self, plan: Plan, url: str) -> None:
        self.plan, self.url = plan, url
        self.runs: Counter[str] = Counter()
        self.numbers = itertools.count(1)
        self.hooks: Counter[str] = Counter()
        self.answers: dict[str, list[Response]] = {key: [] for key in plan.keys}
        self.attempts: Counter[int] = Counter()
        self.told: Counter[str] = Counter()
        self.events = Events()

    # The application

    async def serve(self, scope: Scope, _: Receive, send: Send) -> None:
        """Write one row, and fail the first time if the plan says so."""
        key = dict(scope["headers"])[HEADER].decode()
        self.runs[key] += 1
        failure = self.plan.failures.get(key) if self.runs[key] == 1 else None
        number = next(self.numbers)
        uow.after_commit(self.hooks.update, [key])
        await uow.current_session().execute(
            "INSERT INTO work (name, run) VALUES (:name, :run)", name=key, run=number
        )
        if failure == "raise":
            raise HandlerError(key)
        status = 201 if failure is None else int(failure)
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"location", f"/orders/{key}".encode()),
            (b"run", str(number).encode()),
        ]
        await send({"type": START, "status": status, "headers": headers})
        await send({"type": BODY, "body": f"{key} £ ".encode(), "more_body": True})
        await send({"type": BODY, "body": str(number).encode()})

    # The clients

    async def run(self, clients: int) -> None:
        """Have so many clients in this event loop ask with each key."""
        db = Database.from_url(self.url)
        app = UnitOfWorkMiddleware(
            self.serve,
            db,
            idempotency=Idempotency(),
            observers=[self.events],
            commit_timeout=COMMIT_TIMEOUT,
        )
        keys = iter(self.plan.keys)
        try:
            await asyncio.gather(
                *(self.use(keys, app, clients) for _ in range(AT_ONCE))
            )
            assert [0, 0] == checked_out(db)
        finally:
            await db.dispose()

    async def use(
        self, keys: Iterator[str], app: UnitOfWorkMiddleware, clients: int
    ) -> None:
        for key in keys:
            client = Client(app)
            asking = (self.client(client, key) for _ in range(clients))
            self.answers[key] += await asyncio.gather(*asking)

    async def client(self, client: Client, key: str) -> Response:
        """Ask until there is a final answer."""
        attempts, response = 1, await self.ask(client, key)
        while response.error is not None or response.status in AGAIN:
            assert attempts < ATTEMPTS
            attempts, response = attempts + 1, await self.ask(client, key)
        self.attempts[attempts] += 1
        return response

    async def ask(self, client: Client, key: str) -> Response:
        headers = [(b"host", b"server"), (HEADER, key.encode())]
        response = await client.request(
            "/work", method="POST", headers=headers, body=(key.encode(), b"1")
        )
        self.told[told(response)] += 1
        return response


def told(response: Response) -> str:
    """Name what a client was told."""
    if response.messages:
        return f"status {response.status}"
    return f"raised {type(response.error).__name__}"


def answer_of(response: Response) -> Answer:
    """Give what all clients of a key have to be given alike."""
    headers = response.headers
    headers.pop("idempotency-replayed", None)
    return response.status, tuple(headers.items()), "".join(response.chunks)


def answer(key: object, number: object) -> Answer:
    """The response of a run of the handler."""
    headers = {
        "content-type": "text/plain; charset=utf-8",
        "location": f"/orders/{key}",
        "run": f"{number}",
    }
    return 201, tuple(headers.items()), f"{key} £ {number}"


@on(*DRIVERS)
async def test_exactly_once(
    backend: Backend, record_property: Callable[[str, object], None]
) -> None:
    """The work of a key is kept once, and each client has the answer of that."""
    plan = Plan(seed=16)
    await create_table(backend)
    await backend.execute(TABLE)
    async with under_fire(backend, plan) as (url, faults):
        trial = Trial(plan, url)

        def run() -> None:
            asyncio.run(trial.run(CLIENTS // LOOPS))

        began = time.perf_counter()
        await asyncio.gather(*(to_thread.run_sync(run) for _ in range(LOOPS)))
        seconds = time.perf_counter() - began
        await eventually(0, backend.open_transactions)
        assert [] == faults.waiting

    kept = await backend.fetch("SELECT name, run FROM work")
    answers = {key: set(map(answer_of, trial.answers[key])) for key in plan.keys}
    assert dict.fromkeys(plan.keys, 1) == Counter(name for name, _ in kept)
    assert {name: {answer(name, run)} for name, run in kept} == answers
    assert {CLIENTS} == {len(each) for each in trial.answers.values()}
    assert dict.fromkeys(plan.keys, 1) == trial.hooks
    assert dict.fromkeys(plan.keys, 1) == Counter(
        key
        for key, responses in trial.answers.items()
        for each in responses
        if not is_replayed(each)
    )
    finished = trial.events.of(UnitFinished)
    assert [] == [each for each in finished if each.outcome is Outcome.UNKNOWN]
    figures = trial.told + faults.struck
    figures.update(type(each).__name__ for each in trial.events.of(CommitFailed))
    figures.update(
        {
            "requests": trial.told.total(),
            "most attempts of a client": max(trial.attempts),
            "runs of the handler": trial.runs.total(),
        }
    )
    for name, number in figures.items():
        record_property(name, number)
    record_property("seconds", seconds)


@on(*SERVER_DRIVERS)
@pytest.mark.parametrize(
    ("how", "statuses", "kept"),
    [("cut_before", [503, 201], [2]), ("cut_after", [201, 201], [1])],
    ids=["undone", "kept"],
)
async def test_key_that_another_waits_for(
    backend: ServerBackend, how: str, statuses: list[int], kept: list[int]
) -> None:
    """What another keeps after a lost COMMIT does not prove that this was kept."""
    claimed, goes_on = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        await shop.insert(1)
        claimed.set()
        await goes_on.wait()

    async def ask(db: Database, handler: Handler) -> Response:
        app = endpoint(handler, 201)
        ours = UnitOfWorkMiddleware(app, db, idempotency=Idempotency())
        return await Client(ours).request(method="POST", headers=[(HEADER, b"key")])

    async def ask_elsewhere() -> Response:
        db = Database.from_url(backend.through(proxy.port))
        try:
            return await ask(db, functools.partial(shop.insert, 2))
        finally:
            await db.dispose()

    async def waiting() -> int:
        claims = [trip for trip in proxy.trips if trip.startswith(CLAIM)]
        return await backend.running(claims[-1])

    async with behind_proxy(backend) as (db, proxy):
        await create_table(backend)
        one = asyncio.create_task(ask(db, first))
        await claimed.wait()
        other = asyncio.create_task(to_thread.run_sync(asyncio.run, ask_elsewhere()))
        await eventually(1, waiting)
        getattr(proxy, how)(is_commit)
        goes_on.set()
        responses = [await one, await other]
        assert statuses == [each.status for each in responses]
        assert kept == await shop.items(backend)


@on(*SERVER_DRIVERS)
async def test_settling_has_an_end(backend: ServerBackend) -> None:
    """A server that no longer answers who settles an outcome keeps no request."""
    async with behind_proxy(backend) as (db, proxy):
        await create_table(backend)
        proxy.cut_before(is_commit)
        hold = proxy.hold_answer(is_commit)  # of closing the connection aside
        app = UnitOfWorkMiddleware(
            endpoint(functools.partial(shop.insert, 1)),
            db,
            idempotency=Idempotency(),
            commit_timeout=COMMIT_TIMEOUT,
        )
        client = Client(app).request(method="POST", headers=[(HEADER, b"key")])
        asking = asyncio.create_task(client)
        done, _ = await asyncio.wait({asking}, timeout=5 * COMMIT_TIMEOUT)
        hold.release()
        response = await asking
        assert done
        assert 503 == response.status
