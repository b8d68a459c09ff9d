"""The servers: how each is started, and what it does not do."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING

from tests.servers.process import HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

APP = "tests.integration.asgi_servers.site:app"
SECONDS = 1
"""For a server's own limits, where it has some."""

NO_CANCEL = "it lets the handler run on"
CANCELS = "it cancels the handler: see the next line"


@dataclasses.dataclass(frozen=True)
class ASGIServer:
    """A server, as a module that Python runs."""

    name: str
    command: Callable[[int], list[str]]
    lacks: Mapping[str, str]
    """The facts that it cannot show, and why."""
    exit_codes: frozenset[int] = frozenset({0})
    """What its process ends with after SIGTERM."""

    @property
    def cancels(self) -> bool:
        """Whether it cancels the handler of a client that has left."""
        return "left_and_cancelled" not in self.lacks


def uvicorn(http: str) -> ASGIServer:
    return ASGIServer(
        f"uvicorn, {http}",
        lambda port: [
            "uvicorn",
            APP,
            f"--host={HOST}",
            f"--port={port}",
            f"--http={http}",
            f"--timeout-graceful-shutdown={SECONDS}",
        ],
        {"left_and_cancelled": NO_CANCEL},
        frozenset({-signal.SIGTERM}),  # it ends by the signal that it has handled
    )


SERVERS = [
    uvicorn("h11"),
    uvicorn("httptools"),
    ASGIServer(
        "hypercorn",
        lambda port: [
            "hypercorn",
            APP,
            f"--bind={HOST}:{port}",
            f"--graceful-timeout={SECONDS}",
        ],
        {
            "left_and_cancelled": NO_CANCEL,
            "terminated_and_cut": "it waits for the request, past its own limit",
        },
    ),
    ASGIServer(
        "granian",
        lambda port: [
            "granian",
            APP,
            "--interface=asgi",
            f"--host={HOST}",
            f"--port={port}",
            f"--workers-kill-timeout={SECONDS}",
        ],
        {"left_and_cancelled": NO_CANCEL},
    ),
    ASGIServer(
        "daphne",
        lambda port: [
            "daphne",
            f"--bind={HOST}",
            f"--port={port}",
            f"--application-close-timeout={SECONDS}",
            APP,
        ],
        {
            "left_in_handler": CANCELS,
            "terminated_and_finished": "it cancels requests, and has no lifespan: "
            "dispose of the engines yourself",
        },
    ),
    ASGIServer(
        "gunicorn, `-k asgi`",
        lambda port: [
            "gunicorn",
            "--worker-class=asgi",
            f"--bind={HOST}:{port}",
            f"--graceful-timeout={SECONDS}",
            f"--asgi-disconnect-grace-period={SECONDS}",
            "--no-control-socket",
            APP,
        ],
        {"left_in_handler": CANCELS},
    ),
]
