"""The blocks of a page, and what a newcomer does with them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .terminal import PATIENCE, NotAsShown, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    from .machines import Machine

ROOT = Path(__file__).resolve().parent.parent.parent
ALL_TESTS = "tox run"
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`(\w+\.py)`")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


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
        self._server.wait(shown, self._seen, PATIENCE if not self._ready else 60)
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
