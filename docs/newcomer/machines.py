"""Where a newcomer may sit: at this machine, or at a fresh Debian."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

DEBIAN = "trixie"
PACKAGES = "ca-certificates,curl,python3,python3-pip,python3-venv"
FEW_TESTS = "tox run -e py313 -- --db sqlite tests/promises/test_promises.py"
FOREIGN = ("CI", "COVERAGE_", "PYTEST_", "PYTHON", "TOX_", "VIRTUAL_ENV")
NETWORK = ("UV_", "SSL_CERT_", "REQUESTS_CA_", "http", "HTTP", "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Machine:
    """Where the newcomer sits: a folder that is the root, and an environment."""

    root: Path
    home: str
    environment: dict[str, str]
    enter: tuple[str, ...] = ()
    tests: str | None = None


def run(*command: str) -> str:
    """Run a command to its end, and give what it printed."""
    process = subprocess.Popen(  # noqa: S603
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        message = f"{shlex.join(command)}\n{printed[-4000:]}"
        raise RuntimeError(message)
    return printed


def environment(home: str, names: tuple[str, ...], *, kept: bool) -> dict[str, str]:
    """Give what a terminal knows: of ours either these names alone, or all others."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(names) is kept
    }
    return ours | {"HOME": home, "LANG": "C.UTF-8", "TERM": "dumb", "COLUMNS": "80"}


@contextmanager
def this_machine(folder: Path) -> Generator[Machine]:
    """Give a home in a temporary folder, without the environment of the caller."""
    known = environment(str(folder), FOREIGN, kept=False)
    path = os.environ["PATH"].split(os.pathsep)
    known["PATH"] = os.pathsep.join(e for e in path if not e.startswith(sys.prefix))
    yield Machine(Path("/"), str(folder), known)


@contextmanager
def fresh_debian(folder: Path) -> Generator[Machine]:
    """Install Debian into a folder, with the package mirrors of this machine."""
    with ExitStack() as stack:
        stack.callback(unmount_below, folder)
        include = f"--include={PACKAGES}"
        kind = "--variant=minbase"
        run("debootstrap", kind, include, DEBIAN, str(folder), mirror())
        for kind, name in (("proc", "proc"), ("tmpfs", "dev/shm")):
            (folder / name).mkdir(exist_ok=True)
            run("mount", "-t", kind, "none", str(folder / name))
        shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
        (folder / "etc/pip.conf").write_text(pip_configuration(folder))
        copy_certificates(os.environ.get("SSL_CERT_FILE"), folder)
        known = environment("/home/newcomer", NETWORK, kept=True)
        known["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        enter = ("chroot", str(folder))
        yield Machine(folder, "/home/newcomer", known, enter, FEW_TESTS)


def unmount_below(folder: Path) -> None:
    """Leave no file system of the machine in a folder that will be deleted."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        _, where, *_ = line.split()
        if Path(where).is_relative_to(folder):
            run("umount", "--lazy", where)


def mirror() -> str:
    """Give where apt gets Debian from."""
    wanted = "$(REPO_URI) $(ORIGIN) $(LABEL) $(COMPONENT)"
    for line in run("apt-get", "indextargets", "--format", wanted).splitlines():
        address, *what = line.split()
        if what == ["Debian", "Debian", "main"]:
            return address
    message = "apt knows no mirror of Debian: run apt-get update"
    raise RuntimeError(message)


def pip_configuration(folder: Path) -> str:
    """Give pip's own for the other machine: what is a file here is not there."""
    options: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, quoted = line.partition("=")
        option, value = name.rpartition(".")[2], quoted.strip("'\"")
        if option == "cert":
            copy_certificates(value, folder)
        else:
            words = value.split()
            value = " ".join(w for w in words if not w.startswith(("/", "file:")))
        if value:
            options.setdefault(option, value)
    lines = [f"{option} = {value}" for option, value in options.items()]
    return "\n".join(["[global]", *lines, ""])


def copy_certificates(file: str | None, folder: Path) -> None:
    """Have the other machine trust whom this one trusts."""
    if file:
        target = folder / file.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def missing() -> str:
    """Say what a Debian of our own needs and this machine has not."""
    if os.geteuid():
        return "root"
    if not Path("/usr/share/debootstrap/scripts", DEBIAN).exists():
        return f"debootstrap that knows {DEBIAN}"
    return "" if shutil.which("apt-get") else "apt-get"
