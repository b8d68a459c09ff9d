"""The gate asks for every line only where every line can be seen."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest

from tests.gate import ALONE, judge
from tests.servers import MariaDB


class Installed(MariaDB):
    binaries: ClassVar[tuple[str, ...]] = ("sh",)


class NotInstalled(MariaDB):
    binaries: ClassVar[tuple[str, ...]] = ("no-such-database-server",)


COMBINE = ["coverage", "combine", "--quiet"]
REPORT = ["coverage", "report", "--omit", "x"]


@pytest.mark.parametrize(
    ("codes", "commands"),
    [([0, 0], [COMBINE, REPORT]), ([0, 2], [COMBINE, REPORT]), ([1], [COMBINE])],
)
def test_judged(codes: list[int], commands: list[list[str]]) -> None:
    """After a whole run the verdict is that of coverage."""
    called: list[list[str]] = []

    def call(command: list[str]) -> int:
        called.append(command)
        return codes[len(called) - 1]

    arguments = ["--omit", "x", "--"]
    code = judge(arguments, version=(3, 12), kinds=[Installed], call=call)

    assert codes[-1] == code
    assert commands == called


@pytest.mark.parametrize(
    ("asked", "version", "kind", "reason"),
    [
        (["-k", "x"], (3, 13), Installed, "only some of the tests were asked for"),
        ([], (3, 11, 9), Installed, "Python 3.11 does not trace every line"),
        ([], (3, 13), NotInstalled, "not installed: mariadb"),
    ],
    ids=["part", "python", "server"],
)
def test_not_judged(
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    version: tuple[int, ...],
    kind: type[MariaDB],
    reason: str,
) -> None:
    """Where lines may be missing for another reason, one line names the reason."""
    assert 0 == judge(["--", *asked], version=version, kinds=[kind])
    assert capsys.readouterr().out.startswith(f"Coverage is not judged: {reason}")


def test_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that need a server of their own need no other."""
    monkeypatch.setitem(ALONE, "galera", [Installed])
    called: list[list[str]] = []

    def call(command: list[str]) -> int:
        called.append(command)
        return 0

    arguments = ["--needs", "galera", "--omit", "x", "--"]
    assert 0 == judge(arguments, version=(3, 12), kinds=[NotInstalled], call=call)
    assert [COMBINE, REPORT] == called


def test_command() -> None:
    """tox calls the gate as a module."""
    command = [sys.executable, "-m", "tests.gate", "--omit", "x", "--", "-x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Coverage is not judged: only some of the tests")
