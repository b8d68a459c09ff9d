"""Follow the pages; 0 if all is as shown, or if it cannot be tried here."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .machines import fresh_debian, missing, run, this_machine
from .pages import ROOT, Newcomer, read_page
from .terminal import NotAsShown

if TYPE_CHECKING:
    from .machines import Machine

PAGES = ("README.md", "docs/tutorial.md")
PORT = 8000
SECONDS = 600


def check_out(folder: Path) -> None:
    """Copy what is in the repository, and what is about to be."""
    listed = run("git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (source := ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


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
    sit = this_machine if here else fresh_debian
    with (
        tempfile.TemporaryDirectory(prefix="newcomer-") as folder,
        sit(Path(folder)) as machine,
    ):
        print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
        follow(machine)
    print(f"done after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
