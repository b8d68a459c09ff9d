"""Four queues: two on Redis, fed after COMMIT; two in PostgreSQL, fed before it."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

import asyncpg
from celery import Celery  # type: ignore[import-untyped]  # has no type hints
from pgqueuer.db import AsyncpgDriver
from pgqueuer.errors import DuplicateJobError
from pgqueuer.queries import Queries
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued
from redis import Redis
from taskiq_redis import ListQueueBroker

from asgi_uow import current_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import PostgreSQLBackend


async def note(number: int) -> None:
    raise NotImplementedError  # no worker runs here


# On Redis


class Broker(ABC):
    """A queue on Redis that takes numbers."""

    key: ClassVar[str]
    send: Callable[[int], object]
    """What is registered with `after_commit`."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Open the connections."""

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Close the connections."""

    def numbers(self) -> list[int]:
        """Return what is in the queue, through a connection of its own."""
        with Redis.from_url(self.url) as client:
            messages = client.lrange(self.key, 0, -1)
        assert isinstance(messages, list)
        return [self._number(json.loads(message)) for message in messages]

    @staticmethod
    @abstractmethod
    def _number(message: dict[str, str]) -> int:
        """Return the first argument of a call."""


class Taskiq(Broker):
    """Sending is a coroutine."""

    key = "taskiq"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._broker = ListQueueBroker(url)
        self.send = self._broker.task(task_name="note")(note).kiq

    async def __aenter__(self) -> Self:
        await self._broker.startup()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._broker.shutdown()

    @staticmethod
    def _number(message: dict[str, str]) -> int:
        return int(message["args"][0])


class CeleryOnRedis(Broker):
    """Sending blocks."""

    key = "celery"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._app = Celery(broker=url, set_as_current=False)
        self._app.task(note, name="note", shared=False)
        self.send = self._app.tasks["note"].delay

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._app.close()

    @staticmethod
    def _number(message: dict[str, str]) -> int:
        arguments, _, _ = json.loads(base64.b64decode(message["body"]))
        return int(arguments[0])


# In PostgreSQL


class JobTable(ABC):
    """A queue of numbers in the database of the unit of work."""

    driver: ClassVar[str]
    duplicate: ClassVar[type[Exception]]

    @abstractmethod
    async def install(self, backend: PostgreSQLBackend) -> None:
        """Create the tables."""

    @abstractmethod
    async def enqueue(self, number: int, *, only_once: str | None = None) -> None:
        """Add a job on the connection of the unit; what `before_commit` is for."""

    @abstractmethod
    async def numbers(self, backend: PostgreSQLBackend) -> list[int]:
        """Return what is in the queue, through a connection of its own."""


async def driver_connection() -> object:
    """Return the driver's own connection, of the unit's write session."""
    connection = await current_session().connection()
    return (await connection.get_raw_connection()).driver_connection


class Procrastinate(JobTable):
    """On psycopg, which sends BEGIN before any statement."""

    driver = "psycopg"
    duplicate = AlreadyEnqueued

    def __init__(self) -> None:
        self._task = App(connector=PsycopgConnector()).task(name="note")(note)

    async def install(self, backend: PostgreSQLBackend) -> None:
        async with App(
            connector=PsycopgConnector(conninfo=dsn(backend))
        ).open_async() as app:
            await app.schema_manager.apply_schema_async()

    async def enqueue(self, number: int, *, only_once: str | None = None) -> None:
        connection = await driver_connection()
        task = self._task.configure(connection=connection, queueing_lock=only_once)
        await task.defer_async(number=number)

    async def numbers(self, backend: PostgreSQLBackend) -> list[int]:
        sql = "SELECT CAST(value AS int) FROM procrastinate_jobs, jsonb_each_text(args)"
        return [int(str(number)) for [number] in await backend.fetch(sql)]


class PgQueuer(JobTable):
    """On asyncpg, for which SQLAlchemy sends BEGIN before its own first statement."""

    driver = "asyncpg"
    duplicate = DuplicateJobError

    async def install(self, backend: PostgreSQLBackend) -> None:
        connection = await asyncpg.connect(dsn(backend))
        await Queries(AsyncpgDriver(connection)).install()
        await connection.close()

    async def enqueue(self, number: int, *, only_once: str | None = None) -> None:
        connection = await driver_connection()
        assert isinstance(connection, asyncpg.Connection)
        queries = Queries(AsyncpgDriver(connection))
        await queries.enqueue("note", b"%d" % number, dedupe_key=only_once)

    async def numbers(self, backend: PostgreSQLBackend) -> list[int]:
        sql = "SELECT CAST(convert_from(payload, 'UTF8') AS int) FROM pgqueuer"
        return [int(str(number)) for [number] in await backend.fetch(sql)]


def dsn(backend: PostgreSQLBackend) -> str:
    """Return the URL as drivers know it."""
    return backend.url.replace(f"+{backend.driver}:", ":")
