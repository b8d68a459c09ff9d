"""A PostgreSQL that fails over by itself: three nodes, etcd, and HAProxy in front."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import anyio.to_thread

from tests.servers import PostgreSQLBackend, eventually
from tests.servers.backend import _query
from tests.servers.process import HOST, PORTS, Server, find_binary, is_free

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

LIMIT_SECONDS = 60.0  # what normally takes a few
# Seconds after which Patroni replaces a leader that is silent. By default it is 30.
TTL = 6


class Etcd(Server):
    """One etcd, in which Patroni keeps who is the leader."""

    name = "etcd"
    binaries: ClassVar[tuple[str, ...]] = ("etcd",)
    package = "etcd-server"
    stop_signal = signal.SIGTERM
    account = None
    peer_port: int

    def _initialise(self) -> list[str]:
        return ["mkdir", "--mode=700", str(self.data)]

    def _serve(self) -> list[str]:
        client, peer = (f"http://{HOST}:{port}" for port in (self.port, self.peer_port))
        settings = {
            "name": "etcd",
            "data-dir": self.data,
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"etcd={peer}",
        }
        return ["etcd", *(f"--{key}={value}" for key, value in settings.items())]

    def _answers(self, client: socket.socket) -> bool:
        return _is_well(client)


class Node(Server):
    """Patroni with its PostgreSQL; `port` is that of Patroni's REST interface."""

    name = "patroni"
    binaries: ClassVar[tuple[str, ...]] = ("patroni",)
    package = "patroni"
    stop_signal = signal.SIGTERM
    account = "postgres"
    member: str
    etcd_port: int
    postgresql_port: int

    def _initialise(self) -> list[str]:
        return ["mkdir", str(self.data)]

    def _serve(self) -> list[str]:
        path = self.folder / "patroni.json"
        path.write_text(json.dumps(self._configuration()))
        return ["patroni", str(path)]

    def _configuration(self) -> Mapping[str, object]:
        rest, postgresql = (f"{HOST}:{p}" for p in (self.port, self.postgresql_port))
        # Beside the server, since Debian's on PATH may be of another version.
        binaries = Path(find_binary("postgres") or "").resolve().parent
        bootstrap: Mapping[str, object] = {
            "dcs": {
                "ttl": TTL,
                "loop_wait": 1,
                "retry_timeout": 2,
                "synchronous_mode": True,
                "postgresql": {"use_pg_rewind": True},
            },
            "initdb": ["no-sync", {"encoding": "UTF8"}, {"locale": "C"}],
        }
        server: Mapping[str, object] = {
            "listen": postgresql,
            "connect_address": postgresql,
            "bin_dir": str(binaries),
            "data_dir": str(self.data / "postgresql"),
            "pgpass": str(self.folder / "pgpass"),
            "pg_hba": [
                "local all all trust",
                f"host all,replication all {HOST}/32 trust",
            ],
            "authentication": {
                "superuser": {"username": "postgres"},
                "replication": {"username": "postgres"},
            },
            "parameters": {
                "unix_socket_directories": str(self.folder),
                "max_connections": 200,
                "shared_buffers": "32MB",
                "fsync": "off",
                "autovacuum": "off",
                "wal_retrieve_retry_interval": "200ms",
            },
        }
        return {
            "scope": "tests",
            "name": self.member,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"host": f"{HOST}:{self.etcd_port}"},
            "bootstrap": bootstrap,
            "postgresql": server,
        }

    def _answers(self, client: socket.socket) -> bool:
        return _is_well(client)

    def kill(self) -> None:
        """End Patroni and PostgreSQL with SIGKILL, as when the machine is lost."""
        super().kill()
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        super().close()

    def _processes(self) -> list[int]:
        """Give PostgreSQL's, the one that would restart the others first."""
        folder, found = self.data / "postgresql", list[int]()
        with suppress(OSError):  # it is not running, or ends just now
            [pid, *_] = (folder / "postmaster.pid").read_text().split()
            process = Path("/proc") / pid
            children = (process / "task" / pid / "children").read_text().split()
            # The file outlives a crash, and the number may be a stranger's by now.
            is_ours = str(folder) in (process / "cmdline").read_text()
            found = [int(each) for each in (pid, *children) if is_ours]
        return found


