"""The page of numbers says what the numbers say."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from benchmarks import report, results
from benchmarks.budgets import explained, verdicts
from benchmarks.growth import Growth
from benchmarks.results import Cost, Profile, Results, Table
from benchmarks.sentences import sentences

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {"Processor": "one, 2 cores", "Python": "3.13.0"}
PEER = "peers-insert-mariadb-asyncmy-asgi"


def cost(question: str, contestant: str, ratio: float) -> Cost:
    """What a contestant costs that takes `ratio` times 100 µs and instructions."""
    numbers = (100 * ratio, ratio, ratio, ratio, 10, 100 * ratio, ratio)
    return Cost(question, contestant, "mariadb-asyncmy", *numbers)


@pytest.fixture
def measured() -> Results:
    """A budget that is missed, one that is kept, and a library that is ahead."""
    found = Results(dict(FACTS), "instructions", 2.0, dates=["2026-11-27"])
    found.add_costs(
        [
            cost("insert-mariadb-asyncmy", "same trips", 1.0),
            cost("insert-mariadb-asyncmy", "ours", 1.07),
            cost(PEER, "hand-written", 1.0),
            cost(PEER, "ours", 1.2),
            cost(PEER, "a library", 0.9),
        ]
    )
    found.memory = [10_000, 2000.0, 2300.0]
    found.growth = [["hooks", {"1": 10.0, "10": 100.0, "100": 1000.0}]]
    found.truth = Table(["Who", "COMMIT fails"], [["ours", "500 | not kept"]])
    return found


@pytest.mark.parametrize(
    ("costs", "is_linear"),
    [
        ({1: 10.0, 10: 100.0, 100: 1000.0}, True),
        ({1: 10.0, 10: 100.0, 100: 9000.0}, False),
        ({1: 10.0, 2: 10.0, 4: 10.0}, True),
        ({1: 10.0, 2: 10.0, 4: 20.0}, False),
    ],
)
def test_growth(costs: dict[int, float], *, is_linear: bool) -> None:
    """One more must not cost more among many than among few."""
    assert is_linear is Growth("hooks", costs).is_linear


def test_budgets(measured: Results) -> None:
    """In instructions 1.07 is more than 1.05; in time it is less than 1.10."""
    found = {(each.unit, each.is_kept) for each in verdicts(measured)}
    assert {
        ("times the instructions", False),
        ("times the time", True),
        ("bytes", True),
    } == found


def test_what_is_explained(measured: Results) -> None:
    """What misses its budget has a profile, and where a library is ahead."""
    assert [
        ("insert-mariadb-asyncmy", "same trips", "ours"),
        (PEER, "a library", "ours"),
    ] == explained(measured)


def test_sentences(measured: Results) -> None:
    """What is missed, and who is ahead, is said with its number."""
    text = "\n".join(sentences(measured))
    assert "1.070 times the instructions (budget 1.05)" in text
    assert "a library in 1 of 1 questions (at best 0.75 times ours)" in text
    assert "300 bytes more" in text


def test_page(measured: Results, tmp_path: Path) -> None:
    """The page has every number, and the table of truth is a file of its own."""
    report.write(measured, tmp_path, {"budgets": "Budgets"})
    page = (tmp_path / "numbers.md").read_text(encoding="utf-8")
    truth = (tmp_path / "truth.md").read_text(encoding="utf-8")
    assert r"| ours | 500 \| not kept |" in truth.splitlines()
    assert "![Budgets](charts/budgets.svg)" in page
    assert "| a library | 90.0 | 0.90 | 0.90 to 0.90 | 10 | 90 | 0.900 |" in page


def test_a_part_renews_what_it_measured(measured: Results, tmp_path: Path) -> None:
    """The rest of the results stays as it was."""
    profiles = [
        Profile(name, "same trips", "ours", [], [], []) for name in (PEER, "other")
    ]
    measured.add_profiles(profiles, set())
    results.save(tmp_path, measured)
    read = results.load(tmp_path, FACTS, "instructions")
    assert dataclasses.asdict(measured) == dataclasses.asdict(read)
    read.add_costs([cost(PEER, "ours", 1.0)])
    read.add_profiles([], {PEER})
    assert [(PEER, "ours")] == [(e.question, e.contestant) for e in read.costs[2:]]
    assert ["other"] == [each.question for each in read.profiles]


def test_one_page_does_not_mix_versions(measured: Results, tmp_path: Path) -> None:
    """A part that was measured elsewhere is refused."""
    results.save(tmp_path, measured)
    with pytest.raises(SystemExit, match="Python"):
        results.load(tmp_path, FACTS | {"Python": "3.14.0"}, "instructions")
