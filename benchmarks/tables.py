"""Tables of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print words to the left and numbers to the right; a question stands once."""
    rows = [titles, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    previous = ""
    for question, contestant, *numbers in rows:
        cells = ["" if question == previous else question, contestant]
        texts = map(str.ljust, cells, widths[:2])
        aligned = map(str.rjust, numbers, widths[2:])
        print("  ".join([*texts, *aligned]))
        previous = question
