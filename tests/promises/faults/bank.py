"""A bank under fire: twenty clients transfer money while everything dies around them.

Every decision comes from a seed; moments are counted in round trips to the server, so
that they mean the same on a slow machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

import asgi_uow as uow
from asgi_uow import Database
from asgi_uow.errors import AsgiUowError, OutcomeUnknownError
from tests.promises.faults.mortal import checked_out
from tests.servers import eventually
from tests.support.asgi import START, http_scope, no_body, respond

if TYPE_CHECKING:
    from asgi_uow._asgi import Message, Receive, Scope, Send
    from asgi_uow.observers import Event
    from tests.promises.faults.mortal import Mortal
    from tests.servers import RecordingProxy

ACCOUNTS = range(8)
BALANCE = 50
TOTAL = BALANCE * len(ACCOUNTS)
CLIENTS = 20
RUN_SECONDS = 60.0
NEVER = 10**9
COMMIT_TIMEOUT = 5.0
DELAY = 15  # round trips of others for which the answer to a COMMIT is late
# When asyncpg asks for TLS and the server dies, a future of its own is left with an
# error that nobody retrieves, and asyncio reports it.
CONNECT_ARGS = {"asyncpg": {"ssl": False}}

TABLES = (
    """
    CREATE TABLE accounts (
        id INTEGER PRIMARY KEY, balance INTEGER NOT NULL CHECK (balance >= 0)
    )
    """,
    """
    CREATE TABLE transfers (
        id VARCHAR(20) PRIMARY KEY,
        source INTEGER NOT NULL, target INTEGER NOT NULL, amount INTEGER NOT NULL
    )
    """,
    "INSERT INTO accounts (id, balance) VALUES "
    + ", ".join(f"({account}, {BALANCE})" for account in ACCOUNTS),
)
PROCEDURES = {
    "mariadb": (
        "CREATE PROCEDURE ends_with_commit() COMMIT",
        "CREATE PROCEDURE ends_with_rollback() ROLLBACK",
    ),
    # It lets no procedure end the transaction of who calls it.
    "postgresql": (),
}

Row = tuple[object, ...]


# What is planned


@dataclasses.dataclass(frozen=True)
class Order:
    """A request to be made, and what its client will do."""

    id: str
    source: int
    target: int
    amount: int
    is_audit: bool = False
    """Only reads: the sum of all balances."""
    is_careless: bool = False
    """The handler ignores the errors of statements and answers 200."""
    patience: int = NEVER
    """Round trips, of anybody, after which the request is cancelled."""
    in_scope: bool = False
    """Cancelled through an anyio scope, not as a task."""
    leaves_statement: bool = False
    """The handler answers while a task of its own still reads on the connection."""
    ends_with: str = ""
    """COMMIT or ROLLBACK, of which the handler does not tell the unit of work."""


class Plan:
    """What clients do and what befalls them, decided by the seed alone."""

    FAULTS: ClassVar = {
        "kill_connections": 3,
        "cut_connections": 3,
        "cut_before_commit": 4,
        "cut_after_commit": 4,
        "garble_commit": 4,
        "delay_commit": 3,
        "crash": 2,
        "crash_during_commit": 2,
        "restart": 1,
    }
    """The names of methods of `Bank`, and how often each is drawn."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.clients = [
            [self._order(f"{client}-{n}") for n in range(self._dice.randint(1, 3))]
            for client in range(CLIENTS)
        ]
        moments = self._dice.sample(range(5, 180), self._dice.randint(3, 6))
        faults = self._dice.choices(
            list(self.FAULTS), list(self.FAULTS.values()), k=len(moments)
        )
        self.faults = list(zip(sorted(moments), faults, strict=True))
        self.resolves = self._dice.random() < 0.5
        """Whether unknown outcomes are settled where the database can."""

    def _order(self, name: str) -> Order:
        dice = self._dice
        source, target = dice.sample(ACCOUNTS, 2)
        return Order(
            name,
            source,
            target,
            amount=dice.randint(1, 30),
            is_audit=dice.random() < 0.1,
            is_careless=dice.random() < 0.3,
            patience=dice.choice([NEVER, NEVER, dice.randrange(100)]),
            in_scope=dice.random() < 0.5,
            leaves_statement=dice.random() < 0.15,
            ends_with=dice.choice([*10 * [""], "COMMIT", "ROLLBACK"]),
        )


