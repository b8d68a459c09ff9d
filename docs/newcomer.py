"""Follow README.md and docs/tutorial.md as a newcomer does, by copy and paste.

Without arguments in a fresh Debian 13, with `--here` on this machine; `tox run -e
newcomer` runs it. The blocks of a page are taken in order:

- `sh` is pasted into a terminal whose folder was the checkout. A block that ends with
  uvicorn gets a second terminal, where the server runs on.
- `python` is written to the file that the text before it names: to its end where the
  text says so.
- `text` is what the command before it has to have printed, or, where the text before
  it names the server, what the server has to print. Where that text says that
  something differs, numbers are not compared.

The command for all tests takes too long, so it is left out with `--here`. In Debian it
runs the tests of one file.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/tutorial.md")
DEBIAN = "trixie"
PACKAGES = "ca-certificates,curl,python3,python3-pip,python3-venv"
ALL_TESTS = "tox run"
FEW_TESTS = "tox run -e py313 -- tests/test_decision.py"
SECONDS = 600
PORT = 8000

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`(\w+\.py)`")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
FOREIGN = ("CI", "COVERAGE_", "PYTEST_", "PYTHON", "TOX_", "VIRTUAL_ENV")
NETWORK = ("UV_", "SSL_CERT_", "REQUESTS_CA_", "http", "HTTP", "no_proxy", "NO_PROXY")


class NotAsShown(Exception):  # noqa: N818 - it says what is wrong with a page
    """A page says something else than what happens."""


def run(*command: str) -> str:
    """Run a command to its end, and give what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        message = f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        raise RuntimeError(message)
    return done.stdout


@dataclass(frozen=True)
class Block:
    """A block of a page, and the text between it and the block before."""

    place: str
    language: str
    code: str
    before: str


