"""What became of the mutants: the score, who survived, and which are explained."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

NOTICED = ("killed", "timeout")  # a test fails, or hangs
COLUMNS = ("all", *NOTICED, "explained", "survived", "other")
LITERAL = re.compile(r'"[^"]*"')


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one statement, and what the tests said: mutmut's word for it."""

    module: str
    name: str
    before: str
    after: str
    status: str = "not checked"

    @property
    def is_of_text(self) -> bool:
        """Whether it changes only strings with a space: the text of an error."""
        if LITERAL.sub('""', self.before) != LITERAL.sub('""', self.after):
            return False
        texts = LITERAL.findall(self.before), LITERAL.findall(self.after)
        return all(" " in old for old, new in zip(*texts, strict=True) if old != new)

    @property
    def change(self) -> tuple[str, str, str]:
        return self.module, self.before, self.after


def read_diff(diff: str) -> tuple[str, str]:
    """Give the statement before and after, each as one line."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    changed = ((line[:1], line[1:].strip()) for line in lines)
    removed: list[str] = []
    added: list[str] = []
    for sign, line in changed:
        if sign in {"-", "+"}:
            (removed if sign == "-" else added).append(line)
    return " ".join(removed), " ".join(added)


def read_explained(text: str) -> dict[tuple[str, str, str], str]:
    """Read why a mutant does what the code does: by module, line, and changed line."""
    return {
        (each["module"], each["line"], mutant): each["reason"]
        for each in tomllib.loads(text)["explained"]
        for mutant in each["mutants"]
    }


class Verdict:
    """The mutants that were tried, counted."""

    def __init__(
        self, tried: Sequence[Mutant], explained: dict[tuple[str, str, str], str]
    ) -> None:
        self.tried, self._explained = tried, explained
        self.survivors = [each for each in tried if self._kind(each) == "survived"]
        self.others = [each for each in tried if self._kind(each) == "other"]
        self.wrong = [
            each
            for each in tried
            if each.status in NOTICED and each.change in explained
        ]
        """Explained as the same, and noticed by a test all the same."""

    def _kind(self, mutant: Mutant) -> str:
        if mutant.status in NOTICED:
            return mutant.status
        if mutant.status not in {"survived", "no tests"}:
            return "other"
        return "explained" if mutant.change in self._explained else "survived"

    @property
    def score(self) -> float:
        """Noticed, of those that are not explained, in percent."""
        counts = self._count(self.tried)
        judged = counts["all"] - counts["explained"]
        return 100 * sum(counts[each] for each in NOTICED) / judged

    def report(self) -> Iterator[str]:
        for title, mutants in (("Survived", self.survivors), ("Other", self.others)):
            for each in mutants:
                yield f"{title}: {each.module} {each.name} ({each.status})"
                yield f"    - {each.before}"
                yield f"    + {each.after}"
        for each in self.wrong:
            yield f"Explained, but noticed by a test: {each.module}: {each.after}"
        yield ""
        yield f"{'module':24}" + "".join(f"{each:>10}" for each in COLUMNS)
        for module in sorted({each.module for each in self.tried}):
            of = [each for each in self.tried if each.module == module]
            yield self._row(module, self._count(of))
        counts = self._count(self.tried)
        yield self._row("together", counts)
        noticed = sum(counts[each] for each in NOTICED)
        yield f"noticed: {noticed} of {counts['all']}; score: {self.score:.1f} %"

    def _count(self, mutants: Iterable[Mutant]) -> Counter[str]:
        counts = Counter(self._kind(each) for each in mutants)
        counts["all"] = counts.total()
        return counts

    @staticmethod
    def _row(title: str, counts: Counter[str]) -> str:
        return f"{title:24}" + "".join(f"{counts[each]:10}" for each in COLUMNS)


def stale(
    explained: Iterable[tuple[str, str, str]], made: Iterable[Mutant]
) -> list[tuple[str, str, str]]:
    """Give the explanations of mutants that the code does not have any more."""
    changes = {each.change for each in made}
    return [each for each in explained if each not in changes]
