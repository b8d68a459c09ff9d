"""A Galera cluster of three nodes on this machine."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import asyncmy
from asyncmy.errors import MySQLError

from tests.integration.cluster.servers import LIMIT_SECONDS, ServerGroup
from tests.servers.backend import MariaDBBackend, eventually
from tests.servers.process import HOST, MariaDB, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers.backend import Row, ServerBackend

# Before a statement: it waits until the node has all that is committed.
SYNCED = "SET STATEMENT wsrep_sync_wait = 1 FOR "
ISOLATE = "SET GLOBAL wsrep_provider_options = 'gmcast.isolate={}'"
PROVIDER = Path("/usr/lib/galera/libgalera_smm.so")
# A node that is silent for a second is expelled; by default it takes five.
TIMERS = {
    "evs.suspect_timeout": "PT1S",
    "evs.inactive_timeout": "PT2S",
    "evs.keepalive_period": "PT0.2S",
    "evs.inactive_check_period": "PT0.1S",
    "evs.join_retrans_period": "PT0.2S",
    "evs.install_timeout": "PT1S",
    "pc.announce_timeout": "PT0.5S",
    "gmcast.peer_timeout": "PT0.5S",
    "gmcast.time_wait": "PT0.5S",
}


class GaleraNode(MariaDB):
    """A MariaDB that is one node of a cluster; all its data comes from the others."""

    name = "galera"
    binaries: ClassVar[tuple[str, ...]] = (
        *MariaDB.binaries,
        "wsrep_sst_mysqldump",
        "mariadb-dump",
    )
    founds_cluster = False
    """Whether the next start is the first of a new cluster."""

    def __init__(self) -> None:
        super().__init__("--init-file=")  # what a node did there, it would replicate
        self.first: MariaDB = self
        self.gcomm_port = self.transfer_port = 0
        self.peers: list[int] = []
        """The ports on which the nodes find each other."""

    @classmethod
    def is_installed(cls) -> bool:
        return super().is_installed() and PROVIDER.exists()

    def _initialise(self) -> list[str]:
        if self.first is self:
            return super()._initialise()
        return ["cp", "-a", str(self.first.data), str(self.data)]

    def _serve(self) -> list[str]:
        provider = {
            "gmcast.listen_addr": f"tcp://{HOST}:{self.gcomm_port}",
            "ist.recv_addr": f"{HOST}:{self.transfer_port}",
            "gcache.size": "16M",
            **TIMERS,
        }
        options = ";".join(f"{key}={value}" for key, value in provider.items())
        peers = ",".join(f"{HOST}:{port}" for port in self.peers)
        return [
            *super()._serve(),
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--wsrep-on=ON",
            f"--wsrep-provider={PROVIDER}",
            f"--wsrep-provider-options={options}",
            "--wsrep-cluster-name=tests",
            f"--wsrep-cluster-address=gcomm://{peers}",
            f"--wsrep-node-address={HOST}:{self.gcomm_port}",
            # By rsync a server that runs as root gets nothing.
            "--wsrep-sst-method=mysqldump",
            "--wsrep-sst-auth=root:",
            f"--wsrep-sst-receive-address={HOST}:{self.port}",
            *["--wsrep-new-cluster"] * self.founds_cluster,
        ]

    async def ask(self, sql: str) -> list[Row]:
        """Run a statement as root; what SQLAlchemy asks first may be refused here."""
        connection = await asyncmy.connect(host=HOST, port=self.port, user="root")
        with closing(connection):
            async with connection.cursor() as cursor:
                await cursor.execute(sql)
                return list(await cursor.fetchall())

    async def status(self, name: str) -> str:
        """Return what the node says of itself; "down" if it says nothing."""
        try:
            [[_, value]] = await self.ask(f"SHOW STATUS LIKE 'wsrep_{name}'")
        except (MySQLError, OSError):
            return "down"
        return str(value)

    async def is_synced(self) -> bool:
        return await self.status("local_state_comment") == "Synced"


class GaleraCluster(ServerGroup):
    """Three nodes. One may be killed or isolated, and comes back by `rejoin()`."""

    kind = MariaDBBackend
    nodes: list[GaleraNode]

    def __init__(self) -> None:
        self.nodes = [GaleraNode() for _ in range(3)]
        super().__init__(*self.nodes)
        for node in self.nodes:
            node.first = self.nodes[0]
            node.gcomm_port = next(self.free_ports)
            node.transfer_port = next(self.free_ports)
        for node in self.nodes:
            node.peers = [each.gcomm_port for each in self.nodes]

    @asynccontextmanager
    async def fresh_database(self) -> AsyncGenerator[ServerBackend, None]:
        """An empty database on each node; dropped when all are back."""
        self.backend = self.kind(self.nodes[0].port)
        async with self.backend:
            try:
                yield self.backend
            finally:
                await self.mend()
                for node in self.nodes:  # an open transaction would block DROP
                    await self.at(node).kill_connections()

    async def create(self, *statements: str) -> None:
        """Run statements; return when each node has what they have done."""
        await self.backend.execute(*statements)
        for node in self.nodes:
            await node.ask(f"{SYNCED}SELECT 1 FROM mysql.user")

    async def kill(self, node: GaleraNode) -> None:
        """End a node with SIGKILL; return when the others go on without it."""
        await asyncio.to_thread(node.kill)
        await self._wait_for_size(2)

    async def isolate(self, node: GaleraNode) -> None:
        """Cut a node off from the others; return when it has noticed."""
        await node.ask(ISOLATE.format(1))
        await eventually("OFF", lambda: node.status("ready"), within=LIMIT_SECONDS)

    async def rejoin(self, node: GaleraNode) -> None:
        """Have a node running and connected; return when it is up to date.

        One that does not find the others in time ends by itself, and starts again.
        """

        async def is_synced() -> bool:
            if node.pid is None:
                await asyncio.to_thread(node.start)
            return await node.is_synced()

        if node.pid is not None:
            await node.ask(ISOLATE.format(0))
        await eventually(True, is_synced, within=3 * LIMIT_SECONDS)

    async def mend(self) -> None:
        """Have all nodes running and connected."""
        for node in self.nodes:
            await self.rejoin(node)
        await self._wait_for_size(3)

    async def _wait_for_size(self, size: int) -> None:
        for node in (each for each in self.nodes if each.pid is not None):

            async def found(node: GaleraNode = node) -> str:
                return await node.status("cluster_size")

            await eventually(str(size), found, within=LIMIT_SECONDS)

    async def _boot(self) -> None:
        for node in self.nodes:
            if node._spawn(node._initialise()).wait() != 0:
                raise ServerError(node)
        first, *joiners = self.nodes
        first.founds_cluster = True
        await self.rejoin(first)
        first.founds_cluster = False
        await self._query(first, "CREATE USER app@'%'")
        await self._query(first, r"GRANT ALL ON `test\_%`.* TO app@'%'")
        for node in joiners:
            await self.rejoin(node)
        await self._wait_for_size(3)