class HAProxy(Server):
    """Leads to the PostgreSQL of the node that says it is the primary."""

    name = "haproxy"
    binaries: ClassVar[tuple[str, ...]] = ("haproxy",)
    package = "haproxy"
    stop_signal = signal.SIGTERM
    account = None
    nodes: list[Node]

    def _initialise(self) -> list[str]:
        return ["mkdir", str(self.data)]

    def _serve(self) -> list[str]:
        path = self.folder / "haproxy.cfg"
        lines = [
            "defaults",
            "  mode tcp",
            "  timeout connect 2s",
            "  timeout check 2s",
            "  timeout client 30m",
            "  timeout server 30m",
            "listen primary",
            f"  bind {HOST}:{self.port}",
            "  option httpchk OPTIONS /primary",
            "  http-check expect status 200",
            "  default-server inter 500ms fall 2 rise 1",
            "  default-server on-marked-down shutdown-sessions",
        ]
        lines += (
            f"  server {each.member} {HOST}:{each.postgresql_port}"
            f" check port {each.port}"
            for each in self.nodes
        )
        path.write_text("\n".join([*lines, ""]))
        return ["haproxy", "-db", "-f", str(path)]

    def _answers(self, client: socket.socket) -> bool:
        return client.fileno() > 0  # whether there is a primary is another question


def _is_well(client: socket.socket) -> bool:
    client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    return b" 200 " in client.recv(64)


class Patroni:
    """Three nodes in synchronous mode, an etcd, and a HAProxy to the primary.

    As a context manager it starts them, kills them, and removes their folders. A node
    that was killed may be started again: it follows the new leader.
    """

    def __init__(self) -> None:
        self.etcd, self.haproxy = Etcd(), HAProxy()
        self.nodes = [Node(), Node(), Node()]
        self.haproxy.nodes = self.nodes
        self._servers: list[Server] = [self.etcd, self.haproxy, *self.nodes]
        ports = filter(is_free, random.sample(PORTS, len(PORTS)))  # no two alike
        for server in self._servers:
            server.port = next(ports)
        self.etcd.peer_port = next(ports)
        for number, node in enumerate(self.nodes):
            node.member = f"node-{number}"
            node.postgresql_port = next(ports)
            node.etcd_port = self.etcd.port

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.__exit__)
            self.etcd.start()
            self.nodes[0].start()  # the others copy its data
            with ThreadPoolExecutor() as pool:
                list(pool.map(Server.start, [self.haproxy, *self.nodes[1:]]))
            stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with ExitStack() as stack:
            for server in self._servers:
                stack.callback(server.close)

    async def start(self) -> None:
        """Start the nodes that were killed; return when all is as in the beginning."""
        for node in self.nodes:
            if node.pid is None:
                await anyio.to_thread.run_sync(node.start)

        async def roles() -> list[str]:
            members = await self._members()
            running = [each for each in members if each["state"] == "running"]
            return sorted(each["role"] for each in running)

        whole = ["leader", "replica", "sync_standby"]
        await eventually(whole, roles, within=LIMIT_SECONDS)

    async def leader(self) -> Node:
        return await self._node("leader")

    async def sync_standby(self) -> Node:
        """The one that has all that was acknowledged, and becomes the next leader."""
        return await self._node("sync_standby")

    async def wait_until_applied(self) -> None:
        """Return when the standbys show all that the leader has committed so far."""
        sql = (
            "SELECT bool_and(replay_lsn >= CAST(CAST(:position AS text) AS pg_lsn))"
            " FROM pg_stat_replication"
        )
        leader = PostgreSQLBackend(self.haproxy.port).admin_url
        now = "SELECT CAST(pg_logical_emit_message(true, '', '') AS text)"
        [[position]] = await _query(leader, now)

        async def are_there() -> bool:
            return await _query(leader, sql, position=position) == [(True,)]

        await eventually(True, are_there, within=LIMIT_SECONDS)

    async def switch_over(self) -> None:
        """Make the synchronous standby the leader, as for maintenance."""
        leader, candidate = await self.leader(), await self.sync_standby()
        names = {"leader": leader.member, "candidate": candidate.member}
        said = await anyio.to_thread.run_sync(_ask, leader.port, "/switchover", names)
        assert said[0] == 200, said

    async def _node(self, role: str) -> Node:
        [name] = [m["name"] for m in await self._members() if m["role"] == role]
        return next(node for node in self.nodes if node.member == name)

    async def _members(self) -> list[dict[str, str]]:
        [port, *_] = [node.port for node in self.nodes if node.pid is not None]
        _, said = await anyio.to_thread.run_sync(_ask, port, "/cluster")
        members: list[dict[str, str]] = json.loads(said)["members"]
        return members


def _ask(
    port: int, path: str, body: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Ask Patroni, or tell it, for its status and what it says."""
    client = http.client.HTTPConnection(HOST, port, timeout=LIMIT_SECONDS)
    with closing(client):
        method = "GET" if body is None else "POST"
        client.request(method, path, None if body is None else json.dumps(body))
        response = client.getresponse()
        return response.status, response.read().decode()