class Clock:
    """Counts the round trips that pass the proxy."""

    def __init__(self) -> None:
        self.now = 0
        self.over = asyncio.Event()
        self._alarms: list[tuple[int, asyncio.Event]] = []

    def tick(self, _: str) -> bool:
        """Count a trip; as the condition of a rule that never holds."""
        self.now += 1
        for moment, alarm in self._alarms:
            if moment <= self.now:
                alarm.set()
        return False

    def alarm(self, moment: int) -> asyncio.Event:
        """Return what is set when the moment has come."""
        alarm = asyncio.Event()
        self._alarms.append((moment, alarm))
        return alarm


async def first(*events: asyncio.Event) -> None:
    """Wait for one of the events."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


# What happened


@dataclasses.dataclass
class Attempt:
    """What became of an order, seen from outside and by the unit of work."""

    order: Order
    hooks: list[str] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    unit: uow.UnitOfWork | None = None
    error: BaseException | None = None
    is_cancelled: bool = False
    total: object = None

    @property
    def status(self) -> int | None:
        """The status the server was given; None if none was."""
        starts = [each["status"] for each in self.messages if each["type"] == START]
        return starts[0] if starts else None

    @property
    def outcome(self) -> uow.Outcome | None:
        return None if self.unit is None else self.unit.outcome

    async def note(self, hook: str) -> None:
        self.hooks.append(hook)

    async def send(self, message: Message) -> None:
        self.messages.append(message)


def lies(attempt: Attempt, *, is_kept: bool) -> list[str]:
    """Tell in which ways what was said about a transfer is not so."""
    outcome, status = attempt.outcome, attempt.status
    said = {
        "a success that was not kept": status == 200 and not is_kept,
        "a success that is not known to be one": (
            status == 200 and outcome is not uow.Outcome.COMMITTED
        ),
        "after_commit for what was not kept": (
            "after_commit" in attempt.hooks and not is_kept
        ),
        "after_rollback for what was kept": (
            "after_rollback" in attempt.hooks and is_kept
        ),
        "COMMITTED, but not kept": outcome is uow.Outcome.COMMITTED and not is_kept,
        "not COMMITTED nor UNKNOWN, but kept": (
            outcome not in {uow.Outcome.COMMITTED, uow.Outcome.UNKNOWN} and is_kept
        ),
        "COMMITTED, but neither a success nor cancelled": (
            outcome is uow.Outcome.COMMITTED
            and not (status == 200 or attempt.is_cancelled)
        ),
        "UNKNOWN, but neither a plain 500 nor cancelled": (
            outcome is uow.Outcome.UNKNOWN
            and not (isinstance(attempt.error, OutcomeUnknownError) and status == 500)
            # What left the handler; the server answers it, with a plain 500.
            and not (attempt.error is not None and status is None)
            and not attempt.is_cancelled
        ),
        "503 for what may be kept": (
            status == 503 and outcome is not uow.Outcome.ROLLED_BACK
        ),
        "a unit of work without an outcome": (
            attempt.unit is not None and outcome is None
        ),
        "not the hooks of the outcome": attempt.hooks != hooks_of(outcome),
    }
    return [f"{attempt.order.id}: {lie}" for lie, told in said.items() if told]


def hooks_of(outcome: uow.Outcome | None) -> list[str]:
    """The hooks that run for an outcome, each once."""
    hooks = {
        uow.Outcome.COMMITTED: ["after_commit"],
        uow.Outcome.ROLLED_BACK: ["after_rollback"],
    }
    return [] if outcome is None else hooks.get(outcome, [])


# The run


class Bank:
    """One run: an application, its clients, and the faults."""

    def __init__(self, mortal: Mortal, proxy: RecordingProxy, plan: Plan) -> None:
        self.mortal = mortal
        self.proxy = proxy
        self.plan = plan
        self.clock = Clock()
        self.up = asyncio.Event()
        self.up.set()
        self.attempts: list[Attempt] = []
        self.struck: list[str] = []
        self.events: list[Event] = []
        self.left: list[asyncio.Task[None]] = []
        proxy.cut_before(self.clock.tick)  # never cuts, sees every trip
        self.db = Database.from_url(
            mortal.backend.through(proxy.port),
            **mortal.backend.options,
            pool_size=8,
            max_overflow=4,
            connect_args=CONNECT_ARGS.get(mortal.backend.driver, {}),
            resolve_unknown=plan.resolves and mortal.server.name == "postgresql",
        )
        self.app = self.make_app()

    # The application

    def make_app(self, **options: Any) -> uow.UnitOfWorkMiddleware:
        return uow.UnitOfWorkMiddleware(
            self.serve,
            self.db,
            observers=[self.events.append],
            # A late answer may find nobody whose round trips would end the wait.
            commit_timeout=COMMIT_TIMEOUT,
            **options,
        )

    async def serve(self, scope: Scope, _: Receive, send: Send) -> None:
        attempt: Attempt = scope["attempt"]
        attempt.unit = uow.current_unit_of_work()
        uow.after_commit(attempt.note, "after_commit")
        uow.after_rollback(attempt.note, "after_rollback")
        serve = self.audit if attempt.order.is_audit else self.transfer
        await respond(send, await serve(attempt))

    async def audit(self, attempt: Attempt) -> int:
        attempt.total = await uow.current_read_session().scalar(
            "SELECT sum(balance) FROM accounts"
        )
        return 200

    async def transfer(self, attempt: Attempt) -> int:
        order, status = attempt.order, 200
        await uow.current_session().execute(
            "INSERT INTO transfers (id, source, target, amount)"
            " VALUES (:id, :source, :target, :amount)",
            id=order.id,
            source=order.source,
            target=order.target,
            amount=order.amount,
        )
        ignored = (SQLAlchemyError, OSError) if order.is_careless else ()
        with suppress(*ignored):
            status = await self.move(order)
            if order.ends_with and status == 200:  # all of it, or nothing
                await self.end(order.ends_with)
            elif order.leaves_statement:
                await self.leave_statement()
        return status

    async def end(self, how: str) -> None:
        """End the transaction where no statement of SQLAlchemy's says so."""
        if self.mortal.server.name == "mariadb":
            await uow.current_session().execute(f"CALL ends_with_{how.lower()}()")
        else:
            connection = await uow.current_session().connection()
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.execute(how)

    async def leave_statement(self) -> None:
        """Have a statement on its way that passes by the session."""
        connection = await uow.current_session().connection()
        sent = asyncio.Event()

        async def read() -> None:
            sent.set()
            # asyncpg gets None for what was in flight when it was closed, and takes it
            # for a statement that it has prepared, or for rows that it has fetched.
            forgets = self.mortal.backend.driver == "asyncpg"
            own = (AttributeError, TypeError) * forgets
            with suppress(SQLAlchemyError, OSError, AsgiUowError, *own):
                await connection.execute(text("SELECT sum(amount) FROM transfers"))

        self.left.append(asyncio.create_task(read()))
        await sent.wait()

    async def move(self, order: Order) -> int:
        session = uow.current_session()
        balances = await session.scalars(
            "SELECT balance FROM accounts WHERE id = :id FOR UPDATE", id=order.source
        )
        if balances.one() < order.amount:
            return 409
        for account, amount in (
            (order.source, -order.amount),
            (order.target, order.amount),
        ):
            await session.execute(
                "UPDATE accounts SET balance = balance + :amount WHERE id = :id",
                id=account,
                amount=amount,
            )
        return 200

    # The clients

    async def run(self) -> None:
        """Have the plan carried out."""
        with anyio.fail_after(RUN_SECONDS):
            faults = asyncio.create_task(self.strike())
            try:
                await asyncio.gather(*map(self.client, self.plan.clients))
                # No task hangs, whatever became of its connection.
                await asyncio.gather(*self.left)
            finally:
                self.clock.over.set()
                await faults

    async def client(self, orders: list[Order]) -> None:
        for order in orders:
            attempt = await self.submit(order)
            if attempt.status == 503:
                await self.up.wait()

    async def submit(self, order: Order) -> Attempt:
        """Make the request, and cancel it when the patience is at its end."""
        attempt = Attempt(order)
        self.attempts.append(attempt)
        scope = anyio.CancelScope()

        async def call() -> None:
            with scope:
                try:
                    await self.call(attempt)
                except Exception as error:  # noqa: BLE001  # what the server would log
                    attempt.error = error

        task = asyncio.create_task(call())
        alarm = self.clock.alarm(self.clock.now + order.patience)
        patience = asyncio.create_task(alarm.wait())
        await asyncio.wait((task, patience), return_when=asyncio.FIRST_COMPLETED)
        patience.cancel()
        attempt.is_cancelled = not task.done()
        cancel = scope.cancel if order.in_scope else task.cancel
        cancel()
        await asyncio.wait((task,))
        return attempt

    async def call(self, attempt: Attempt) -> None:
        await self.app(http_scope(attempt=attempt), no_body, attempt.send)

    # The faults

    async def strike(self) -> None:
        """Have one fault after the other happen, each when its moment has come."""
        for moment, fault in self.plan.faults:
            alarm = self.clock.alarm(moment)
            await first(alarm, self.clock.over)
            if alarm.is_set():
                await getattr(self, fault)()
                self.struck.append(fault)

    def is_commit(self, trip: str) -> bool:
        return trip == "COMMIT" and not self.clock.over.is_set()

    async def kill_connections(self) -> None:
        await self.mortal.backend.kill_connections()

    async def cut_connections(self) -> None:
        self.proxy.cut()

    async def cut_before_commit(self) -> None:
        self.proxy.cut_before(self.is_commit)

    async def cut_after_commit(self) -> None:
        self.proxy.cut_after(self.is_commit)

    async def garble_commit(self) -> None:
        self.proxy.garble_answer(self.is_commit)

    async def delay_commit(self) -> None:
        """Hold the answer back until others have asked for something."""
        hold = self.proxy.hold_answer(self.is_commit)
        await first(hold.answered, self.clock.over)
        # Of a COMMIT of the handler's own, when all others have gone, nobody else will.
        with anyio.move_on_after(COMMIT_TIMEOUT):
            await first(self.clock.alarm(self.clock.now + DELAY), self.clock.over)
        hold.release()

    async def crash(self) -> None:
        self.up.clear()
        await self.mortal.crash()
        self.up.set()

    async def crash_during_commit(self) -> None:
        """Kill the server when it has committed, before anybody hears of it."""
        hold = self.proxy.hold_answer(self.is_commit)
        await first(hold.answered, self.clock.over)
        self.up.clear()
        await self.mortal.kill()
        self.proxy.cut()
        await self.mortal.start()
        self.up.set()

    async def restart(self) -> None:
        self.up.clear()
        await self.mortal.restart()
        self.up.set()

    # The books

    async def check(self) -> None:
        """Compare what was said with what the database holds."""
        backend = self.mortal.backend
        assert 0 == checked_out(self.db)
        await eventually(0, backend.open_transactions)
        rows = await backend.fetch("SELECT id, source, target, amount FROM transfers")
        balances = await backend.fetch("SELECT id, balance FROM accounts ORDER BY id")
        kept = {row[0] for row in rows}
        transfers = [each for each in self.attempts if not each.order.is_audit]

        assert all(task.done() for task in self.left)
        assert balances == balances_after(rows)
        assert kept <= {each.order.id for each in transfers}
        assert [] == [
            lie
            for attempt in transfers
            for lie in lies(attempt, is_kept=attempt.order.id in kept)
        ]
        audits = [each for each in self.attempts if each.order.is_audit]
        assert {each.total for each in audits if each.status == 200} <= {TOTAL}

    async def goes_on(self) -> None:
        """Transfer once more: no restart of the application is needed."""
        # PgBouncer 1.18 may end by itself when clients go away, whoever these are.
        self.struck += await self.mortal.start()
        accounts = itertools.cycle(ACCOUNTS)

        async def succeeds() -> bool:
            name = f"afterwards-{len(self.attempts)}"
            order = Order(name, next(accounts), next(accounts), amount=0)
            return (await self.submit(order)).status == 200

        for _ in ACCOUNTS:
            await eventually(True, succeeds)

    async def figures(self) -> Counter[str]:
        """Count what happened, for a report."""
        rows = await self.mortal.backend.fetch("SELECT id FROM transfers")
        kept = {row[0] for row in rows}
        count = Counter({"runs": 1, "requests": len(self.attempts)})
        count.update(self.struck)
        for attempt in self.attempts:
            count[f"status {attempt.status}"] += 1
            count[f"outcome {attempt.outcome and attempt.outcome.name}"] += 1
            count["cancelled"] += attempt.is_cancelled
            count["false successes"] += attempt.status == 200 and (
                not attempt.order.is_audit and attempt.order.id not in kept
            )
            count["false rollbacks"] += (
                attempt.outcome is uow.Outcome.ROLLED_BACK and attempt.order.id in kept
            )
            count[f"ended by {attempt.order.ends_with or 'the unit'}"] += 1
            count["statements left in flight"] += attempt.order.leaves_statement
            count["unknown but kept"] += (
                attempt.outcome is uow.Outcome.UNKNOWN and attempt.order.id in kept
            )
            count.update(attempt.hooks)
        count.update(f"event {type(event).__name__}" for event in self.events)
        return count


def balances_after(transfers: list[Row]) -> list[Row]:
    """The balances to which these transfers lead."""
    balances = dict.fromkeys(ACCOUNTS, BALANCE)
    for _, source, target, amount in transfers:
        assert isinstance(source, int)
        assert isinstance(target, int)
        assert isinstance(amount, int)
        balances[source] -= amount
        balances[target] += amount
    assert TOTAL == sum(balances.values())
    return list(balances.items())
