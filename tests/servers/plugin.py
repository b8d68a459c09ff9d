"""One server of each kind per test run, and the fixtures that hand them out.

The pytest process starts a server when it is first asked for one; under xdist
it starts all before the workers, which get the ports. It stops them when the
run ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from subprocess import DEVNULL
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.servers.backend import MariaDBBackend, PostgreSQLBackend, SQLiteBackend
from tests.servers.pgbouncer import OnePgBouncer, PgBouncer, PgBouncerBackend
from tests.servers.process import MariaDB, PostgreSQL, Server, is_root
from tests.servers.redis import Redis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from xdist.workermanage import WorkerController

    from tests.servers.backend import Backend

KINDS: dict[str, type[Server]] = {
    "mariadb": MariaDB,
    "postgresql": PostgreSQL,
    "redis": Redis,
    "pgbouncer": PgBouncer,
    "pgbouncer-1": OnePgBouncer,
}
DATABASES = ("aiosqlite", "asyncmy", "asyncpg")
FIXTURES = {
    "sqlite": "sqlite",
    "mariadb_port": "mariadb",
    "postgresql_port": "postgresql",
    "redis_url": "redis",
}
MISSING = "is not installed"
WORKER_KEY = "asgi_uow_server_ports"
SERVERS = pytest.StashKey["RunningServers"]()
APT = threading.Lock()


def install(kind: type[Server]) -> None:  # pragma: no cover - needs a network
    """Install a server with apt-get, if root and if there is one."""
    if is_root() and shutil.which("apt-get"):
        command = ["apt-get", "install", "--yes", "--no-install-recommends"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        with APT:
            for words in (["apt-get", "update"], [*command, kind.package]):
                print(f"{kind.name} {MISSING}: {' '.join(words)}")  # noqa: T201
                # Errors are shown, progress is not.
                subprocess.run(words, env=environment, stdout=DEVNULL, check=False)


class RunningServers:
    """The servers of this test run, each started when first asked for."""

    def __init__(
        self,
        ports: Mapping[str, int | None],
        kinds: Mapping[str, type[Server]] = KINDS,
        install: Callable[[type[Server]], None] = install,
    ) -> None:
        self._ports = dict(ports)
        self._kinds = kinds
        self._install = install
        self._servers: list[Server] = []

    def port(self, kind: str) -> int | None:
        """Return the port of a server, None if it is not installed."""
        if kind not in self._ports:
            self._ports[kind] = self._start(self._kinds[kind])
        return self._ports[kind]

    def ports(self) -> dict[str, int | None]:
        """Return the ports of all kinds, started side by side."""
        first = (kind for kind in self._kinds if self._kinds[kind].behind is None)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.port, first))
            ports = pool.map(self.port, self._kinds)
            return dict(zip(self._kinds, ports, strict=True))

    def stop(self) -> None:
        while self._servers:
            self._servers.pop().close()

    def _start(self, kind: type[Server]) -> int | None:
        if not kind.is_installed():
            self._install(kind)
        if not kind.is_installed():
            return None
        behind = () if kind.behind is None else (self.port(kind.behind),)
        if None in behind:
            return None
        server = kind(*map(str, behind))
        self._servers.append(server)
        server.start()
        return server.port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--db",
        action="append",
        choices=["sqlite", *KINDS],
        help="run only what this database is enough for; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on(*drivers, **options): see tests.support")
    config.addinivalue_line("markers", "direct: counts what a pooler changes")
    workerinput = getattr(config, "workerinput", {})
    behind = {KINDS[kind].behind for kind in wanted(config) if kind in KINDS}
    kinds = {kind: KINDS[kind] for kind in KINDS if kind in wanted(config) | behind}
    config.stash[SERVERS] = RunningServers(workerinput.get(WORKER_KEY, {}), kinds)
    if not workerinput:  # being terminated is being interrupted: servers stop
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[SERVERS].stop()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    node.workerinput[WORKER_KEY] = node.config.stash[SERVERS].ports()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marks = metafunc.definition.iter_markers("on")
        drivers = next((mark.args for mark in marks if mark.args), DATABASES)
        if "pgbouncer" in (metafunc.config.getoption("--db") or ()):
            drivers = tuple(behind_pgbouncer(driver) for driver in drivers)
        metafunc.parametrize("backend", drivers, indirect=True)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    others = [item for item in items if not needs(item) <= wanted(config)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def needs(item: pytest.Item) -> set[str]:
    """Name the databases that can be known before the test runs."""
    assert isinstance(item, pytest.Function)
    kinds = {FIXTURES[name] for name in item.fixturenames if name in FIXTURES}
    params = item.callspec.params if hasattr(item, "callspec") else {}
    kinds |= {kind_of(str(params["backend"]))} if "backend" in params else set()
    is_pooled = item.get_closest_marker("direct") and "pgbouncer" in kinds
    return kinds | {"no pooler"} if is_pooled else kinds


def wanted(config: pytest.Config) -> set[str]:
    return set(config.getoption("--db") or ["sqlite", *KINDS])


def kind_of(driver: str) -> str:
    kinds = {"aiosqlite": "sqlite", "asyncmy": "mariadb"}
    behind = {"": "postgresql", "1": "pgbouncer-1", "4": "pgbouncer"}
    return kinds.get(driver) or behind[driver.partition("@")[2]]


def behind_pgbouncer(driver: str) -> str:
    return f"{driver}@4" if kind_of(driver) == "postgresql" else driver


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if count := sum(MISSING in str(report.longrepr) for report in skipped):
        title = f"{count} tests did not run: their database server {MISSING}"
        terminalreporter.section(title, sep="!", red=True, bold=True)


def server_port(config: pytest.Config, kind: str) -> int:
    """Return the port of this run's server; without one skip, in CI fail."""
    if kind not in wanted(config):
        pytest.skip(f"{kind} is not named by --db")
    port = config.stash[SERVERS].port(kind)
    return miss(kind) if port is None else port


