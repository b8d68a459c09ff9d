"""Processes that fork after they have used a `Database`: see `forks`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from anyio import run_process

from tests.support import ROOT, shop
from tests.support.databases import DRIVERS, on

if TYPE_CHECKING:
    from tests.servers import Backend


async def run(url: str, name: str) -> None:
    """Run a function of `forks` in a process of its own."""
    shown = ["-W", "always:nobody has left:ResourceWarning"]
    command = [sys.executable, *shown, "-m", "tests.databases.forks", url, name]
    done = await run_process(command, cwd=ROOT, check=False)
    assert (0, b"") == (done.returncode, done.stdout), done.stderr.decode()
    assert b"nobody has left" not in done.stderr


FORKS = {
    "between_loops": [1, 2, 3],
    "twice": [1, 2, 3],
    "while_connecting": [1, 2],
    "while_used": [1, 2, 3, 4],
    "without_descriptors": [1, 2],
    "unit_of_parent": [1, 2],
    "connection_of_parent": [1, 2],
    "dropped_unit": [1, 2],
}


@on(*DRIVERS)
@pytest.mark.parametrize("name", FORKS)
async def test_a_fork_after_use(backend: Backend, name: str) -> None:
    """Parent and child work on; neither uses a connection or a unit of the other."""
    await shop.create(backend)
    await run(backend.url, name)
    assert FORKS[name] == await shop.items(backend)


@pytest.mark.parametrize("name", ["in_memory", "memory_of_nobody"])
async def test_a_fork_of_memory(name: str) -> None:
    """An in-memory database with contents refuses in the child, not in the parent."""
    await run("sqlite://", name)
