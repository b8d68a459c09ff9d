from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from tests.integration.frameworks.conformance import FACTS
from tests.integration.frameworks.matrix import FRAMEWORKS
from tests.support.databases import SERVERS, on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.frameworks.case import Fact
    from tests.integration.frameworks.site import Adapter
    from tests.servers import Backend, ServerBackend

CELLS = [
    (framework, fact)
    for framework in FRAMEWORKS
    for fact in FACTS
    if fact.name not in framework.lacks
]
DATABASE_CELLS = [cell for cell in CELLS if cell[1].of_database]

pytestmark = [
    # A file, or a generator that is not async, is read by Django as a whole.
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
    # Django before 6.0 does not close the request's body if `send` raises.
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled"),
]


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What Django left open is collected here, not in a test of something else."""
    yield
    gc.collect()


def name(part: Adapter | Fact) -> str:
    return part.name


@pytest.mark.parametrize(("framework", "fact"), CELLS, ids=name)
async def test_conformance(fact: Fact, framework: Adapter, sqlite: Backend) -> None:
    """Every fact holds with every framework that can show it."""
    await fact.hold(framework, sqlite)


@on(*SERVERS)
@pytest.mark.parametrize(("framework", "fact"), DATABASE_CELLS, ids=name)
async def test_on_servers(
    fact: Fact, framework: Adapter, backend: ServerBackend
) -> None:
    """What a database has a part in holds on each of them."""
    await fact.hold(framework, backend)
