"""The truth table of the benchmarks: a cell says what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.contestants import variants
from benchmarks.truth import CASES, Attempt

if TYPE_CHECKING:
    from tests.servers import PostgreSQLBackend


@pytest.mark.parametrize(
    ("contestant", "case", "expected"),
    [
        ("hand-written", "COMMIT fails", "500, not kept"),
        ("yield dependency", "COMMIT fails", "200, row lost"),
        ("ours", "COMMIT fails", "500, not kept"),
        ("hand-written", "answer to COMMIT is lost", "500, row kept"),
        ("ours, resolve_unknown=True", "answer to COMMIT is lost", "200, row kept"),
        ("hand-written", "error swallowed, 200", "200, row lost"),
        ("ours", "error swallowed, 200", "500, not kept"),
        ("hand-written", "409 returned", "409, row kept"),
        ("ours", "409 returned", "409, not kept"),
        ("ours", "HTTPException(409)", "409, not kept"),
        ("ours", "handler raises", "500, not kept"),
        ("hand-written", "client hangs up", "row kept, connection returned"),
        ("ours", "client hangs up", "row kept, connection returned"),
        ("ours", "task cancelled", "not kept, connection returned"),
        ("ours", "scope cancelled", "not kept, connection returned"),
    ],
)
async def test_cell(
    postgresql: PostgreSQLBackend, contestant: str, case: str, expected: str
) -> None:
    """A cell has the status that reached the client, and whether the row is there."""
    attempt = Attempt(variants(is_postgresql=True)[contestant], postgresql)
    assert expected == await CASES[case](attempt)
