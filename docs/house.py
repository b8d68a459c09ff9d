"""Draw the house: which rooms `asgi_uow` has, and that imports only point downward.

The floors are the import contracts of `pyproject.toml`. After a change of these run
`python docs/house.py`, which writes `docs/house.svg`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURE = DOCS / "house.svg"

WIDTH = 720
LEFT = 44
RIGHT = WIDTH - 24
ROOF = 84
LINE = 18
PADDING = 10
GAP = 8
CHARACTER = 7.9
"""The width of a letter, in a monospaced font of 13 pixels."""

STYLE = """\
  .ground { fill: #ffffff; }
  .room { fill: #eef3f9; stroke: #5b6b7d; }
  .roof { fill: #dbe7f3; stroke: #5b6b7d; }
  .arrow { fill: none; stroke: #5b6b7d; stroke-width: 1.5; }
  text { fill: #1b2530; font: 13px ui-monospace, "DejaVu Sans Mono", Menlo,
    Consolas, monospace; }
  .name { font-weight: bold; }
  .quiet { fill: #4a5866; font-size: 12px; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #12171d; }
    .room { fill: #1d2733; stroke: #8496a9; }
    .roof { fill: #263648; stroke: #8496a9; }
    .arrow { stroke: #8496a9; }
    text { fill: #e6edf3; }
    .quiet { fill: #b3c0cc; }
  }"""


@dataclasses.dataclass(frozen=True)
class Room:
    """A module, or a package with its own floors."""

    name: str
    floors: tuple[str, ...]

    @property
    def letters(self) -> int:
        return max(map(len, (self.name, *self.floors)))

    @property
    def height(self) -> int:
        return LINE * (1 + len(self.floors)) + PADDING


def rooms_of(layer: str) -> list[str]:
    """Names the rooms of one line of a contract that are built, as it orders them."""
    names = [name.strip() for name in layer.replace(":", "|").split("|")]
    return [name for name in names if not name.startswith("(")]


def house(project: dict[str, Any]) -> tuple[str, list[list[Room]]]:
    """Read the contracts: the name of the house, and its floors from the top."""
    linter = project["tool"]["importlinter"]
    root = linter["root_package"]
    contracts = {
        container: contract["layers"]
        for contract in linter["contracts"]
        if contract["type"] == "layers"
        for container in contract["containers"]
    }
    floors = [
        [
            Room(
                name,
                tuple(
                    " · ".join(rooms_of(inner))
                    for inner in contracts.get(f"{root}.{name}", ())
                ),
            )
            for name in rooms_of(layer)
        ]
        for layer in contracts[root]
    ]
    return root, [floor for floor in floors if floor]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:g}" y="{y:g}"{kind}{anchor}>{escape(words)}</text>'


def draw_floor(rooms: list[Room], top: int, number: int) -> list[str]:
    """Draw rooms side by side, each as wide as its longest line asks for."""
    height = max(room.height for room in rooms)
    spare = RIGHT - LEFT - GAP * (len(rooms) - 1)
    letters = sum(room.letters for room in rooms)
    drawn = [text(LEFT - 14, top + LINE + 2, str(number), "quiet", "middle")]
    x = float(LEFT)
    for room in rooms:
        width = round(spare * room.letters / letters, 1)
        if width < room.letters * CHARACTER + 2 * PADDING:
            message = f"{room.name} does not fit: give its floor two lines"
            raise ValueError(message)
        drawn.append(
            f'<rect class="room" x="{x:g}" y="{top}" width="{width:g}"'
            f' height="{height}" rx="4"/>'
        )
        drawn.append(text(x + PADDING, top + LINE + 1, room.name, "name"))
        drawn += [
            text(x + PADDING, top + LINE * line + 1, floor)
            for line, floor in enumerate(room.floors, start=2)
        ]
        x = round(x + width + GAP, 1)
    return drawn


def draw(project: dict[str, Any]) -> str:
    """Give the picture for what `pyproject.toml` says."""
    root, floors = house(project)
    middle = (LEFT + RIGHT) / 2
    roof = f"{LEFT - 10},{ROOF - 6} {middle:g},12 {RIGHT + 10},{ROOF - 6}"
    drawn = [
        f'<polygon class="roof" points="{roof}"/>',
        text(middle, ROOF - 32, root, "name", "middle"),
        text(middle, ROOF - 14, "the public names", "quiet", "middle"),
    ]
    top = ROOF
    for number, rooms in enumerate(floors):
        drawn += draw_floor(rooms, top, len(floors) - number)
        top += max(room.height for room in rooms) + GAP
    x, end = LEFT - 30, top - GAP
    drawn.append(f'<path class="arrow" d="M{x} {ROOF} V{end} m-4 -7 l4 7 l4 -7"/>')
    rule = "A room, and a line inside one, imports only what is below it."
    drawn.append(text(LEFT, end + 20, rule, "quiet"))
    height = end + 32
    size = f'width="{WIDTH}" height="{height}"'
    says = f"The packages of {root}, floor by floor"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    return "\n".join(
        [
            f'{opening} {size} role="img" aria-label="{says}">',
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="ground" {size} rx="8"/>',
            *drawn,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    contracts = DOCS.parent / "pyproject.toml"
    picture = draw(tomllib.loads(contracts.read_text(encoding="utf-8")))
    PICTURE.write_text(picture, encoding="utf-8")
