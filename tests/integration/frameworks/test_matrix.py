"""The tables of frameworks, servers and facts in the documentation."""

from __future__ import annotations

import logging
import runpy
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.frameworks.case import Case, Fact
from tests.integration.frameworks.conformance import FACTS
from tests.integration.frameworks.matrix import (
    FRAMEWORKS,
    MATRICES,
    Matrix,
    declared,
    main,
)
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.frameworks.matrix import Column

PAGE = ROOT / "docs" / "frameworks-matrix.md"
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


def starlette(name: str, *facts: Fact) -> Matrix[Any]:
    columns: list[Any] = [STARLETTE]
    return Matrix(name, columns, facts)


COLUMNS = [(matrix, column) for matrix in MATRICES for column in matrix.columns]


def name(part: Matrix[Column] | Column) -> str:
    return part.name


@pytest.mark.parametrize("matrix", MATRICES, ids=name)
def test_the_page_has_every_fact_and_every_column(matrix: Matrix[Column]) -> None:
    """The tables in the documentation are those of these facts."""
    page = PAGE.read_text(encoding="utf-8")
    assert matrix.filled(page, matrix.table(declared)) == page


@pytest.mark.parametrize(("matrix", "column"), COLUMNS, ids=name)
def test_what_a_column_lacks_is_a_fact(matrix: Matrix[Column], column: Column) -> None:
    """A reason is given for facts that there are, and is one."""
    assert set(column.lacks) <= {fact.name for fact in matrix.facts}
    assert all(column.lacks.values())


@pytest.mark.parametrize("matrix", MATRICES, ids=name)
def test_facts_have_names_and_sentences_of_their_own(matrix: Matrix[Column]) -> None:
    """No fact is stated twice, each has one line."""
    facts = matrix.facts
    assert len(facts) == len({fact.name for fact in facts})
    assert len(facts) == len({fact.sentence for fact in facts})
    assert [] == [fact.name for fact in facts if "\n" in fact.sentence]


def test_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """There is a row for each fact, and a reason where one cannot be shown."""
    assert 0 == main([], [starlette("one", TRUE, DEPENDENCIES), starlette("two")])
    sentence = DEPENDENCIES.sentence
    assert [
        "|  | Starlette |",
        "| --- | --- |",
        "| A thing that is so. | yes |",
        f"| {sentence} | n/a: no dependencies |",
        "",
        "|  | Starlette |",
        "| --- | --- |",
    ] == capsys.readouterr().out.splitlines()


def test_the_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed replaces what was between the comments of each table."""
    page = tmp_path / "page.md"
    tables = [starlette("one", TRUE), starlette("two", DEPENDENCIES)]
    places = "<!-- one-start -->\n{}<!-- one-end -->\n<!-- two-start -->\n{}"
    places = f"above\n{places}<!-- two-end -->\nbelow\n"
    page.write_text(places.format("old\n", ""), encoding="utf-8")
    assert 0 == main(["--write", str(page)], tables)
    [one, two] = capsys.readouterr().out.split("\n\n")
    expected = places.format(f"\n{one}\n\n", f"\n{two}\n")
    assert expected == page.read_text(encoding="utf-8")


def test_the_command_fails_if_a_fact_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page stays as it was; the reason is printed beside the table."""
    page = tmp_path / "page.md"
    page.write_text("as it was", encoding="utf-8")
    assert 1 == main(["--write", str(page)], [starlette("one", TRUE, FALSE)])
    printed = capsys.readouterr()
    assert "| A thing that is not so. | no |\n" in printed.out
    assert "AssertionError" in printed.err
    assert "as it was" == page.read_text(encoding="utf-8")


def test_the_command_is_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.integration.frameworks` is how it is called."""
    monkeypatch.setattr(sys, "argv", ["tests.integration.frameworks", "--help"])
    try:
        with pytest.raises(SystemExit):
            runpy.run_module("tests.integration.frameworks", run_name="__main__")
    finally:
        logging.disable(logging.NOTSET)
    assert "--write" in capsys.readouterr().out
