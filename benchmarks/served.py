"""Serve one contestant.

`python -m benchmarks.served FRAMEWORK CONTESTANT STATEMENT URL PORT`.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack

import uvicorn

from .contestants import installed
from .questions import PEERS_WORK


def main(framework: str, contestant: str, statement: str, url: str, port: str) -> None:
    """Serve until SIGTERM; the end of the process closes connections."""
    [make] = [each.make for each in installed(framework) if each.name == contestant]
    uvicorn.run(
        make(PEERS_WORK[statement], url, AsyncExitStack()),
        port=int(port),
        loop="uvloop",
        http="httptools",
        lifespan="off",  # the application starts its own
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
