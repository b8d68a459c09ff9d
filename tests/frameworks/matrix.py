"""Frameworks and facts as a table."""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from tests.frameworks.facts import FACTS
from tests.frameworks.on_blacksheep import BlackSheepAdapter
from tests.frameworks.on_django import DjangoAdapter
from tests.frameworks.on_falcon import FalconAdapter
from tests.frameworks.on_fastapi import FastAPIAdapter
from tests.frameworks.on_litestar import LitestarAdapter, LitestarMiddlewareAdapter
from tests.frameworks.on_quart import QuartAdapter
from tests.frameworks.on_sanic import SanicAdapter
from tests.frameworks.on_starlette import StarletteAdapter
from tests.servers import SQLiteBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.frameworks.case import Fact
    from tests.frameworks.site import Adapter

FRAMEWORKS: list[Adapter] = [
    StarletteAdapter(),
    FastAPIAdapter(),
    LitestarAdapter(),
    LitestarMiddlewareAdapter(),
    QuartAdapter(),
    FalconAdapter(),
    BlackSheepAdapter(),
    DjangoAdapter(),
    SanicAdapter(),
]

START = "<!-- matrix-start -->\n"
END = "<!-- matrix-end -->\n"
NO = "no"


def declared(framework: Adapter, fact: Fact) -> str:
    """Tell what has to come out."""
    reason = framework.lacks.get(fact.name)
    return "yes" if reason is None else f"n/a: {reason}"


def measured(framework: Adapter, fact: Fact) -> str:
    """Tell what comes out, with a database of its own."""
    if fact.name not in framework.lacks:
        try:
            asyncio.run(_hold(framework, fact))
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  # any is a no
            traceback.print_exc()
            return NO
    return declared(framework, fact)


async def _hold(framework: Adapter, fact: Fact) -> None:
    with TemporaryDirectory() as folder:
        async with SQLiteBackend(Path(folder)) as backend:
            await fact.hold(framework, backend)


def table(
    cell: Callable[[Adapter, Fact], str],
    frameworks: Sequence[Adapter] = FRAMEWORKS,
    facts: Sequence[Fact] = FACTS,
) -> str:
    """Write a row for each fact, with a cell for each framework."""
    rows = [
        ["", *(framework.name for framework in frameworks)],
        ["---", *("---" for _ in frameworks)],
        *(
            [fact.sentence, *(cell(framework, fact) for framework in frameworks)]
            for fact in facts
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(page: str, content: str) -> str:
    """Put the table between the two comments of a page."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{content}\n{END}{after}"


def main(
    arguments: Sequence[str] | None = None,
    frameworks: Sequence[Adapter] = FRAMEWORKS,
    facts: Sequence[Fact] = FACTS,
) -> int:
    """Run the facts and print the table; 1 if one does not hold."""
    parser = argparse.ArgumentParser(prog="tests.frameworks", description=main.__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the table into this page"
    )
    page: Path | None = parser.parse_args(arguments).write
    content = table(measured, frameworks, facts)
    sys.stdout.write(content)
    if f"| {NO} |" in content:
        return 1
    if page is not None:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, content), encoding="utf-8")
    return 0
