"""Draw the sequences and the states of a unit of work, one SVG file for each.

The script writes `docs/*.svg`; run `python -m docs.pictures` after a change. The
pictures are narrow and their letters large, so that they can be read on a phone.
"""

from __future__ import annotations

import dataclasses
import math
from html import escape
from pathlib import Path

from docs.house import text

DOCS = Path(__file__).parent

WIDTH = 420
MARGIN = 8
LETTER = 9.1
"""The width of a letter, in a monospaced font of 15 pixels."""
ROW = 40
HEAD = 34
BOX = 28

STYLE = """\
  .ground { fill: #ffffff; }
  .box, .frame { fill: #eef3f9; stroke: #5b6b7d; }
  .frame { fill: none; stroke-dasharray: 2 3; }
  .line { stroke: #9aa8b6; stroke-dasharray: 2 4; }
  .arrow { fill: none; stroke: #33475b; stroke-width: 1.5; }
  .reply { stroke-dasharray: 6 4; }
  .good { stroke: #1a7f4b; stroke-width: 2.5; }
  .bad { stroke: #b3261e; stroke-width: 2.5; }
  text { fill: #1b2530; font: 15px ui-monospace, "DejaVu Sans Mono", Menlo,
    Consolas, monospace; }
  .name, .goodtext, .badtext { font-weight: bold; }
  .goodtext { fill: #146c3e; }
  .badtext { fill: #a3211a; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #12171d; }
    .box { fill: #1d2733; }
    .box, .frame { stroke: #8496a9; }
    .line { stroke: #55677a; }
    .arrow { stroke: #b3c0cc; }
    .good { stroke: #58c98b; }
    .bad { stroke: #ff8a80; }
    text { fill: #e6edf3; }
    .goodtext { fill: #7adba6; }
    .badtext { fill: #ffa69e; }
  }"""

LIFELINES = {"client": 45, "asgi-uow": 153, "handler": 263, "database": 367}


@dataclasses.dataclass(frozen=True)
class Message:
    """An arrow from one lifeline to another; `kind` gives it its colour."""

    source: str
    target: str
    words: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Note:
    """What the middleware does by itself, in a box on its lifeline."""

    words: str


@dataclasses.dataclass(frozen=True)
class Heading:
    """Words over the whole width, before a case."""

    words: str


Step = Message | Note | Heading

RECEIVED = (
    Message("client", "asgi-uow", "POST /orders"),
    Message("asgi-uow", "handler", "call"),
    Message("handler", "database", "session: INSERT"),
    Message("handler", "asgi-uow", "201 Created", "reply"),
    Message("asgi-uow", "database", "COMMIT"),
)

SAYS = {
    "sequence": "The handler answers 201. COMMIT is sent and answered, the connection"
    " goes back to its pool, after_commit hooks run. Then the 201 leaves.",
    "commit-fails": "COMMIT fails. All is rolled back, after_rollback hooks run, the"
    " error is raised inside the application, and the client gets a 500.",
    "lost-answer": "The answer to COMMIT is lost. Without a key the client gets a 500."
    " With a key the middleware finds the row of the key; the client gets its 201.",
    "replay": "The first attempt meets a deadlock and is rolled back. The handler is"
    " called again; the client gets the answer of the second attempt.",
    "states": "A unit of work is NEW, ACTIVE or ROLLBACK_ONLY until the decision, then"
    " PREPARING and COMMITTING, or ROLLING_BACK. Then it has one of four outcomes, is"
    " RESPONDING, and is CLOSED.",
}
"""What each picture shows, for those who do not see it."""

