"""The table of frameworks and facts in the documentation."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.frameworks.case import Case, Fact
from tests.frameworks.facts import FACTS
from tests.frameworks.matrix import (
    END,
    FRAMEWORKS,
    START,
    declared,
    filled,
    main,
    table,
)

if TYPE_CHECKING:
    from tests.frameworks.site import Adapter

PAGE = Path(__file__).parents[2] / "docs" / "frameworks-matrix.md"
STARLETTE = FRAMEWORKS[0]


async def true(case: Case) -> None:
    """A thing that is so."""
    assert [] == await case.kept()


async def false(case: Case) -> None:
    """A thing that is not so."""
    assert [1] == await case.kept()


TRUE = Fact(true, of_database=False)
FALSE = Fact(false, of_database=False)
[DEPENDENCIES] = [fact for fact in FACTS if fact.name == "dependencies"]


def test_the_page_has_every_fact_and_every_framework() -> None:
    """The table in the documentation is that of these facts and frameworks."""
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, table(declared)) == page


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda each: each.name)
def test_what_a_framework_lacks_is_a_fact(framework: Adapter) -> None:
    """A reason is given for facts that there are, and is one."""
    assert set(framework.lacks) <= {fact.name for fact in FACTS}
    assert all(framework.lacks.values())


def test_facts_have_names_and_sentences_of_their_own() -> None:
    """No fact is stated twice, each has one line."""
    assert len(FACTS) == len({fact.name for fact in FACTS})
    assert len(FACTS) == len({fact.sentence for fact in FACTS})
    assert [] == [fact.name for fact in FACTS if "\n" in fact.sentence]


def test_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """There is a row for each fact, and a reason where one cannot be shown."""
    assert 0 == main([], [STARLETTE], [TRUE, DEPENDENCIES])
    sentence = DEPENDENCIES.sentence
    assert [
        "|  | Starlette |",
        "| --- | --- |",
        "| A thing that is so. | yes |",
        f"| {sentence} | n/a: no dependencies |",
    ] == capsys.readouterr().out.splitlines()


def test_the_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed replaces what was between the two comments."""
    page = tmp_path / "page.md"
    page.write_text(f"above\n{START}old\n{END}below\n", encoding="utf-8")
    assert 0 == main(["--write", str(page)], [STARLETTE], [TRUE])
    expected = f"above\n{START}\n{capsys.readouterr().out}\n{END}below\n"
    assert expected == page.read_text(encoding="utf-8")


def test_the_command_fails_if_a_fact_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page stays as it was; the reason is printed beside the table."""
    page = tmp_path / "page.md"
    page.write_text("as it was", encoding="utf-8")
    assert 1 == main(["--write", str(page)], [STARLETTE], [FALSE])
    printed = capsys.readouterr()
    assert "| A thing that is not so. | no |\n" in printed.out
    assert "AssertionError" in printed.err
    assert "as it was" == page.read_text(encoding="utf-8")


def test_the_command_is_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.frameworks` is how it is called."""
    monkeypatch.setattr(sys, "argv", ["tests.frameworks", "--help"])
    try:
        with pytest.raises(SystemExit):
            runpy.run_module("tests.frameworks", run_name="__main__")
    finally:
        logging.disable(logging.NOTSET)
    assert "--write" in capsys.readouterr().out
