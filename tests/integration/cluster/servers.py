"""A primary and its replicas on this machine."""

from __future__ import annotations

import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from tests.servers.backend import (
    MariaDBBackend,
    PostgreSQLBackend,
    ServerBackend,
    _query,
    eventually,
)
from tests.servers.process import (
    HOST,
    PORTS,
    MariaDB,
    PostgreSQL,
    Server,
    ServerError,
    find_binary,
    is_free,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers.backend import Row

LIMIT_SECONDS = 20.0  # what normally takes milliseconds


class ServerGroup(ABC):
    """Servers that belong together, in one folder that is removed at the end.

    `backend` is the database of the test on the first of them, `at()` is the same
    database as another server has it.
    """

    kind: ClassVar[type[MariaDBBackend | PostgreSQLBackend]]
    backend: ServerBackend

    def __init__(self, *servers: Server) -> None:
        self.servers = list(servers)
        name = servers[0].name
        self.folder = Path(tempfile.mkdtemp(prefix=f"asgi-uow-{name}-cluster-"))
        self.folder.chmod(0o711)  # servers may run as somebody else
        # No two alike.
        self.free_ports = filter(is_free, random.sample(PORTS, len(PORTS)))
        for number, server in enumerate(self.servers):
            server.port = next(self.free_ports)
            server.folder = server.folder.rename(self.folder / str(number))
            server.data = server.folder / "data"

    async def __aenter__(self) -> Self:
        try:
            await self._boot()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers, replicas first; remove the folder."""
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder)
            for server in self.servers:
                stack.callback(server.close)

    def at(self, server: Server, driver: str | None = None) -> ServerBackend:
        """Return the database of the test as this server has it.

        Its own statements are an administrator's: on MariaDB even a replica
        takes writes from it. Its `url` is the ordinary user's.
        """
        there = self.kind(server.port, driver)
        fresh, there.database = there.database, self.backend.database
        there.url = there.url.replace(fresh, there.database)
        there._own_url = there._own_url.replace(fresh, there.database)
        return there

    @abstractmethod
    async def _boot(self) -> None:
        """Make the data of all servers, start them, let the replicas follow."""

    def _start_servers(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_start, self.servers))

    async def _query(self, server: Server, sql: str, **params: object) -> list[Row]:
        return await _query(self.kind(server.port).admin_url, sql, **params)


def _start(server: Server) -> None:
    if server.pid is None:
        server.start()


class Cluster(ServerGroup):
    """A primary and its replicas.

    Each server may be stopped, killed and started again; replication goes on by
    itself.
    """

    def __init__(self, primary: Server, *replicas: Server) -> None:
        self.primary = primary
        self.replicas = list(replicas)
        super().__init__(primary, *replicas)

    async def start(self) -> None:
        """Start what is not running: servers and appliers."""
        self._start_servers()
        for number in range(len(self.replicas)):
            await self.start_applier(number)

    @asynccontextmanager
    async def fresh_database(self) -> AsyncGenerator[ServerBackend, None]:
        """An empty database that every replica has; dropped on a mended cluster."""
        self.backend = self.kind(self.primary.port)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.backend)
            for replica in self.replicas:  # an open transaction would block DROP
                stack.push_async_callback(self.at(replica).kill_connections)
            stack.push_async_callback(self.start)
            await self.wait_until_applied()
            yield self.backend

    @abstractmethod
    async def stop_applier(self, number: int) -> None:
        """Let a replica receive what the primary does, and not apply it."""

    @abstractmethod
    async def start_applier(self, number: int) -> None:
        """Let a replica apply what it has received, and go on."""

    @abstractmethod
    async def wait_until_applied(self) -> None:
        """Return when each running replica has applied all the primary has."""

    @abstractmethod
    async def wait_until_received(self) -> None:
        """Return when each running replica has received all the primary has."""

    def _running_replicas(self) -> list[Server]:
        return [replica for replica in self.replicas if replica.pid is not None]


class MariaDBReplica(MariaDB):
    """A MariaDB that begins as a copy of a primary that has never run."""

    def __init__(self, primary: MariaDB, *options: str) -> None:
        # What the primary's init-file does is replicated.
        super().__init__("--read-only=ON", "--init-file=", *options)
        self._primary = primary

    def _initialise(self) -> list[str]:
        return ["cp", "-a", str(self._primary.data), str(self.data)]


class MariaDBCluster(Cluster):
    """A MariaDB and two replicas that follow it by GTID.

    A replica killed while it applies DDL does not go on: it has done it and does
    not know (error 1950, or "already exists"). With rows this does not happen.
    """

    kind = MariaDBBackend

    def __init__(self) -> None:
        primary = MariaDB(*self._options(1))
        replicas = [MariaDBReplica(primary, *self._options(n)) for n in (2, 3)]
        super().__init__(primary, *replicas)

    async def stop_applier(self, number: int) -> None:
        await self._query(self.replicas[number], "STOP SLAVE SQL_THREAD")

    async def start_applier(self, number: int) -> None:
        quietly = "SET STATEMENT sql_notes = 0 FOR"  # it may be running already
        await self._query(self.replicas[number], f"{quietly} START SLAVE SQL_THREAD")

    async def wait_until_applied(self) -> None:
        # A statement of its own: beside others it does not come first.
        wait = "SELECT master_gtid_wait(:position, :seconds)"
        params = {"position": await self._position(), "seconds": LIMIT_SECONDS}
        for replica in self._running_replicas():
            [[result]] = await self._query(replica, wait, **params)
            assert 0 == result, replica.log()[-1000:]

    async def wait_until_received(self) -> None:
        position = await self._position()
        for replica in self._running_replicas():

            async def is_there(replica: Server = replica) -> bool:
                [status] = await self._query(replica, "SHOW SLAVE STATUS")
                return position in status  # as Gtid_IO_Pos

            await eventually(True, is_there, within=LIMIT_SECONDS)

    async def _boot(self) -> None:
        for server in self.servers:
            if server._spawn(server._initialise()).wait() != 0:
                raise ServerError(server)
        self._start_servers()
        for replica in self.replicas:
            await self._query(
                replica,
                f"CHANGE MASTER TO MASTER_HOST='{HOST}',"
                f" MASTER_PORT={self.primary.port}, MASTER_USER='root',"
                " MASTER_USE_GTID=slave_pos, MASTER_CONNECT_RETRY=1",
            )
            await self._query(replica, "START SLAVE")

    async def _position(self) -> object:
        [[position]] = await self._query(self.primary, "SELECT @@gtid_binlog_pos")
        return position

    @staticmethod
    def _options(number: int) -> list[str]:
        return [
            f"--server-id={number}",
            "--log-bin=bin",
            "--relay-log=relay",
            "--binlog-format=ROW",
            "--log-slave-updates=ON",
            "--gtid-strict-mode=ON",
        ]


class PostgreSQLReplica(PostgreSQL):
    """A PostgreSQL that begins as a copy of a running primary."""

    def __init__(self, primary: PostgreSQL, *options: str) -> None:
        super().__init__(*options)
        self._primary = primary

    def _initialise(self) -> list[str]:
        # Beside the server, since Debian's on PATH may be of another version.
        server = Path(find_binary("postgres") or "").resolve()
        return [
            str(server.with_name("pg_basebackup")),
            f"--pgdata={self.data}",
            f"--host={HOST}",
            f"--port={self._primary.port}",
            "--username=postgres",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        ]


class PostgreSQLCluster(Cluster):
    """A PostgreSQL and one replica that streams from it."""

    kind = PostgreSQLBackend

    def __init__(self) -> None:
        # What a replica missed while it was down is still there.
        options = ("--wal_keep_size=256MB", "--wal_retrieve_retry_interval=200ms")
        primary = PostgreSQL(*options)
        super().__init__(primary, PostgreSQLReplica(primary, *options))

    async def stop_applier(self, number: int) -> None:
        replica = self.replicas[number]
        await self._query(replica, "SELECT pg_wal_replay_pause()")

        async def is_paused() -> bool:
            sql = "SELECT pg_get_wal_replay_pause_state()"
            return await self._query(replica, sql) == [("paused",)]

        await eventually(True, is_paused, within=LIMIT_SECONDS)

    async def start_applier(self, number: int) -> None:
        await self._query(self.replicas[number], "SELECT pg_wal_replay_resume()")

    async def wait_until_applied(self) -> None:
        await self._wait_for("pg_last_wal_replay_lsn()")

    async def wait_until_received(self) -> None:
        await self._wait_for("pg_last_wal_receive_lsn()")

    async def _wait_for(self, progress: str) -> None:
        position = await self._position()
        for replica in self._running_replicas():

            async def is_there(replica: Server = replica) -> bool:
                sql = f"SELECT {progress} >= CAST(CAST(:position AS text) AS pg_lsn)"
                rows = await self._query(replica, sql, position=position)
                return rows == [(True,)]

            await eventually(True, is_there, within=LIMIT_SECONDS)

    async def _boot(self) -> None:
        self.primary.start()
        await self.start()

    async def _position(self) -> object:
        # Not pg_current_wal_insert_lsn(): once in a thousand times it is behind
        # the header of a page that is still empty, where no replica gets to.
        # The message's commit also flushes what others committed without.
        sql = "SELECT CAST(pg_logical_emit_message(true, '', '') AS text)"
        [[position]] = await self._query(self.primary, sql)
        return position