SEQUENCES: dict[str, tuple[Step, ...]] = {
    "sequence": (
        *RECEIVED,
        Message("database", "asgi-uow", "committed", "good"),
        Note("connection back in its pool"),
        Note("after_commit hooks"),
        Message("asgi-uow", "client", "201 Created", "good"),
        Note("after_response hooks"),
    ),
    "commit-fails": (
        *RECEIVED,
        Message("database", "asgi-uow", "error", "bad"),
        Message("asgi-uow", "database", "ROLLBACK"),
        Note("after_rollback hooks"),
        Message("asgi-uow", "handler", "CommitFailedError", "bad"),
        Message("asgi-uow", "client", "500", "bad"),
    ),
    "lost-answer": (
        *RECEIVED,
        Message("database", "asgi-uow", "answer is lost", "lost"),
        Heading("Without a key:"),
        Note("outcome UNKNOWN, no hook"),
        Message("asgi-uow", "client", "500", "bad"),
        Heading("With an idempotency key:"),
        Message("asgi-uow", "database", "is the key there?"),
        Message("database", "asgi-uow", "yes", "good"),
        Note("outcome COMMITTED, hooks run"),
        Message("asgi-uow", "client", "201 Created", "good"),
    ),
    "replay": (
        Message("client", "asgi-uow", "PUT /stock"),
        Message("asgi-uow", "handler", "attempt 1"),
        Message("handler", "database", "session: UPDATE"),
        Message("database", "handler", "deadlock", "bad"),
        Message("handler", "asgi-uow", "500", "reply"),
        Note("rolled back, 500 is dropped"),
        Note("a short random pause"),
        Message("asgi-uow", "handler", "attempt 2"),
        Message("handler", "database", "session: UPDATE"),
        Message("handler", "asgi-uow", "200 OK", "reply"),
        Message("asgi-uow", "database", "COMMIT"),
        Message("database", "asgi-uow", "committed", "good"),
        Message("asgi-uow", "client", "200 OK", "good"),
    ),
}

UNDECIDED = ("NEW", "ACTIVE")
SETTLED = ("COMMITTED", "PARTIAL", "UNKNOWN", "ROLLED_BACK")
STEPS = {
    ("NEW",): ("ACTIVE",),
    UNDECIDED: ("ROLLBACK_ONLY", "PREPARING", "ROLLING_BACK"),
    ("ROLLBACK_ONLY",): ("ROLLING_BACK",),
    ("PREPARING",): ("COMMITTING", "ROLLING_BACK"),
    ("COMMITTING",): SETTLED,
    ("ROLLING_BACK",): ("PARTIAL", "UNKNOWN", "ROLLED_BACK"),
    SETTLED: ("RESPONDING", "CLOSED"),
    ("RESPONDING",): ("CLOSED",),
}
"""The arrows of the states: where one begins at a frame, from each state in it."""


def width_of(words: str) -> float:
    width = len(words) * LETTER
    if width > WIDTH - 2 * MARGIN:
        message = f"{words!r} is wider than the picture"
        raise ValueError(message)
    return round(width, 1)


def label(middle: float, y: float, words: str, kind: str = "") -> list[str]:
    """Write words in the middle, but inside the picture, on a ground of their own."""
    half = width_of(words) / 2
    x = round(min(max(middle, MARGIN + half), WIDTH - MARGIN - half), 1)
    ground = (
        f'<rect class="ground" x="{x - half - 2:g}" y="{y - 14:g}"'
        f' width="{2 * half + 4:g}" height="18"/>'
    )
    return [ground, text(x, y, words, kind, "middle")]


def arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """Draw a line with a head, a path: not every browser colours markers."""
    kind = f"arrow {kind}".strip()
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    turned = f'transform="translate({x2:g} {y2:g}) rotate({angle:.1f})"'
    return (
        f'<path class="{kind}" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'
        f'<path class="{kind.replace("reply", "")}" d="M-8 -4 L0 0 L-8 4" {turned}/>'
    )


def box(x: float, y: float, words: str) -> list[str]:
    """Draw a box around the words, with its middle at `x` and its top at `y`."""
    width = width_of(words) + 14
    around = (
        f'<rect class="box" x="{x - width / 2:g}" y="{y:g}" width="{width:g}"'
        f' height="{BOX}" rx="4"/>'
    )
    return [around, text(x, y + 19, words, anchor="middle")]


