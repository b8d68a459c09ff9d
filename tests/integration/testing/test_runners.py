"""The kit in the tests of a project: with each runner, and with each client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from asgi_uow import errors
from asgi_uow.testing import SandboxMiddleware
from tests.integration.testing import project
from tests.servers import eventually
from tests.support import shop
from tests.support.asgi import endpoint, no_body
from tests.support.databases import DATABASES, on

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.servers import Backend

OURS = ("-p", "asgi_uow.pytest_plugin")
RUNNERS = ("-p", "anyio.pytest_plugin", "-p", "pytest_asyncio.plugin")
WORKERS = ("-p", "xdist.plugin", "-n", "2")
INI = """
    [pytest]
    filterwarnings =
        error
        ignore:Using `httpx` with `starlette.testclient`
        ignore:websockets.legacy is deprecated
        ignore:.DEPRECATION v26.6. Passing the loop argument to listeners
    {}
"""

pytestmark = on(*DATABASES)


@pytest.fixture
async def project_tests(
    backend: Backend, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """A project with an empty database; plugins are those that a run names.

    `backend` comes first: what is imported after `pytester` is forgotten at its end,
    and a driver that is imported a second time crashes the process.
    """
    await shop.create(backend)
    monkeypatch.setenv("SHOP_URL", backend.url)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini(INI.format(""))
    pytester.makeconftest(project.CONFTEST)
    pytester.makepyfile(shop=project.SHOP, story=project.STORY)
    return pytester


async def test_runners_and_clients(
    project_tests: pytest.Pytester, backend: Backend
) -> None:
    """anyio, pytest-asyncio and synchronous tests in one run, with every client.

    httpx, Starlette's and Sanic's test clients, and a uvicorn that runs all the time.
    """
    project_tests.makeini(INI.format("asyncio_default_fixture_loop_scope = function"))
    project_tests.makepyfile(
        test_function=project.FUNCTION,
        test_module=project.MODULE,
        test_asyncio=project.STRICT,
        test_sync=project.SYNC,
        test_sanic=project.SANIC,
        test_live=project.LIVE,
    )
    result = project_tests.runpytest_subprocess(*OURS, *RUNNERS, timeout=120)
    one_at_a_time = backend.name == "sqlite"
    result.assert_outcomes(passed=29 - one_at_a_time, skipped=int(one_at_a_time))
    assert [] == await shop.items(backend)


@on("asyncpg")
async def test_asyncio_auto_in_two_workers(
    project_tests: pytest.Pytester, backend: Backend
) -> None:
    """pytest-asyncio in its other mode, in two processes at once."""
    project_tests.makeini(INI.format("asyncio_mode = auto"))
    project_tests.makepyfile(test_asyncio=project.AUTO, test_sync=project.SYNC)
    options = ("-o", "asyncio_default_fixture_loop_scope=function")
    result = project_tests.runpytest_subprocess(
        *OURS, *RUNNERS, *WORKERS, *options, timeout=120
    )
    result.assert_outcomes(passed=12)
    assert [] == await shop.items(backend)


@contextmanager
def until_killed() -> Generator[subprocess.Popen[bytes]]:
    """Run the tests until one of them says that it waits; kill them at the end."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "pytest", *OURS]
    environment = {**os.environ, "SHOP_PIPE": str(writing)}
    with (
        os.fdopen(reading, "rb") as told,
        subprocess.Popen(command, env=environment, pass_fds=[writing]) as run,
    ):
        os.close(writing)
        try:
            assert b"!" == told.read(1)
            yield run
        finally:
            run.kill()


async def test_killed(project_tests: pytest.Pytester, backend: Backend) -> None:
    """A process that is killed in the middle of a test leaves nothing either."""
    project_tests.makepyfile(test_held=project.HELD)
    with until_killed() as run:
        assert 1 == await backend.open_transactions()
    assert -signal.SIGKILL == run.returncode
    await eventually(0, backend.open_transactions)
    assert [] == await shop.items(backend)


@on("aiosqlite")
async def test_without_a_database(project_tests: pytest.Pytester) -> None:
    """A project that has not said which database is told what to do."""
    project_tests.makeconftest("")
    project_tests.makepyfile("def test_any(uow_sandbox): pass")
    result = project_tests.runpytest_subprocess(*OURS, timeout=120)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*UsageError: *uow_database*conftest.py*Database*"])


def test_middleware_outside_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not in a test refuses to start, unless it is told."""
    app = endpoint(no_body)
    monkeypatch.delenv("PYTEST_VERSION")
    with pytest.raises(errors.ConfigurationError, match="leave it out"):
        SandboxMiddleware(app)
    SandboxMiddleware(app, outside_tests=True)
