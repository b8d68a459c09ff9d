"""Frameworks or servers, and facts, as a table."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import pytest

from tests.integration.asgi_servers import facts as server_facts
from tests.integration.asgi_servers.servers import SERVERS
from tests.integration.frameworks.conformance import FACTS
from tests.integration.frameworks.on_blacksheep import BlackSheepAdapter
from tests.integration.frameworks.on_django import DjangoAdapter
from tests.integration.frameworks.on_falcon import FalconAdapter
from tests.integration.frameworks.on_fastapi import FastAPIAdapter
from tests.integration.frameworks.on_litestar import (
    LitestarAdapter,
    LitestarMiddlewareAdapter,
)
from tests.integration.frameworks.on_quart import QuartAdapter
from tests.integration.frameworks.on_sanic import SanicAdapter
from tests.integration.frameworks.on_starlette import StarletteAdapter
from tests.servers import SQLiteBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.integration.frameworks.site import Adapter

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

NO = "no"


class Column(Protocol):
    """A framework or a server."""

    @property
    def name(self) -> str: ...

    @property
    def lacks(self) -> Mapping[str, str]:
        """The facts that it cannot show, and why."""
        ...


C_contra = TypeVar("C_contra", bound=Column, contravariant=True)


class Row(Protocol[C_contra]):
    """A fact about each of them."""

    @property
    def name(self) -> str: ...

    @property
    def sentence(self) -> str: ...

    async def hold(self, column: C_contra, backend: SQLiteBackend, /) -> None:
        """Raise unless it is so."""


@dataclasses.dataclass(frozen=True)
class Matrix(Generic[C_contra]):
    """A table in a page, between two comments that bear its name."""

    name: str
    columns: Sequence[C_contra]
    facts: Sequence[Row[C_contra]]

    def table(self, cell: Callable[[C_contra, Row[C_contra]], str]) -> str:
        """Write a row for each fact, with a cell for each column."""
        rows = [
            ["", *(column.name for column in self.columns)],
            ["---", *("---" for _ in self.columns)],
            *(
                [fact.sentence, *(cell(column, fact) for column in self.columns)]
                for fact in self.facts
            ),
        ]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def filled(self, page: str, content: str) -> str:
        """Put the table between the two comments of a page."""
        start, end = f"<!-- {self.name}-start -->\n", f"<!-- {self.name}-end -->\n"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        return f"{before}{start}\n{content}\n{end}{after}"


MATRICES: list[Matrix[Any]] = [
    Matrix("frameworks", FRAMEWORKS, FACTS),
    Matrix("servers", SERVERS, server_facts.FACTS),
]


def declared(column: Column, fact: Row[C_contra]) -> str:
    """Tell what has to come out."""
    reason = column.lacks.get(fact.name)
    return "yes" if reason is None else f"n/a: {reason}"


def measured(column: C_contra, fact: Row[C_contra]) -> str:
    """Tell what comes out, with a database of its own."""
    if fact.name not in column.lacks:
        try:
            asyncio.run(_hold(column, fact))
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  # any is a no
            traceback.print_exc()
            return NO
    return declared(column, fact)


async def _hold(column: C_contra, fact: Row[C_contra]) -> None:
    with TemporaryDirectory() as folder:
        async with SQLiteBackend(Path(folder)) as backend:
            await fact.hold(column, backend)


def main(
    arguments: Sequence[str] | None = None, matrices: Sequence[Matrix[Any]] = MATRICES
) -> int:
    """Run the facts and print the tables; 1 if one does not hold."""
    parser = argparse.ArgumentParser(
        prog="tests.integration.frameworks", description=main.__doc__
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables into this page"
    )
    page: Path | None = parser.parse_args(arguments).write
    contents = [matrix.table(measured) for matrix in matrices]
    sys.stdout.write("\n".join(contents))
    if any(f"| {NO} |" in content for content in contents):
        return 1
    if page is not None:
        text = page.read_text(encoding="utf-8")
        for matrix, content in zip(matrices, contents, strict=True):
            text = matrix.filled(text, content)
        page.write_text(text, encoding="utf-8")
    return 0
