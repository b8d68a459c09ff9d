"""How the mutants are counted; the mutants themselves are made by tox, by name."""

from __future__ import annotations

import dataclasses

import pytest

from tests.mutation.verdict import Mutant, Verdict, read_diff, read_explained, stale

DIFF = """\
--- src/asgi_uow/_decision.py
+++ src/asgi_uow/_decision.py
@@ -1,3 +1,3 @@
 def commit_below_400(status, headers):
-    return status < ERROR_STATUS
+    return status <= ERROR_STATUS
"""
LINE = ("return status < ERROR_STATUS", "return status <= ERROR_STATUS")
EXPLAINED = """
[[explained]]
module = "finish.py"
line = "a = 1"
mutants = ["a = None", "a = 2"]
reason = "Nobody reads it."
"""


def mutants(*statuses: str) -> list[Mutant]:
    return [
        Mutant("finish.py", f"m_{number}", "a = 1", f"a = {number}", status)
        for number, status in enumerate(statuses)
    ]


def test_read_diff() -> None:
    """The statement is read from mutmut's diff, without the lines around it."""
    assert LINE == read_diff(DIFF)


def test_lines_of_one_statement() -> None:
    """A change of several lines is read as one line."""
    assert ("f( a, )", "f( )") == read_diff("-f(\n-    a,\n-)\n+f(\n+)")


@pytest.mark.parametrize(
    ("after", "is_of_text"),
    [
        ('say("xx it failed", "after_commit")', True),
        ('say("it failed", "AFTER_COMMIT")', False),
        ('say("IT FAILED", "AFTER_COMMIT")', False),
        ('say("it failed", None)', False),
        ('tell("it failed", "after_commit")', False),
    ],
)
def test_texts(after: str, *, is_of_text: bool) -> None:
    """A text is a string with a space; the name of a phase is none."""
    before = 'say("it failed", "after_commit")'

    assert is_of_text == Mutant("", "", before, after).is_of_text


def test_score() -> None:
    """What fails or hangs is noticed; what is explained does not count."""
    tried = mutants("killed", "timeout", "survived", "no tests", "segfault")
    verdict = Verdict(tried, read_explained(EXPLAINED))

    assert [tried[3]] == verdict.survivors
    assert [tried[4]] == verdict.others
    assert 50 == verdict.score


def test_report() -> None:
    """The report lists who survived, and counts each module and all together."""
    tried = mutants("killed", "killed", "survived", "survived", "suspicious")
    other = dataclasses.replace(tried[0], module="hooks.py")
    lines = list(Verdict([*tried, other], read_explained(EXPLAINED)).report())

    assert [
        "Survived: finish.py m_3 (survived)",
        "    - a = 1",
        "    + a = 3",
        "Other: finish.py m_4 (suspicious)",
        "    - a = 1",
        "    + a = 4",
        "",
    ] == lines[:7]
    assert [
        ["module", "all", "killed", "timeout", "explained", "survived", "other"],
        ["finish.py", "5", "2", "0", "1", "1", "1"],
        ["hooks.py", "1", "1", "0", "0", "0", "0"],
        ["together", "6", "3", "0", "1", "1", "1"],
        ["noticed:", "3", "of", "6;", "score:", "60.0", "%"],
    ] == [line.split() for line in lines[7:]]


def test_explained_but_killed() -> None:
    """An explanation that a test refutes is named."""
    verdict = Verdict(mutants("", "", "killed")[2:], read_explained(EXPLAINED))

    assert "Explained, but noticed by a test: finish.py: a = 2" in verdict.report()


def test_stale_explanations() -> None:
    """An explanation is named once the code has no such line any more."""
    explained = read_explained(EXPLAINED)
    none = ("finish.py", "a = 1", "a = None")

    assert [none] == stale(explained, mutants("", "", ""))
