"""The demo shop: what it shows is so, and it would notice if it were not."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec

import httpx
import pytest
from anyio import run_process
from starlette.routing import Route

from asgi_uow import Database
from docs.examples.shop.__main__ import main
from docs.examples.shop.app import create_app, new_order
from docs.examples.shop.models import close_shop, open_shop
from docs.examples.shop.steps import CUP, STEPS
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from starlette.applications import Starlette

    from docs.examples.shop.steps import Step
    from tests.servers import Backend, SQLiteBackend

P = ParamSpec("P")

DEMO = [sys.executable, "-W", "error", "-m", "docs.examples.shop"]


def in_thread(call: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call in a thread: on Python 3.11 greenlets cost the caller its coverage."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args, **kwargs).result()


@pytest.fixture
async def shop(sqlite: SQLiteBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an open shop in this process."""
    database = Database.from_url(sqlite.url)
    await open_shop(database)
    transport = httpx.ASGITransport(create_app(database), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client
    await close_shop(database)
    await database.dispose()


async def test_every_line_is_as_promised(backend: Backend) -> None:
    """The tour succeeds on every database; its tables are gone afterwards."""
    environment = {**os.environ, "DATABASE_URL": backend.url}

    demo = await run_process(DEMO, cwd=ROOT, env=environment)

    [*_, titles, placed, stock, dry, crash, commit, read, again] = lines(demo.stdout)
    assert titles.endswith("as promised")
    assert re.search(r"201 .* orders 1 \(\+1\), tea 99 \(-1\) .* committed", placed)
    assert re.search(r"409 .* orders 1, tea 99 .* rolled back", stock)
    assert re.search(r"200 .* orders 1, tea 99 .* rolled back \(explicit\)", dry)
    assert re.search(r"500 .* orders 1, tea 99 .* rolled back \(exception\)", crash)
    assert re.search(r"50[03].* orders 1, tea 99 .* rolled back \(commit_f", commit)
    assert re.search(r"500 .* orders 1, tea 99 .* rolled back \(exception\)", read)
    assert re.search(r"201 .* orders 2 \(\+1\), tea 98 \(-1\) .* committed", again)
    for line in (placed, stock, dry, crash, commit, read, again):
        assert line.endswith("yes")
    assert ("mariadb" == backend.name) == ("503, Retry-After: 1" in commit)
    assert b"" == demo.stderr
    with pytest.raises(Exception, match="shop_demo_order"):
        await backend.fetch("SELECT * FROM shop_demo_order")


def test_default_database_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without DATABASE_URL the demo uses a SQLite file, which it removes."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert 0 == in_thread(main, [])

    assert f"sqlite+aiosqlite:///{tmp_path}" in capsys.readouterr().out
    assert [] == list(tmp_path.iterdir())


def test_broken_promise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shop that keeps a dry run makes the demo fail, and it says why."""

    def forgetful(database: Database) -> Starlette:
        app = create_app(database)
        app.routes.insert(0, Route("/orders/dry-run", new_order, methods=["POST"]))
        return app

    monkeypatch.delenv("DATABASE_URL", raising=False)

    assert 1 == in_thread(main, [], forgetful)

    output = capsys.readouterr().out
    title = STEPS[2].title
    assert re.search(rf"^{title} +201 +orders 2 \(\+1\).* NO$", output, re.MULTILINE)
    assert f'{title}:\n\n{{"order":2}}' in output
    assert 1 == output.count(" NO\n")


def test_failure_of_the_demo_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unexpected crash of a handler is shown with its traceback."""

    async def stumble(_: object) -> None:
        message = "nobody has promised this"
        raise LookupError(message)

    def stumbling(database: Database) -> Starlette:
        app = create_app(database)
        app.routes.insert(0, Route("/orders/dry-run", stumble, methods=["POST"]))
        return app

    monkeypatch.delenv("DATABASE_URL", raising=False)

    assert 1 == in_thread(main, [], stumbling)
    assert "LookupError: nobody has promised this" in capsys.readouterr().out


async def test_open_until_interrupted(sqlite: SQLiteBackend) -> None:
    """With --serve the shop stays open after the tour; Ctrl-C ends it cleanly."""
    demo = await asyncio.create_subprocess_exec(
        *DEMO,
        "--serve",
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": sqlite.url},
        stdout=asyncio.subprocess.PIPE,
    )
    assert demo.stdout is not None
    async for line in demo.stdout:
        if found := re.search(rb"Look around at (\S+)\.", line):
            async with httpx.AsyncClient(base_url=found[1].decode()) as client:
                assert 200 == (await client.get("/")).status_code
                response = await client.post("/orders", json=CUP)
                assert 201 == response.status_code
                assert 3 == (await client.get("/state")).json()["order_count"]
            demo.send_signal(signal.SIGINT)

    assert 0 == await demo.wait()


async def test_page_needs_nothing_from_elsewhere(shop: httpx.AsyncClient) -> None:
    """The page is one file without external resources."""
    response = await shop.get("/")

    assert 200 == response.status_code
    assert "text/html; charset=utf-8" == response.headers["content-type"]
    assert [] == re.findall(r"https?://|@import|src=", response.text)


async def test_page_finds_its_buttons(shop: httpx.AsyncClient) -> None:
    """The buttons are the steps of the tour, in JSON."""
    steps = (await shop.get("/steps")).json()

    assert [step.title for step in STEPS] == [step["title"] for step in steps]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
async def test_button(shop: httpx.AsyncClient, step: Step) -> None:
    """A button does in the page what its step does in the tour."""
    before = (await shop.get("/state")).json()

    response = await shop.post(step.path, json=step.wanted)

    after = (await shop.get("/state")).json()
    assert response.status_code in step.answers
    assert step.kept == (after["order_count"] - before["order_count"])
    assert step.kept == (before["stock"]["tea"] - after["stock"]["tea"])
    assert step.kept == (len(after["outbox"]) - len(before["outbox"]))
    assert 1 == (len(after["outcomes"]) - len(before["outcomes"]))


async def test_unknown_product(shop: httpx.AsyncClient) -> None:
    """What the shop does not have is not found."""
    response = await shop.post("/orders", json=CUP | {"product": "coffee"})

    assert 404 == response.status_code
    assert 0 == (await shop.get("/state")).json()["order_count"]


def lines(output: bytes) -> list[str]:
    return output.decode().strip().splitlines()