def draw_message(message: Message, y: int) -> list[str]:
    start, end = LIFELINES[message.source], LIFELINES[message.target]
    middle = (start + end) / 2
    colour = {"good": "goodtext", "bad": "badtext", "lost": "badtext"}
    words = label(middle, y - 7, message.words, colour.get(message.kind, ""))
    towards = 1 if end > start else -1
    if message.kind == "lost":
        cross = f'<path class="arrow bad" d="M{middle - 6:g} {y - 1} l12 12 m0 -12'
        line = f'<path class="arrow bad" d="M{start - 2} {y + 5} L{middle:g} {y + 5}"/>'
        return [*words, line, f'{cross} l-12 12"/>']
    return [*words, arrow(start + 2 * towards, y, end - 2 * towards, y, message.kind)]


def draw_sequence(says: str, steps: tuple[Step, ...]) -> str:
    """Draw one row for each step, from the top."""
    height = HEAD + ROW * len(steps) + 24
    drawn = [
        f'<path class="line" d="M{x} {HEAD} V{height - 8}"/>'
        for x in LIFELINES.values()
    ]
    for name, x in LIFELINES.items():
        drawn.append(text(x, HEAD - 12, name, "name", "middle"))
    for number, step in enumerate(steps, start=1):
        y = HEAD + ROW * number
        if isinstance(step, Message):
            drawn += draw_message(step, y)
        elif isinstance(step, Note):
            drawn += box(LIFELINES["asgi-uow"], y - 18, step.words)
        else:
            drawn.append(f'<path class="line" d="M0 {y - 22} H{WIDTH}"/>')
            drawn += label(0, y - 2, step.words, "name")
    return picture(says, height, drawn)


def draw_states() -> str:
    """Draw the states of `STEPS`; the places are chosen by hand."""
    left, right = 90, 320
    settled: dict[str, int] = dict(zip(SETTLED, (58, 149, 232, 344), strict=True))
    drawn = [f'<rect class="frame" x="8" y="44" width="176" height="{BOX + 20}"/>']
    drawn += [
        text(8, 34, "sessions can be used"),
        text(412, 34, "set_rollback_only()", anchor="end"),
        *box(40, 54, "NEW"),
        *box(138, 54, "ACTIVE"),
        arrow(61, 68, 101, 68),
        *box(right + 10, 54, "ROLLBACK_ONLY"),
        arrow(184, 68, 262, 68),
        arrow(left, 92, left, 142),
        arrow(184, 92, right - 60, 142),
        arrow(right + 10, 82, right + 10, 142),
        *label(left - 42, 122, "commit"),
        *label(274, 110, "roll back"),
        *box(left, 144, "PREPARING"),
        *box(right, 144, "ROLLING_BACK"),
        arrow(left + 48, 158, right - 64, 158),
        *label(196, 152, "fails"),
        arrow(left, 172, left, 212),
        *box(left, 214, "COMMITTING"),
    ]
    drawn += [arrow(left, 242, x, 302) for x in settled.values()]
    drawn += [arrow(right, 172, settled[name], 302) for name in STEPS["ROLLING_BACK",]]
    drawn.append('<rect class="frame" x="4" y="294" width="412" height="48"/>')
    for name, x in settled.items():
        drawn += box(x, 304, name)
    drawn += [
        arrow(120, 342, 120, 382),
        *box(120, 384, "RESPONDING"),
        arrow(173, 398, 294, 398),
        arrow(right + 10, 342, right + 10, 382),
        *box(right + 10, 384, "CLOSED"),
    ]
    return picture(SAYS["states"], 424, drawn)


def picture(says: str, height: int, drawn: list[str]) -> str:
    size = f'width="{WIDTH}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    before = [
        f'{opening} {size} role="img" aria-label="{escape(says)}">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="ground" {size} rx="8"/>',
    ]
    return "\n".join([*before, *drawn, "</svg>", ""])


def draw_all() -> dict[str, str]:
    """Give every picture by its name."""
    drawn = {name: draw_sequence(SAYS[name], each) for name, each in SEQUENCES.items()}
    return {**drawn, "states": draw_states()}


if __name__ == "__main__":
    for name, drawing in draw_all().items():
        (DOCS / f"{name}.svg").write_text(drawing, encoding="utf-8")
