"""What the tour plays and the buttons of the page do, and what is promised then."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .orders import Wanted


@dataclasses.dataclass(frozen=True)
class Step:
    """One request and the promise that goes with it."""

    title: str
    path: str
    wanted: Wanted
    answers: tuple[int, ...]
    kept: bool = False
    """Kept: one order more, the goods gone, a mail sent. Otherwise nothing of it."""


CUP: Wanted = {"customer": "Ann", "product": "tea", "quantity": 1}
SHIPLOAD: Wanted = {"customer": "Ann", "product": "tea", "quantity": 500}

STEPS = (
    Step("An order is placed", "/orders", CUP, (201,), kept=True),
    Step("Out of stock, found after the INSERT", "/orders", SHIPLOAD, (409,)),
    Step("A dry run: answered 200, not to be kept", "/orders/dry-run", CUP, (200,)),
    Step("The handler crashes after the INSERT", "/accidents/crash", CUP, (500,)),
    Step("The handler answers 201, COMMIT fails", "/accidents/commit", CUP, (500, 503)),
    Step("A DELETE on the read session", "/accidents/read-session", CUP, (500,)),
    Step("An order again: nothing is left behind", "/orders", CUP, (201,), kept=True),
)
