from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from asgi_uow._entrypoints.exchange import Again
from tests.integration.frameworks.case import Case
from tests.integration.frameworks.conformance import FACTS
from tests.integration.frameworks.driver import on_uvicorn
from tests.integration.frameworks.facts.replays import FORM, Form
from tests.integration.frameworks.matrix import FRAMEWORKS
from tests.support.databases import SERVERS, on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.frameworks.case import Fact
    from tests.integration.frameworks.site import Adapter
    from tests.servers import Backend, ServerBackend, SQLiteBackend

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
    # BlackSheep, and Django before 6.0, leave files of a request open if `send` raises.
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled"),
]


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What they left open is collected here, not in a test of something else."""
    yield
    gc.collect()


def showing(fact: str) -> list[Adapter]:
    return [each for each in FRAMEWORKS if fact not in each.lacks]


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


@pytest.mark.parametrize("answers", [False, True], ids=["raised", "answered"])
@pytest.mark.parametrize("framework", showing("replayed"), ids=name)
async def test_replayed_on_uvicorn(
    framework: Adapter,
    sqlite: SQLiteBackend,
    caplog: pytest.LogCaptureFixture,
    *,
    answers: bool,
) -> None:
    """A client on a socket has one answer, the last; nobody logs how others ended."""
    async with Case.prepare(framework, sqlite) as case:
        form = await Form.prepare(case, 1 + answers, answers=answers)
        async with on_uvicorn(form.app()) as client:
            response = await client.post("/forms/7", **FORM)
        await form.check(response.status_code, response.text)
    assert Again.__name__ not in caplog.text


@pytest.mark.parametrize("framework", showing("replayed_mount"), ids=name)
async def test_replayed_mount_on_uvicorn(
    framework: Adapter, sqlite: SQLiteBackend
) -> None:
    """So it has from an application that is mounted in another one."""
    async with Case.prepare(framework, sqlite) as case:
        form = await Form.prepare(case, 1, answers=False)
        async with on_uvicorn(form.mounted("/mounted")) as client:
            response = await client.post("/mounted/forms/7", **FORM)
        await form.check(response.status_code, response.text)
