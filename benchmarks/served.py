"""Serve one contestant: `python -m benchmarks.served CONTESTANT STATEMENT URL PORT`."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from asgi_uow import current_read_session, current_session

from . import apps

if TYPE_CHECKING:
    from .apps import Maker

MAKERS: dict[str, dict[str, Maker]] = {
    statement: {
        "sqlalchemy": partial(apps.by_hand, text),
        "asgi_uow": partial(apps.ours, text, session),
        "context_async_sqlalchemy": partial(apps.context_async_sqlalchemy, text),
        "advanced_alchemy": partial(apps.advanced_alchemy, text),
    }
    for statement, text, session in (
        ("insert", apps.INSERT, current_session),
        ("select", apps.SELECT, current_read_session),
    )
}
"""By statement and by the package they need."""


def main(statement: str, contestant: str, url: str, port: str) -> None:
    """Serve until SIGTERM; the end of the process closes connections."""
    uvicorn.run(
        MAKERS[statement][contestant](url, AsyncExitStack()),
        port=int(port),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
