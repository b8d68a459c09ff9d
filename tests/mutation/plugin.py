"""A plugin of pytest for the run of a mutant: quick tests first, none for ever."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

STATS = Path("mutmut-stats.json")  # in the folder that mutmut runs the tests in
SLOW = 0.25  # seconds; of the variants of a test that takes longer, one runs
LIMIT = 10  # seconds for a test; none takes 2
TIMEOUT = 36  # mutmut's exit code for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by what each test took on the code as it is; leave slow variants out."""
    if not STATS.exists():
        return
    taken: dict[str, float] = json.loads(STATS.read_text())["duration_by_test"]
    chosen: dict[object, pytest.Item] = {}
    for item in sorted(items, key=lambda item: taken.get(item.nodeid, 0.0)):
        is_slow = taken.get(item.nodeid, 0.0) > SLOW
        test = item.nodeid.partition("[")[0] if is_slow else item.nodeid
        chosen.setdefault(test, item)
    items[:] = chosen.values()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """End the process where a test hangs."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(TIMEOUT))
    signal.alarm(LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)
