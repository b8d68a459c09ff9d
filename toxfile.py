"""What tox does beyond `tox.ini`: it says last how many tests did not run."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from tox.plugin import impl

if TYPE_CHECKING:
    from tox.execute import Outcome
    from tox.tox_env.api import ToxEnv


@impl
def tox_after_run_commands(tox_env: ToxEnv, outcomes: list[Outcome]) -> None:
    """Repeat that line of the tests below the report of all environments."""
    for line in "\n".join(outcome.out for outcome in outcomes).splitlines():
        if "tests did not run" in line:
            atexit.register(print, f"{tox_env.name}: {line.strip('! ')}")
