"""Redis as a child process that forgets everything when it ends."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, ClassVar

from tests.servers.process import HOST, Server

if TYPE_CHECKING:
    import socket

DATABASES = 1000


class Redis(Server):
    """A Redis with a database per number below `DATABASES`; it keeps no file."""

    name = "redis"
    binaries: ClassVar[tuple[str, ...]] = ("redis-server",)
    package = "redis-server"
    stop_signal = signal.SIGTERM
    account = None

    def _initialise(self) -> list[str]:
        return ["mkdir", str(self.data)]

    def _serve(self) -> list[str]:
        settings = {
            "port": self.port,
            "bind": HOST,
            "dir": self.data,
            "databases": DATABASES,
            "save": "",
            "appendonly": "no",
        }
        pairs = [(f"--{key}", str(value)) for key, value in settings.items()]
        return ["redis-server", *(word for pair in pairs for word in pair)]

    def _answers(self, client: socket.socket) -> bool:
        client.sendall(b"PING\r\n")
        return client.recv(5) == b"+PONG"
