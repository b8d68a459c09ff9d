"""The house is as its contracts and its page say, and stays small."""

from __future__ import annotations

import ast
import re
import tomllib
from typing import TYPE_CHECKING, TypeAlias

import pytest

from docs.house import PICTURE, draw, rooms_of
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

SRC = ROOT / "src" / "asgi_uow"
MOST_LINES = 11_992
MODULES = {
    path.relative_to(SRC).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(SRC.rglob("*.py"))
}
"""The source, by the path in the package."""
TREES = {path: ast.parse(source) for path, source in MODULES.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STORY = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)[0]

PARTS = re.split(r"^# (\S+\.py)[^\n]*\n", STORY, flags=re.MULTILINE)
"""The story, cut at the comments that name a file; nothing comes before the first."""

COMMITS = {
    "_unit/completion.py": "the line that commits",
    "_unit/finish.py": "asks `Completion`, one step above that line",
    "_sessions/session.py": "SQLAlchemy's name for RELEASE SAVEPOINT",
    "_databases/sqlite_connection.py": (
        "aiosqlite's own method: sends nothing if BEGIN was never sent"
    ),
}
"""Why a file calls a `commit()`, once."""

FACTS = ("mysql", "postgresql", "sqlite")


def code_lines(function: Function) -> int:
    """Count its lines from `def` on, without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


def imported(path: str) -> set[str]:
    """Name what a file imports, for type checkers or not."""
    names: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def defined(tree: ast.Module | ast.ClassDef, around: str = "") -> Iterator[str]:
    """Name classes, functions and methods, as `Class.method`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield around + node.name
            yield from defined(node, f"{around}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield around + node.name


# The contracts


def test_no_import_is_ignored() -> None:
    """The contracts have no exception, and look at imports of types as well."""
    linter = PROJECT["tool"]["importlinter"]
    assert not linter.get("exclude_type_checking_imports", False)
    assert [] == [each["name"] for each in CONTRACTS if each.get("ignore_imports")]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda each: each["name"])
def test_a_contract_has_every_module(contract: dict[str, list[str]]) -> None:
    """Each module is in one line of the contract of its package."""
    [container] = contract["containers"]
    folder = SRC.joinpath(*container.split(".")[1:])
    built = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    built |= {path.parent.name for path in folder.glob("*/__init__.py")}
    rooms = [room for layer in contract["layers"] for room in rooms_of(layer)]
    assert sorted(built) == sorted(rooms)
    assert contract["exhaustive"]


def test_every_package_has_a_contract() -> None:
    """None is without an order of its own."""
    packages = {path.parent.name for path in SRC.glob("*/__init__.py")}
    containers = {each for contract in CONTRACTS for each in contract["containers"]}
    assert {"asgi_uow", *(f"asgi_uow.{name}" for name in packages)} == containers


def test_nothing_imports_the_public_names() -> None:
    """`asgi_uow/__init__` stands on everything; no floor holds it."""
    rooms = {path.partition("/")[0].removesuffix(".py") for path in MODULES}
    found = {
        path: name
        for path in MODULES
        for name in imported(path)
        if name == "asgi_uow"
        or (name.startswith("asgi_uow.") and name.split(".")[1] not in rooms)
    }
    assert {} == found


def test_the_middleware_imports_no_sqlalchemy() -> None:
    """It knows ASGI and the unit of work."""
    names = imported("_entrypoints/middleware.py")
    assert [] == [name for name in names if name.startswith("sqlalchemy")]


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_a_database_import_nothing_of_ours(name: str) -> None:
    """Another database is one more file that needs nothing from here."""
    names = imported(f"_databases/{name}.py")
    assert [] == [each for each in names if each.startswith("asgi_uow")]


# Where work is committed


def test_only_these_lines_commit() -> None:
    """A call of `commit()` is found in these files, once in each."""
    calls = [
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "commit"
    ]
    assert sorted(COMMITS) == sorted(calls)


