"""PgBouncer in front of this run's PostgreSQL, in transaction mode."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, ClassVar

from tests.servers.backend import PostgreSQLBackend
from tests.servers.process import HOST, Server
from tests.servers.proxy import RecordingProxy

if TYPE_CHECKING:
    import socket


class PgBouncer(Server):
    """Shares few server connections among all clients of a database.

    Everybody who comes is `postgres` on the server.
    """

    name = "pgbouncer"
    binaries: ClassVar[tuple[str, ...]] = ("pgbouncer",)
    package = "pgbouncer"
    behind = "postgresql"
    stop_signal = signal.SIGTERM  # at once; SIGINT would wait for the clients
    account = "postgres"
    pool_size = 4
    pool_mode = "transaction"

    def __init__(self, server_port: str) -> None:
        super().__init__()
        self._server_port = server_port

    def _initialise(self) -> list[str]:
        return ["mkdir", str(self.data)]

    def _serve(self) -> list[str]:
        settings = {
            "pool_mode": self.pool_mode,
            "default_pool_size": self.pool_size,
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "admin_users": "postgres",
            "max_client_conn": 400,
        }
        lines = (f"{key} = {value}" for key, value in settings.items())
        databases = f"* = host={HOST} port={self._server_port} user=postgres"
        path = self.folder / "pgbouncer.ini"
        path.write_text("\n".join(["[databases]", databases, "[pgbouncer]", *lines]))
        return ["pgbouncer", str(path)]

    def _answers(self, client: socket.socket) -> bool:
        packet = b"\0\x03\0\0user\0postgres\0database\0pgbouncer\0\0"
        client.sendall((len(packet) + 4).to_bytes(4) + packet)
        return client.recv(1) == b"R"


class OnePgBouncer(PgBouncer):
    """All clients of a database share a single server connection."""

    name = "pgbouncer-1"
    pool_size = 1


class PgBouncerBackend(PostgreSQLBackend):
    """A database that tests reach through PgBouncer, and this object directly."""

    def __init__(self, port: int, pooler_port: int, driver: str) -> None:
        super().__init__(port, driver)
        self.options = {"pooler": "transaction"}
        self.direct_url, self.url = self.url, self.through(pooler_port)
        self._pooler_port = pooler_port

    def proxy(self, *, delay_ms: float = 0) -> RecordingProxy:
        """Return a proxy to PgBouncer, not yet listening."""
        return RecordingProxy(self.name, self._pooler_port, delay_ms=delay_ms)