def read_page(page: str) -> Iterator[Block]:
    """Give the blocks that a reader sees."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    end = 0
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page}:{line}", found[1], found[2], text[end : found.start()])
        end = found.end()


@dataclass(frozen=True)
class Machine:
    """Where the newcomer sits: a folder that is the root, and an environment."""

    root: Path
    home: str
    environment: dict[str, str]
    enter: tuple[str, ...] = ()
    tests: str | None = None


class Terminal:
    """A bash that writes to a terminal, and what can be read there."""

    def __init__(self, machine: Machine, folder: str) -> None:
        self._screen, inside = pty.openpty()
        self._bash = subprocess.Popen(  # noqa: S603
            [*machine.enter, "bash"],
            stdin=subprocess.PIPE,
            stdout=inside,
            stderr=inside,
            env=machine.environment,
            start_new_session=True,
        )
        os.close(inside)
        self._raw = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.folder = folder
        self.paste(f"set -e; cd {shlex.quote(folder)}")

    def _read(self) -> None:
        try:
            while piece := os.read(self._screen, 65536):
                self._raw += piece
        except OSError:  # Linux says so when the last writer has gone.
            return

    @property
    def text(self) -> str:
        """All that was printed until now, without colours."""
        raw = self._raw.decode(errors="replace").replace("\r\n", "\n")
        return COLOURS.sub("", raw)

    def wait(self, wanted: str, since: int, seconds: float) -> str:
        """Give what was printed up to a text, or raise."""
        end = time.monotonic() + seconds
        while wanted not in self.text[since:]:
            if time.monotonic() > end or not self._reader.is_alive():
                printed = self.text[since:][-4000:]
                message = f"did not print {wanted.strip()!r}, but:\n{printed}"
                raise NotAsShown(message)
            time.sleep(0.05)
        return self.text[since:].partition(wanted)[0]

    def type(self, line: str) -> None:
        """Type what need not have an end."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{line}\n".encode())
        self._bash.stdin.flush()

    def paste(self, code: str) -> str:
        """Run commands to their end; one that fails ends the terminal."""
        since = len(self.text)
        self.type(f"eval {shlex.quote(code)} </dev/null")
        self.type("""printf '<%s>%s<end>\\n' done "$PWD" """)
        printed = self.wait("<done>", since, SECONDS)
        where = self.wait("<end>", since + len(printed) + len("<done>"), 10)
        self.folder = where
        return printed

    def close(self) -> None:
        """Press Ctrl-C, and close the window."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._bash.pid, number)
                self._bash.wait(10)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        self._bash.communicate()
        os.close(self._screen)


class Newcomer:
    """Does what a page says, and compares."""

    def __init__(self, machine: Machine, stack: ExitStack) -> None:
        self.machine = machine
        self._stack = stack
        self._server: Terminal | None = None
        self._reloads = self._started = False
        self._ready = ""
        self._seen = 0
        self._first = self._open()
        self._printed = ""

    def _open(self) -> Terminal:
        terminal = Terminal(self.machine, f"{self.machine.home}/asgi-uow")
        self._stack.callback(terminal.close)
        return terminal

    def do(self, block: Block) -> None:
        """Do what a block is for."""
        {"python": self.save, "sh": self.execute, "text": self.compare}[block.language](
            block
        )

    def save(self, block: Block) -> None:
        """Write a file, or add to it; a server that watches it starts again."""
        [*_, name] = FILE.findall(block.before)
        file = self.machine.root / self._first.folder.lstrip("/") / name
        adds = f"end of `{name}`" in block.before
        if adds != file.exists():
            message = f"{name} exists: {file.exists()}, is added to: {adds}"
            raise NotAsShown(message)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(f"\n\n{block.code}" if adds else block.code)
        if adds and self._server and self._reloads:
            self._see(self._ready)

    def execute(self, block: Block) -> None:
        """Paste commands into a terminal."""
        *_, last = block.code.splitlines()
        if last.startswith("uvicorn"):
            self._server = self._open()
            self._reloads, self._started = "--reload" in last, True
            self._seen = len(self._server.text)
            self._server.type(f"eval {shlex.quote(block.code)} </dev/null")
            return
        code = block.code
        if code.rstrip().endswith(ALL_TESTS):
            if self.machine.tests is None:
                print(f"{block.place}: left out, it takes too long")
                return
            code = code.rstrip().removesuffix(ALL_TESTS) + self.machine.tests
        self._printed, self._started = self._first.paste(code), False

    def _see(self, shown: str) -> None:
        assert self._server is not None
        self._server.wait(shown, self._seen, SECONDS)
        self._seen += self._server.text[self._seen :].index(shown) + len(shown)

    def compare(self, block: Block) -> None:
        """See whether a terminal shows what the page shows."""
        shown, printed = block.code.strip(), self._printed.strip()
        if self._started or "server" in block.before:
            self._see(shown)
            self._ready = self._ready or shown
            return
        if "differs" in block.before:
            shown, printed = NUMBER.sub("0", shown), NUMBER.sub("0", printed)
        if shown != printed:
            message = f"the page shows\n{shown}\nand the command printed\n{printed}"
            raise NotAsShown(message)


def check_out(folder: Path) -> None:
    """Copy what is in the repository, and what is about to be."""
    listed = run("git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (source := ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


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
    run(
        "debootstrap",
        "--variant=minbase",
        f"--include={PACKAGES}",
        DEBIAN,
        str(folder),
        mirror(),
    )
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
    (folder / "etc/pip.conf").write_text(pip_configuration(folder), encoding="utf-8")
    copy_certificates(os.environ.get("SSL_CERT_FILE"), folder)
    known = environment("/home/newcomer", NETWORK, kept=True)
    known["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    with ExitStack() as stack:
        for kind, name in (("proc", "proc"), ("tmpfs", "dev/shm")):
            (folder / name).mkdir(exist_ok=True)
            run("mount", "-t", kind, "none", str(folder / name))
            stack.callback(run, "umount", "--lazy", str(folder / name))
        enter = ("chroot", str(folder))
        yield Machine(folder, "/home/newcomer", known, enter, FEW_TESTS)


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
    lines = ["[global]"]
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, quoted = line.partition("=")
        option, value = name.rpartition(".")[2], quoted.strip("'\"")
        if option == "cert":
            copy_certificates(value, folder)
        else:
            words = value.split()
            value = " ".join(w for w in words if not w.startswith(("/", "file:")))
        if value:
            lines.append(f"{option} = {value}")
    return "\n".join([*lines, ""])


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


def follow(machine: Machine) -> None:
    """Go through the pages, each with terminals of its own."""
    check_out(machine.root / machine.home.lstrip("/") / "asgi-uow")
    for page in PAGES:
        with ExitStack() as stack:
            newcomer = Newcomer(machine, stack)
            blocks = list(read_page(page))
            for block in blocks:
                try:
                    newcomer.do(block)
                except NotAsShown as error:
                    sys.exit(f"{block.place}: {error}")
        print(f"{page}: {len(blocks)} blocks are as shown", flush=True)


def give_up(*_: object) -> NoReturn:
    """Take down what was started, in the `finally` of each."""
    sys.exit(f"not done after {SECONDS} seconds, or ended from outside")


def main(arguments: list[str]) -> int:
    """Follow the pages; 0 if all is as shown, or if it cannot be tried here."""
    here = arguments == ["--here"]
    if not here and (what := missing()):
        print(f"0 blocks were tried: this needs {what}; --here needs nothing")
        return 1 if os.environ.get("CI") else 0
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", PORT)) == 0:
            print(f"0 blocks were tried: something listens on port {PORT}")
            return 1
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, give_up)
    signal.alarm(SECONDS)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        with (this_machine if here else fresh_debian)(Path(folder)) as machine:
            print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
            follow(machine)
    print(f"done after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
