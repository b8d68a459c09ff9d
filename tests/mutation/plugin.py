"""A plugin of pytest for the run of a mutant: which tests, in which order, how long."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

PORTS = "ASGI_UOW_MUTATION_PORTS"  # of the servers, for the tests that need one
STATS = Path("mutmut-stats.json")  # in the folder that mutmut runs the tests in
ON_SERVERS = (
    "tests/databases/test_journal.py",
    "tests/entrypoints/test_replay.py",
    "tests/promises/test_p10",
    "tests/promises/test_p11",
    "tests/unit/",
)
SLOW = 0.25  # seconds; of the variants of a test that takes longer, one runs
LIMIT = 15  # seconds for a test; none takes 7
FAILED, TIMEOUT = 1, 36  # exit codes of a process of mutmut


def ports() -> dict[str, int | None]:
    found: dict[str, int | None] = json.loads(os.environ.get(PORTS, "{}"))
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the databases that `--db` names."""
    config.option.db = ["sqlite", *ports()]


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Use the servers that run already."""
    # Imported before, its assertions could not be rewritten.
    from tests.servers.plugin import SERVERS, RunningServers

    session.config.stash[SERVERS] = RunningServers(ports())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by what each test took on the code as it is; leave slow variants out.

    On servers run some of them alone, and of these what does not run on SQLite.
    """
    from tests.servers.plugin import needs

    if ports():
        on_sqlite = {function_of(item) for item in items if needs(item) <= {"sqlite"}}
        items[:] = [
            item
            for item in items
            if item.nodeid.startswith(ON_SERVERS) and function_of(item) not in on_sqlite
        ]
    if not STATS.exists():
        return
    taken: dict[str, float] = json.loads(STATS.read_text())["duration_by_test"]
    chosen: dict[object, pytest.Item] = {}
    for item in sorted(items, key=lambda item: taken.get(item.nodeid, 0.0)):
        is_slow = taken.get(item.nodeid, 0.0) > SLOW
        chosen.setdefault(function_of(item) if is_slow else item.nodeid, item)
    items[:] = chosen.values()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    """End a process whose tests failed; what a mutant has left may break the end."""
    if exitstatus == FAILED and is_mutant():
        os._exit(FAILED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show what fails on the code as it is; mutmut does not."""
    if report.failed and not is_mutant():
        os.write(2, f"\n{report.nodeid}\n{report.longreprtext}\n".encode())


def is_mutant() -> bool:
    return "__mutmut_" in os.environ["MUTANT_UNDER_TEST"]


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """End the process where a test hangs."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _give_up(*_: object) -> None:
    os._exit(TIMEOUT)
