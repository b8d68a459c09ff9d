"""The inspector's page: what one sees of real requests, and can do with keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.integration.browser.chromium import DESKTOP, PHONE, SMALL, serving, soon
from tests.integration.browser.site import ATTACK, CARD, Site

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.browser.chromium import Browser

NONE_YET = "None yet: send a request."
HIDE = """
    Object.defineProperty(document, "hidden", {value: true, configurable: true})
    window.asked = 0
    const {fetch} = window
    window.fetch = (...all) => { window.asked += 1; return fetch(...all) }
    window.setTimeout = call => queueMicrotask(call)
"""
TURNS = """
    const [done] = arguments, {port1, port2} = new MessageChannel()
    let turns = 0
    port1.onmessage = () => ++turns < 1000 ? port2.postMessage(0) : done(window.asked)
    port2.postMessage(0)
"""
SHOW = """
    Object.defineProperty(document, "hidden", {value: false, configurable: true})
    document.dispatchEvent(new Event("visibilitychange", {bubbles: true}))
"""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of the site."""
    site = Site(f"sqlite:///{tmp_path}/site.db")
    with (
        serving(site.app) as address,
        httpx.Client(base_url=address, timeout=10) as client,
    ):
        yield client


@pytest.fixture
def page(client: httpx.Client, browser: Browser) -> Browser:
    """The page, opened on a desktop."""
    browser.open(f"{client.base_url}/uow/")
    soon(NONE_YET, lambda: browser.text("#uow-state"))
    return browser


def add(client: httpx.Client) -> None:
    assert 201 == client.post("/items", params={"card": CARD}).status_code


def report(client: httpx.Client) -> None:
    assert 200 == client.get("/report").status_code


def rows(browser: Browser) -> list[str]:
    """What the list has, newest first, without seconds."""
    texts = browser.texts("#uow-list button")
    return [text.partition(" · ")[0] for text in texts]


def steps(browser: Browser) -> list[str]:
    return browser.texts(".uow-steps tbody td:nth-child(2)")


def test_a_request(client: httpx.Client, page: Browser) -> None:
    """It is there by itself: why, a picture with lanes, each step in its order."""
    add(client)

    soon(["✓ POST /items 201 committed"], lambda: rows(page))
    soon("POST /items → 201", lambda: page.text("h2"))
    assert "Committed." in page.text(".uow-sentence")
    assert "1 statement in" in page.text(".uow-facts")
    lanes = ["write connection", "statements", "COMMIT", "hooks", "response", ""]
    assert lanes == page.texts(".uow-lanes > span")
    assert [
        "BEGIN a connection was waited for",
        "INSERT INTO items (card) VALUES (?)",
        "COMMIT",
        "after_commit send_mail",
        "The response leaves: 201",
    ] == steps(page)


def test_marks(client: httpx.Client, page: Browser) -> None:
    """Repeated statements and idle holding are marked, with words for what to see."""
    report(client)

    soon(["↺ GET /report 200 rolled back"], lambda: rows(page))
    assert page.text("#uow-list button").endswith("\N{MULTIPLICATION SIGN}12 !")
    assert "set_rollback_only('a report of <script>" in page.text(".uow-sentence")
    [idle, often] = page.texts(".uow-note")
    assert "s while nothing was executed: " in idle
    assert re.search(r"site\.py:\d+ in Site\.report$", idle)
    often_said = "One statement was executed 12 times: SELECT card FROM items WHERE id"
    assert often.startswith(often_said)
    assert ["executed 12 times"] * 12 == page.texts(".uow-steps .uow-mark")
    assert ["savepoints", "ROLLBACK", "response"] == page.texts(".uow-lanes > span")[
        2:5
    ]
    assert 1 == len(page.texts(".uow-savepoint.uow-failed"))
    # A busy machine has short ones as well; one is long enough for its text.
    assert 1 == len(list(filter(None, page.texts(".uow-idle"))))


def test_nothing_secret(client: httpx.Client, page: Browser) -> None:
    """No value of a parameter, no query, no URL is on the page or in its data."""
    add(client)
    report(client)

    soon(2, lambda: len(rows(page)))
    shown = page.run("return document.documentElement.outerHTML")
    told = client.get("/uow/units").text
    for secret in (CARD, "card=", "sqlite", "site.db"):
        assert secret not in shown
        assert secret not in told


def test_nothing_is_parsed(client: httpx.Client, page: Browser) -> None:
    """A path, a statement and a reason with HTML are shown as they are."""
    client.get(f"/raw/{quote(ATTACK)}")

    soon([f"GET /raw/{ATTACK} → 200"], lambda: page.texts("h2"))
    assert f"SELECT id AS `{ATTACK}` FROM items" == steps(page)[1]
    assert "Units of work" == page.run("return document.title")
    assert [] == page.texts("body script")


def test_keys(client: httpx.Client, page: Browser) -> None:
    """Tab reaches the list, arrows choose; what is chosen stays when others come."""
    add(client)
    report(client)
    soon(2, lambda: len(rows(page)))
    soon("GET /report → 200", lambda: page.text("h2"))

    page.keys(Keys.TAB + Keys.TAB)
    page.keys(Keys.ARROW_DOWN)

    assert "POST /items → 201" == page.text("h2")
    assert page.text("#uow-list [aria-current=true]").startswith("✓ POST /items")
    report(client)
    soon(3, lambda: len(rows(page)))
    assert "POST /items → 201" == page.text("h2")
    page.press("#uow-follow")
    soon("GET /report → 200", lambda: page.text("h2"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, SMALL], ids=str)
def test_look(
    client: httpx.Client, browser: Browser, size: tuple[int, int], dark: bool
) -> None:
    """Nothing is wider than the screen, every text can be read, the choice is seen."""
    add(client)
    report(client)
    browser.open(f"{client.base_url}/uow/", size, dark=dark)
    soon(2, lambda: len(rows(browser)))

    for number in (0, 1):
        browser.press("#uow-list button", number)
        assert not browser.is_too_wide
        assert [] == browser.hard_to_read
    assert 0 <= browser.top("#uow-chosen") < size[1] / 2


def test_in_the_background(client: httpx.Client, page: Browser) -> None:
    """A page that nobody sees asks nothing; seen again, it is up to date."""
    page.run(HIDE)
    add(client)

    assert page.run_to_end(TURNS) <= 1  # one may have been under way
    page.run(SHOW)
    soon(["✓ POST /items 201 committed"], lambda: rows(page))


def test_another_process(tmp_path: Path, browser: Browser) -> None:
    """After a restart the list begins anew; while nothing answers, that is said."""
    first = Site(f"sqlite:///{tmp_path}/first.db")
    with serving(first.app) as address:
        port = int(address.rpartition(":")[2])
        with httpx.Client(base_url=address) as client:
            add(client)
        browser.open(f"{address}/uow/")
        soon(1, lambda: len(rows(browser)))
    soon("Not up to date. Failed to fetch", lambda: browser.text("#uow-state"))

    second = Site(f"sqlite:///{tmp_path}/second.db")
    with serving(second.app, port):
        soon(NONE_YET, lambda: browser.text("#uow-state"))
        assert [] == rows(browser)
    assert all("ERR_CONNECTION" in each for each in browser.complaints())
