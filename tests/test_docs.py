"""What the README and the documentation show runs, and what they link to exists."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from httpx import ASGITransport, AsyncClient
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from asgi_uow._decision import TRANSITIONS
from docs.pictures import DOCS, STEPS, WIDTH, draw_all
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from httpx import Response

    from asgi_uow._asgi import ASGIApp, Message

QUEUES = [
    ROOT / "docs" / "howto" / f"{name}.md"
    for name in ("celery", "pgqueuer", "procrastinate", "taskiq")
]
"""They need servers: `tests.integration.handoff.test_pages` runs them."""
PGBOUNCER = ROOT / "docs" / "howto" / "pgbouncer.md"
"""It needs one: `tests.databases.test_poolers` runs it."""
GALERA = ROOT / "docs" / "howto" / "galera.md"
"""It needs a cluster: `tests.integration.galera.test_page` runs it."""
TENANTS = ROOT / "docs" / "howto" / "tenants.md"
"""They need PostgreSQL: `tests.sessions.test_on_begin` runs it."""
SANIC = ROOT / "docs" / "howto" / "sanic.md"
"""Sanic rewrites itself when it starts, once per process; it has one of its own."""
ELSEWHERE = {PGBOUNCER, GALERA, TENANTS, SANIC}
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        page
        for folder in ("docs", "docs/howto", "docs/migrate")
        for page in (ROOT / folder).glob("*.md")
    ),
]
PICTURES = draw_all()
PHONE = 343
"""Pixels that a page leaves for a picture on a narrow phone."""
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_picture = pytest.mark.parametrize("name", PICTURES)


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncGenerator[None, None]:
    """Take the application through its start-up and its shutdown."""
    to_app: asyncio.Queue[Message] = asyncio.Queue()
    from_app: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(_call(app, scope, to_app, from_app))
    for phase in ("startup", "shutdown"):
        await to_app.put({"type": f"lifespan.{phase}"})
        assert f"lifespan.{phase}.complete" == (await from_app.get())["type"]
        if phase == "startup":
            yield
    await task


async def _call(
    app: ASGIApp,
    scope: object,
    to_app: asyncio.Queue[Message],
    from_app: asyncio.Queue[Message],
) -> None:
    await app(scope, to_app.get, from_app.put)


def answers(app: ASGIApp, *requests: str, json: object = None) -> list[Response]:
    """Start the application, send it `"GET /path"` and so on, shut it down."""

    async def exchange() -> list[Response]:
        transport = ASGITransport(app, raise_app_exceptions=False)
        client = AsyncClient(transport=transport, base_url="http://test")
        async with running(app), client:
            return [
                await client.request(*request.split(), json=json)
                for request in requests
            ]

    return asyncio.run(exchange())


def run_blocks(page: Path, **names: object) -> None:
    """Blocks of a page share a namespace; `names` are for the invisible ones.

    So is `blocks`, what they say: a page can write one into a file.
    """
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    examples = list(document.examples())
    blocks = [str(example.parsed) for example in examples]
    document.namespace.update(names, answers=answers, blocks=blocks)
    for example in examples:
        example.evaluate()


def test_the_page_about_sanic_runs(tmp_path: Path) -> None:
    """The same, in a process of its own."""
    code = (
        "import pathlib, sys; from tests.test_docs import run_blocks;"
        "run_blocks(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(SANIC)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in {*QUEUES, *ELSEWHERE}],
    ids=lambda page: page.name,
)
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a page shows does what the page says."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


@every_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    """The docs builder follows those of the docs, but not those of the README."""
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [] == [link for link in links if not (page.parent / link).exists()]


def test_the_program_of_the_readme_has_at_most_20_lines() -> None:
    """It is on the first screen."""
    readme = Sybil([PythonCodeBlockParser()]).parse(ROOT / "README.md")
    program, _ = readme.examples()
    assert 20 >= len(program.parsed.splitlines())


@every_picture
def test_every_picture_is_what_the_script_draws(name: str) -> None:
    """If not, run `python -m docs.pictures`."""
    assert PICTURES[name] == (DOCS / f"{name}.svg").read_text(encoding="utf-8")


@every_picture
def test_every_picture_can_be_read(name: str) -> None:
    """Its letters have 12 pixels on a phone, and it has colours for a dark page."""
    picture = PICTURES[name]
    sizes = {int(size) for size in re.findall(r"(\d+)px", picture)}
    assert sizes
    assert 12 <= min(sizes) * PHONE / WIDTH
    assert "prefers-color-scheme: dark" in picture


@every_picture
def test_every_picture_is_shown_with_a_description(name: str) -> None:
    """A page shows it, and says in words what is to be seen."""
    markdown = rf"!\[[^\]]{{40,}}\]\({name}\.svg\)"
    directive = rf":::\{{image\}} {name}\.svg\n:alt: .{{40,}}"
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert [] != re.findall(f"{markdown}|{directive}", "\n".join(pages))


def test_the_picture_of_the_states_has_every_step_of_the_code() -> None:
    """And none that a unit of work refuses."""
    drawn = {(a, b) for before, after in STEPS.items() for a in before for b in after}
    steps = {(a.name, b.name) for a, after in TRANSITIONS.items() for b in after}
    assert steps == drawn


def test_the_landing_page_has_a_link_for_each_question_of_who_decides() -> None:
    """Each is one click away from its answer."""
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    asked = re.findall(r"^\[(.+)\?\]\(.+\)\n: ", page, re.MULTILINE)
    assert [
        "Is my 200 true",
        "What does it cost",
        "What if the process dies",
        "How do I test",
        "How do I leave",
    ] == asked
