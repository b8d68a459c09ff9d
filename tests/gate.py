"""Require that the tests ran every line, on a machine where that can be measured.

tox calls it after the tests, in their environment, with options of `coverage report`,
"--", and what pytest was asked for: `python -m tests.gate --omit "docs/*" --`. Tests
with a server of their own have `--needs galera` before that.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.integration.browser.servers import Chromium
from tests.integration.galera.servers import GaleraNode
from tests.integration.patroni.servers import PATRONI
from tests.servers.plugin import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.servers import Server

ALONE: dict[str, Sequence[type[Server]]] = {
    "cluster": [*KINDS.values(), Chromium],
    "galera": [GaleraNode],
    "patroni": PATRONI,
}


def judge(
    arguments: list[str],
    *,
    version: tuple[int, ...] = sys.version_info[:2],
    kinds: Iterable[type[Server]] = KINDS.values(),
    call: Callable[[list[str]], int] = subprocess.call,
) -> int:
    """Return the exit code, after the report or a line that says why there is none."""
    end = arguments.index("--")
    options, asked = arguments[:end], arguments[end + 1 :]
    if options[:1] == ["--needs"]:
        kinds, options = ALONE[options[1]], options[2:]
    missing = [kind.name for kind in kinds if not kind.is_installed()]
    if asked:
        reason = "only some of the tests were asked for"
    elif version < (3, 12):
        reason = "Python 3.11 does not trace every line after a cancellation"
    elif missing:
        reason = f"not installed: {', '.join(missing)}"
    else:
        combined = call(["coverage", "combine", "--quiet"])
        return combined or call(["coverage", "report", *options])
    print(f"Coverage is not judged: {reason}")  # noqa: T201  # tox shows it
    return 0


if __name__ == "__main__":
    sys.exit(judge(sys.argv[1:]))
