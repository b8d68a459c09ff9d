"""Start the shop, play the tour; with --serve stay open for visitors.

The database is a temporary SQLite file unless DATABASE_URL names another one, where
the tables `shop_demo_*` are made and dropped again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn

from asgi_uow import Database

from .app import create_app
from .models import close_shop, open_shop
from .tour import play

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from starlette.applications import Starlette


@asynccontextmanager
async def listening(app: Starlette) -> AsyncGenerator[tuple[str, asyncio.Task[None]]]:
    """Serve `app` on a free port; give the address and the task that serves."""
    # The port listens before uvicorn does: nobody has to wait for the start.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, lifespan="on", ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", serving
        finally:
            server.should_exit = True
            await serving


async def run(database: Database, app: Starlette, *, serve: bool) -> bool:
    """Open the shop, play the tour, close the shop."""
    await open_shop(database)
    try:
        async with listening(app) as (address, serving):
            print(f"The shop is open at {address} on {database.engine.url!r}.\n")
            async with httpx.AsyncClient(base_url=address) as client:
                as_promised = await play(client, database)
            if serve:
                print(f"\nLook around at {address}. Ctrl-C ends it.", flush=True)
                logging.basicConfig(level=logging.WARNING)
                await serving
    finally:
        await close_shop(database)
        await database.dispose()
    return as_promised


def main(
    arguments: Sequence[str],
    create: Callable[[Database], Starlette] = create_app,
) -> int:
    """Run the demo; the exit code is 0 if everything was as promised."""
    parser = argparse.ArgumentParser(prog="python -m docs.examples.shop")
    parser.add_argument("--serve", action="store_true", help="stay open after the tour")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        default = {"DATABASE_URL": f"sqlite:///{folder}/shop.db"}
        database = Database.from_config(default | os.environ)
        shop = run(database, create(database), serve=options.serve)
        try:
            return 0 if asyncio.run(shop) else 1
        except KeyboardInterrupt:
            return 0 if options.serve else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
