"""A terminal: what is pasted into it is executed, what it prints can be read."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machines import Machine

PATIENCE = 300  # seconds for one command
COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class NotAsShown(Exception):  # noqa: N818 - it says what is wrong with a page
    """A page says something else than what happens."""


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
        try:
            printed = self.wait("<done>", since, PATIENCE)
        except NotAsShown:
            message = f"{code.strip()}\nfailed or did not end:\n{self.text[since:]}"
            raise NotAsShown(message) from None
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
