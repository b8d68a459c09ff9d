"""MariaDB and PostgreSQL as child processes with throw-away data."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

HOST = "127.0.0.1"
POLL_SECONDS = 0.005
# Below the ephemeral range: no outgoing connection takes the port of a server
# that is down for a moment.
PORTS = range(20_000, 32_000)


class ServerError(RuntimeError):
    """A server did not start; the end of its log is in the message."""

    def __init__(self, server: Server) -> None:
        super().__init__(f"{server.name} did not start: {server.log()[-2000:]}")


def is_root() -> bool:
    return os.geteuid() == 0


def find_binary(name: str) -> str | None:
    """Return the path of a program, also where Debian keeps it off PATH."""
    places = [os.environ.get("PATH", ""), "/usr/sbin"]
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(map(str, versions), reverse=True)
    return shutil.which(name, path=os.pathsep.join(places))


def free_port() -> int:
    """Return a loopback port on which nobody listens right now."""
    return next(filter(is_free, random.sample(PORTS, len(PORTS))))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


class Server(ABC):
    """One private server: its own port, folder, data and log.

    `start()` returns when the server answers, and may be called again after
    `stop()` or `kill()`: same port, same data. As a context manager it starts,
    stops, and removes its folder. What was committed survives `kill()`, since
    the operating system has it; nothing waits for a disk.
    """

    name: ClassVar[str]
    binaries: ClassVar[tuple[str, ...]]
    package: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    account: ClassVar[str | None]
    behind: ClassVar[str | None] = None
    """The name of the server that it stands in front of."""
    boot_seconds = 60.0
    stop_seconds = 30.0

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"asgi-uow-{self.name}-"))
        self.data = self.folder / "data"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        if self._run_as is not None:
            shutil.chown(self.folder, self._run_as, self._run_as)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @classmethod
    def is_installed(cls) -> bool:
        return all(find_binary(name) for name in cls.binaries)

    @property
    def pid(self) -> int | None:
        """The process id while the server runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    @property
    def _run_as(self) -> str | None:
        return self.account if is_root() else None

    @abstractmethod
    def _initialise(self) -> list[str]:
        """Return the command that makes the data folder."""

    @abstractmethod
    def _serve(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    @abstractmethod
    def _answers(self, client: socket.socket) -> bool:
        """Return whether the server accepts clients."""

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server, wait until it answers."""
        if not self.data.exists() and self._spawn(self._initialise()).wait() != 0:
            shutil.rmtree(self.data, ignore_errors=True)
            raise ServerError(self)
        deadline = time.monotonic() + self.boot_seconds
        while not self._boot(deadline):
            # Backends of a killed PostgreSQL may outlive it for a moment; the
            # next one refuses to start until they have let go of its memory.
            if time.monotonic() > deadline or "still in use" not in self.log()[-500:]:
                raise ServerError(self)

    def stop(self) -> None:
        """Shut down in order, as an administrator would."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End the server at once with SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server, remove its folder."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        account = self._run_as
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [find_binary(command[0]) or command[0], *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=account,
                group=account,
                extra_groups=() if account else None,
                start_new_session=True,  # Ctrl-C is for the tests alone
            )

    def _boot(self, deadline: float) -> bool:
        process = self._process = self._spawn([*self._serve(), *self._options])
        while not self._is_ready():
            if time.monotonic() > deadline:
                self.kill()
                return False
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            self._process = None
            return False
        return True

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as client:
                return self._answers(client)
        except OSError:
            return False

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class MariaDB(Server):
    """A MariaDB with the users `root` (all rights) and `app` (all on `test_%`)."""

    name = "mariadb"
    binaries: ClassVar[tuple[str, ...]] = ("mariadbd", "mariadb-install-db")
    package = "mariadb-server"
    stop_signal = signal.SIGTERM
    account = None

    def _initialise(self) -> list[str]:
        (self.folder / "init.sql").write_text(
            "CREATE USER IF NOT EXISTS app@'%';\n"
            "GRANT ALL ON `test\\_%`.* TO app@'%';\n"
        )
        return [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self.data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
            "--innodb-log-file-size=16M",
            f"--tmpdir={self.folder}",  # each removes what it finds there
            *self._as_root(),
        ]

    def _serve(self) -> list[str]:
        return [
            "mariadbd",
            "--no-defaults",
            f"--datadir={self.data}",
            f"--port={self.port}",
            f"--bind-address={HOST}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--tmpdir={self.folder}",
            f"--init-file={self.folder / 'init.sql'}",
            "--skip-name-resolve",
            "--max-connections=400",
            "--character-set-server=utf8mb4",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            "--innodb-flush-method=nosync",
            "--innodb-flush-log-at-trx-commit=2",
            *self._as_root(),
        ]

    def _as_root(self) -> list[str]:
        return ["--user=root"] if is_root() else []

    def _answers(self, client: socket.socket) -> bool:
        greeting = client.recv(5)
        return greeting[4:] == b"\x0a"


class PostgreSQL(Server):
    """A PostgreSQL with the superuser `postgres`; its files belong to `postgres`.

    It asks the members of the role `with_password`, if there is one, for theirs.
    """

    name = "postgresql"
    binaries: ClassVar[tuple[str, ...]] = ("postgres", "initdb")
    package = "postgresql"
    stop_signal = signal.SIGINT  # "fast": roll back and disconnect everybody
    account = "postgres"

    def _initialise(self) -> list[str]:
        return [
            "initdb",
            f"--pgdata={self.data}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]

    def _serve(self) -> list[str]:
        (self.folder / "hba.conf").write_text(
            "host all +with_password all scram-sha-256\n"
            "host all,replication all 127.0.0.1/32 trust\n"
            "local all all trust\n"
        )
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": self.folder,
            "hba_file": self.folder / "hba.conf",
            "max_connections": 200,
            "max_prepared_transactions": 16,
            "shared_buffers": "32MB",
            "fsync": "off",
            "full_page_writes": "off",
            "autovacuum": "off",
        }
        pairs = [f"--{key}={value}" for key, value in settings.items()]
        return ["postgres", "-D", str(self.data), "-p", str(self.port), *pairs]

    def _answers(self, client: socket.socket) -> bool:
        packet = b"\0\x03\0\0user\0postgres\0\0"
        client.sendall((len(packet) + 4).to_bytes(4) + packet)
        return client.recv(1) == b"R"