def require(
    kind: type[Server], install: Callable[[type[Server]], None] = install
) -> None:
    """Install what a test starts by itself; where that fails skip, in CI fail."""
    if not kind.is_installed():
        install(kind)
    if not kind.is_installed():
        miss(kind.name)


def miss(kind: str) -> NoReturn:
    """Skip a test whose server is not installed; in CI fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{kind} {MISSING}")
    pytest.skip(f"{kind} {MISSING}")


def make_backend(request: pytest.FixtureRequest, driver: str) -> Backend:
    """Return the backend for a driver, not yet entered."""
    kind = kind_of(driver)
    if kind == "sqlite":
        return SQLiteBackend(request.getfixturevalue("tmp_path"))
    port = server_port(request.config, kind)
    if kind == "mariadb":
        return MariaDBBackend(port)
    if kind == "postgresql":
        return PostgreSQLBackend(port, driver)
    server = request.config.stash[SERVERS].port("postgresql")
    assert server is not None
    return PgBouncerBackend(server, port, driver.partition("@")[0])


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests run on asyncio, the only event loop of SQLAlchemy."""
    return "asyncio"


@pytest.fixture
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """An empty database on SQLite, MariaDB, PostgreSQL in turn, or as `on()` says."""
    async with make_backend(request, request.param) as backend:
        yield backend


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SQLiteBackend]:
    """An empty SQLite database file."""
    async with SQLiteBackend(tmp_path) as backend:
        yield backend


@pytest.fixture
def mariadb_port(pytestconfig: pytest.Config) -> int:
    """The port of this run's MariaDB."""
    return server_port(pytestconfig, "mariadb")


@pytest.fixture
def postgresql_port(pytestconfig: pytest.Config) -> int:
    """The port of this run's PostgreSQL."""
    return server_port(pytestconfig, "postgresql")


@pytest.fixture
async def mariadb(mariadb_port: int) -> AsyncIterator[MariaDBBackend]:
    """An empty database on MariaDB."""
    async with MariaDBBackend(mariadb_port) as backend:
        yield backend


@pytest.fixture
async def postgresql(postgresql_port: int) -> AsyncIterator[PostgreSQLBackend]:
    """An empty database on PostgreSQL."""
    async with PostgreSQLBackend(postgresql_port) as backend:
        yield backend
