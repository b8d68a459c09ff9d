"""Chromium, by the program that drives it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, ClassVar

from tests.servers.process import Server

if TYPE_CHECKING:
    import socket


class Chromium(Server):
    """A chromedriver; what it starts ends when its session is closed."""

    name = "chromium"
    binaries: ClassVar[tuple[str, ...]] = ("chromium", "chromedriver")
    package = "chromium-driver"
    stop_signal = signal.SIGTERM
    account = None

    def _initialise(self) -> list[str]:
        return ["mkdir", str(self.data)]

    def _serve(self) -> list[str]:
        return ["chromedriver", f"--port={self.port}"]

    def _answers(self, client: socket.socket) -> bool:
        client.sendall(b"GET /status HTTP/1.1\r\nhost: localhost\r\n\r\n")
        return client.recv(12) == b"HTTP/1.1 200"
