"""Clients that write all the time, and whether what they are told is so."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import itertools
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asgi_uow as uow
from asgi_uow import Database, Outcome, Retry, UnitOfWorkMiddleware
from tests.integration.patroni.servers import LIMIT_SECONDS
from tests.servers import eventually
from tests.support.asgi import Client, Response, http_scope, respond
from tests.support.observer import Events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from asgi_uow._asgi import Receive, Scope, Send
    from tests.servers import PostgreSQLBackend

DRIVERS = ("asyncpg", "psycopg")
HASTY = Retry(methods=["POST"])
# It goes on for 26 seconds on average, 15 almost certainly: longer than a failover.
PATIENT = Retry(methods=["POST"], attempts=30, backoff=0.2, max_backoff=2.0)
CLIENTS = 4  # of each application
TABLES = (
    "CREATE TABLE writes (number INTEGER)",  # what is done twice shows
    *(f"CREATE TABLE gate_{driver} (id INTEGER)" for driver in DRIVERS),
)
COUNTS = "SELECT number, count(*) FROM writes GROUP BY number"
IN_DOUBT = "in doubt"  # as the server knows the connection
NUMBERS = itertools.count()
HOOKS = {Outcome.COMMITTED: "commit", Outcome.ROLLED_BACK: "rollback"}


@dataclasses.dataclass
class Write:
    """One request, which inserts its number, and what became of it."""

    is_patient: bool = False
    """Its attempts go on until the database is back."""
    is_held: bool = False
    """Its COMMIT waits until a standby shows the row, and that waits for the gate."""
    number: int = dataclasses.field(default_factory=lambda: next(NUMBERS))
    response: Response = dataclasses.field(default_factory=Response)

    @property
    def outcomes(self) -> list[Outcome | None]:
        """Those of its attempts."""
        return [unit.outcome for unit in self.response.units]

    def lies(self, kept: int) -> list[str]:
        """Tell in which ways what was said about it is not so."""
        status, [*before, last] = self.response.status, self.outcomes
        is_unknown = last is Outcome.UNKNOWN
        hooks = [HOOKS[each] for each in self.outcomes if each in HOOKS]
        said = {
            "acknowledged, and lost": status == 200 and not kept,
            "nothing was changed, and it is there": status == 503 and kept,
            "kept more than once": kept > 1,
            "a status that nobody expects": (
                status != 500 if is_unknown else status not in {200, 503}
            ),
            "a 503 for one who is patient": status == 503 and self.is_patient,
            "replayed, and perhaps kept before": set(before) - {Outcome.ROLLED_BACK},
            "not the hooks of its outcomes": hooks != self.response.hooks,
        }
        return [f"{self.number}: {lie}" for lie, told in said.items() if told]


class Writers:
    """An application with a pool of its own, and its clients."""

    def __init__(self, url: str, driver: str, retry: Retry) -> None:
        self.driver, self.retry = driver, retry
        self.events = Events()
        self.writes: list[Write] = []
        self.served: list[float] = []
        """When a success was sent."""
        self.stopped = False
        self.db = Database.from_url(url.replace("+asyncpg:", f"+{driver}:"))
        self.app = UnitOfWorkMiddleware(
            self._serve, self.db, retry=retry, observers=[self.events]
        )

    async def _serve(self, scope: Scope, _: Receive, send: Send) -> None:
        write: Write = scope["write"]
        write.response.units.append(uow.current_unit_of_work())
        uow.after_commit(write.response.hooks.append, "commit")
        uow.after_rollback(write.response.hooks.append, "rollback")
        session = uow.current_session()
        if write.is_held:
            await session.execute("SET LOCAL synchronous_commit = remote_apply")
            await session.execute(f"SET LOCAL application_name = '{IN_DOUBT}'")
            await session.execute(f"TRUNCATE gate_{self.driver}")
        await session.execute("INSERT INTO writes VALUES (:n)", n=write.number)
        await respond(send)

    async def write(self, *, is_held: bool = False) -> Response:
        write = Write(self.retry is PATIENT, is_held)
        scope = http_scope(method="POST", write=write)
        await Client(self.app).request(scope=scope, into=write.response)
        if write.response.status == 200:
            self.served.append(time.monotonic())
        self.writes.append(write)
        return write.response

    async def run(self) -> None:
        """Write until told to stop."""
        while not self.stopped:
            await self.write()

    def served_since(self, moment: float) -> int:
        return len(self.served) - bisect.bisect(self.served, moment)

    def figures(self, kept: Mapping[int, int]) -> str:
        """Say what happened, in a line."""
        statuses = Counter(each.response.status for each in self.writes)
        replayed = [each for each in self.writes if len(each.outcomes) > 1]
        replays = sum(len(each.outcomes) - 1 for each in replayed)
        saved = sum(each.response.status == 200 for each in replayed)
        unknown = [each for each in self.writes if Outcome.UNKNOWN in each.outcomes]
        found = sum(each.number in kept for each in unknown)
        longest = max(b - a for a, b in itertools.pairwise(self.served))
        return (
            f"{self.driver}, {self.retry.attempts:2} attempts:"
            f" {len(self.writes):5} requests, {statuses[200]:5} x 200,"
            f" {statuses[503]:5} x 503, {statuses[500]:2} x 500 (UNKNOWN,"
            f" {found} kept),"
            f" {replays:4} replays, {saved:2} requests saved by them,"
            f" {longest:4.1f} s without service"
        )


@asynccontextmanager
async def load(backend: PostgreSQLBackend) -> AsyncGenerator[list[Writers]]:
    """Writers with each driver, who give up soon or late; they stop at the end."""
    await backend.execute(*TABLES)
    everybody = [
        Writers(backend.url, driver, retry)
        for retry in (HASTY, PATIENT)
        for driver in DRIVERS
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for each in everybody * CLIENTS:
                group.create_task(each.run())
            yield everybody
            for each in everybody:
                each.stopped = True
    finally:
        for each in everybody:
            await each.db.dispose()


async def wait_for_service(everybody: Sequence[Writers], since: float = 0.0) -> None:
    """Return when each application has served a hundred requests since that moment."""

    async def are_served() -> bool:
        return all(each.served_since(since) >= 100 for each in everybody)

    await eventually(True, are_served, within=LIMIT_SECONDS)
