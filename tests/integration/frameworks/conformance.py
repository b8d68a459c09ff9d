"""The conformance suite: each fact, stated once, for every framework.

What a framework calls things is its adapter's.
"""

from __future__ import annotations

from tests.integration.frameworks.case import FACTS
from tests.integration.frameworks.facts import (
    commits,
    context,
    errors,
    keys,
    replays,
    responses,
    units,
)

__all__ = [
    "FACTS",
    "commits",
    "context",
    "errors",
    "keys",
    "replays",
    "responses",
    "units",
]
