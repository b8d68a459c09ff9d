from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.frameworks.conformance import FACTS, Case
from tests.frameworks.on_fastapi import FastAPIAdapter
from tests.frameworks.on_sanic import SanicAdapter
from tests.frameworks.on_starlette import StarletteAdapter

if TYPE_CHECKING:
    from tests.frameworks.conformance import Adapter, Fact
    from tests.servers import Backend


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
@pytest.mark.parametrize(
    "framework",
    [StarletteAdapter(), FastAPIAdapter(), SanicAdapter()],
    ids=["starlette", "fastapi", "sanic"],
)
async def test_conformance(fact: Fact, framework: Adapter, backend: Backend) -> None:
    """Every fact holds with every framework on every database."""
    async with Case.prepare(framework, backend) as case:
        await fact(case)