def test_it_is_three_steps_down_to_the_commit_and_none_back() -> None:
    """From the exchange by `finish()` to `Completion`; no file imports one above."""
    steps = {
        "_entrypoints/exchange.py": "asgi_uow._unit.finish.finish",
        "_unit/finish.py": "asgi_uow._unit.completion.Completion",
    }
    assert steps == {
        path: name for path, name in steps.items() if name in imported(path)
    }
    above = ("asgi_uow._entrypoints", "asgi_uow._unit.finish", "asgi_uow._unit.unit")
    names = imported("_unit/completion.py")
    assert [] == [name for name in names if name.startswith(above)]


# Sizes


@pytest.mark.parametrize("path", MODULES)
def test_a_file_has_at_most_300_lines(path: str) -> None:
    """A file that outgrows this asks for a better cut."""
    lines = len(MODULES[path].splitlines())
    assert 300 >= lines


@pytest.mark.parametrize("path", MODULES)
def test_a_function_has_at_most_40_lines(path: str) -> None:
    """A function that outgrows this asks for a better cut; docstrings do not count."""
    functions = [
        node
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [] == [each.name for each in functions if code_lines(each) > 40]


def test_the_source_does_not_grow() -> None:
    """Whatever is added, something else can be said more shortly."""
    lines = sum(len(source.splitlines()) for source in MODULES.values())
    assert MOST_LINES >= lines


# The page


def test_the_picture_is_what_the_contracts_say() -> None:
    """If not, run `python docs/house.py`."""
    assert draw(PROJECT) == PICTURE.read_text(encoding="utf-8")


def test_the_picture_can_be_read() -> None:
    """Its letters have at least 12 pixels, and it has colours for a dark page."""
    picture = PICTURE.read_text(encoding="utf-8")
    sizes = {int(size) for size in re.findall(r"(\d+)px", picture)}
    assert sizes
    assert 12 <= min(sizes)
    assert "prefers-color-scheme: dark" in picture


def test_the_tree_of_the_page_has_every_module() -> None:
    """And none that does not exist."""
    [tree] = re.findall(r"```text\nsrc/asgi_uow/\n(.*?)```", PAGE, re.DOTALL)
    listed: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        if names.endswith("/"):
            folder = names
            continue
        inside = folder if line.startswith("    ") else ""
        listed |= {f"{inside}{name}.py" for name in names.split(", ")}
    packages = {path for path in MODULES if path.endswith("/__init__.py")}
    assert set(MODULES) - packages == listed


def test_the_story_has_at_most_forty_lines() -> None:
    """It is read at once, and says of each line in which file it is."""
    assert not PARTS[0]
    assert 40 >= sum(bool(line) for line in STORY.splitlines())


@pytest.mark.parametrize(
    ("path", "code"), list(zip(PARTS[1::2], PARTS[2::2], strict=True)), ids=PARTS[1::2]
)
def test_what_the_story_shows_exists_where_it_says(path: str, code: str) -> None:
    """Classes and functions are defined in the file, what they call is named there."""
    part = ast.parse(code)
    shown = set(defined(part))
    assert shown <= set(defined(TREES[path]))
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for node in ast.walk(part)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute | ast.Name)
    }
    words = set(re.findall(r"\w+", MODULES[path]))
    assert set() == called - words


@pytest.mark.parametrize(
    "page", [PAGE, CONTRIBUTING], ids=["architecture", "contributing"]
)
def test_paths_of_a_page_exist(page: str) -> None:
    """A file or folder that a page names is there, from the project or the package."""
    paths = set(re.findall(r"`((?:\w[\w.]*/)*\w+(?:\.py|/))`", page))
    assert paths
    roots = (ROOT, SRC)
    assert [] == [
        path for path in paths if not any((root / path).exists() for root in roots)
    ]


def test_names_of_the_page_exist() -> None:
    """What it sets as code is written so in the source, the words of SQL apart."""
    words = set(re.findall(r"\w+", "".join(MODULES.values())))
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[a-z_]\w*)*)(?:\(\))?`", PAGE)
    named = [name for name in names if not (ROOT / name).exists()]
    assert [] == [name for name in named if not set(name.split(".")) <= words]


def test_contributing_has_at_most_120_lines() -> None:
    """It is read before the first change."""
    assert 120 >= len(CONTRIBUTING.splitlines())
