"""The demo shop on a phone: what each button does is shown where one looks."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from asgi_uow import Database
from docs.examples.shop.app import create_app
from docs.examples.shop.models import close_shop, open_shop
from docs.examples.shop.steps import STEPS
from tests.integration.browser.chromium import DESKTOP, PHONE, serving, soon

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from starlette.applications import Starlette

    from docs.examples.shop.steps import Step
    from tests.integration.browser.chromium import Browser

SENTENCES = (
    "Committed.",
    "Rolled back: an error of the database was swallowed",
    "Rolled back: set_rollback_only('dry run') was called.",
    "Rolled back: an exception left the handler.",
    "Rolled back: the database refused to commit it.",
    "Rolled back: an exception left the handler.",
    "Committed.",
)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[str]:
    """The address of an open shop."""
    database = Database.from_url(f"sqlite:///{tmp_path}/shop.db")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        await open_shop(database)
        yield
        await close_shop(database)
        await database.dispose()

    app = create_app(database)
    app.router.lifespan_context = lifespan
    with serving(app) as address:
        yield address


def press(browser: Browser, step: Step) -> None:
    """Press a button, and wait until its result is there."""
    soon(len(STEPS), lambda: len(browser.texts("#buttons button")))
    browser.press("#buttons button", STEPS.index(step))
    soon(1, lambda: len(browser.texts("#log tr td:nth-child(5)")))
    soon(False, lambda: browser.run("return document.getElementById('result').hidden"))


def test_an_order(shop: str, browser: Browser) -> None:
    """One sees BEGIN, INSERT, COMMIT, the mail, and only then the response leave."""
    browser.open(shop)
    press(browser, STEPS[0])

    steps = browser.texts("#unit tbody td:nth-child(2)")
    verbs = [text.partition(" ")[0] for text in steps]
    promised = ["BEGIN", "SELECT", "INSERT", "UPDATE", "COMMIT", "after_commit", "The"]
    assert promised == verbs
    assert "The response leaves: 201" == steps[-1]


@pytest.mark.parametrize(
    ("step", "sentence"), [*zip(STEPS, SENTENCES, strict=True)], ids=range(len(STEPS))
)
def test_each_button(shop: str, browser: Browser, step: Step, sentence: str) -> None:
    """On a phone the result is in sight, with words for what came of the request."""
    browser.open(shop, PHONE)
    press(browser, step)

    assert browser.text("#verdict").endswith("As promised.")
    assert sentence in browser.text("#unit .uow-sentence")
    for shown in ("#verdict", "#unit .uow-sentence", "#unit .uow-lanes"):
        assert 0 <= browser.top(shown) < PHONE[1] - 100
    assert not browser.is_too_wide
    # A browser logs what was answered with an error.
    assert (step.answers[0] >= 400) == bool(browser.complaints())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=str)
def test_look(shop: str, browser: Browser, size: tuple[int, int], dark: bool) -> None:
    """Every text can be read, and no page is wider than its screen."""
    browser.open(shop, size, dark=dark)
    press(browser, STEPS[0])

    assert [] == browser.hard_to_read
    assert not browser.is_too_wide
