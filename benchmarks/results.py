"""What was measured: kept as JSON beside the page, so that a part can be renewed."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE = "results.json"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one contestant of one question costs."""

    question: str
    contestant: str
    place: str
    microseconds: float
    ratio: float
    """Of the time to the first contestant: median of the rounds."""
    low: float
    high: float
    rounds: int
    cost: float
    """In instructions, or in Python calls."""
    cost_ratio: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where two contestants of a question differ most."""

    question: str
    first: str
    second: str
    functions: list[list[Any]]
    """Name of a function of C, instructions of the first, of the second."""
    calls: list[list[Any]]
    """Name of a function of Python, its calls by the first, by the second."""
    totals: list[float]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that another module made."""

    titles: list[str]
    rows: list[list[str]]


@dataclasses.dataclass
class Results:
    """Everything the page is made of."""

    facts: dict[str, str]
    counted: str
    """Instructions or Python calls."""
    seconds: float = 0.0
    costs: list[Cost] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    """Requests, bytes of each in a no-op middleware, and in ours."""
    growth: list[list[Any]] = dataclasses.field(default_factory=list)
    """What grows, and the cost by its number."""
    throughput: Table | None = None
    truth: Table | None = None
    slow_clients: Table | None = None
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    remark: str = ""
    """What a reader must know of the run."""
    dates: list[str] = dataclasses.field(default_factory=list)

    def add_costs(self, costs: Iterable[Cost]) -> None:
        """Put these in the place of older ones of the same questions."""
        new = list(costs)
        names = {each.question for each in new}
        self.costs = [each for each in self.costs if each.question not in names] + new

    def add_profiles(self, profiles: Iterable[Profile], measured: set[str]) -> None:
        """Put these in the place of all older ones of the measured questions."""
        old = [each for each in self.profiles if each.question not in measured]
        self.profiles = old + list(profiles)

    def find(self, question: str, contestant: str) -> Cost | None:
        """Return what was measured of one contestant, if it was."""
        for each in self.costs:
            if (each.question, each.contestant) == (question, contestant):
                return each
        return None


def load(folder: Path, facts: dict[str, str], counted: str) -> Results:
    """Read what was measured before; exit if that was somewhere else."""
    file = folder / FILE
    if not file.exists():
        return Results(facts, counted)
    read = json.loads(file.read_text("utf-8"))
    differ = sorted(
        name
        for name in facts.keys() | read["facts"].keys()
        if facts.get(name) != read["facts"].get(name)
    )
    if differ or read["counted"] != counted:
        names = ", ".join(differ) or "valgrind"
        sys.exit(
            f"{FILE} was measured with other versions of: {names}. One page must "
            "not mix them: measure without --only, or remove that file."
        )
    for name, kind in (("costs", Cost), ("profiles", Profile)):
        read[name] = [kind(**each) for each in read[name]]
    for name in ("throughput", "truth", "slow_clients"):
        read[name] = read[name] and Table(**read[name])
    return Results(**read)


def save(folder: Path, results: Results) -> None:
    """Write what was measured; a line for each contestant keeps differences short."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(results), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(f"{text}\n", "utf-8")
