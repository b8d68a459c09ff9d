"""The documentation: search, navigation, pictures and links work without a network."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver.common.keys import Keys
from starlette.staticfiles import StaticFiles

from tests.integration.browser.chromium import DESKTOP, PHONE, serving, soon
from tests.integration.browser.pages import WITHOUT_SOURCE, build, dead_links, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.browser.chromium import Browser

for needed in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

UNREADABLE = re.compile(r" at 0x|mappingproxy|TypeAliasForwardRef|&lt;|<factory>")
WITHOUT_PICTURE = """
    return [...document.images].filter(each => !each.naturalWidth).map(each => each.src)
"""
FROM = "return performance.getEntriesByType('resource').map(each => each.name)"
LINKED = {
    "https://asgi.readthedocs.io/en/latest/specs/main.html#applications",
    "https://docs.python.org/3/library/collections.abc.html#collections.abc.Callable",
    "https://docs.sqlalchemy.org/en/20/core/engines.html#sqlalchemy.engine.URL",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    return build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with serving(StaticFiles(directory=site)) as address:
        yield address


def test_every_link_leads_somewhere(site: Path) -> None:
    """Each page and each anchor that is linked to exists."""
    pages = read(site)
    assert "errors.html" in pages
    assert [] == dead_links(site, pages)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    """A link to a page or an anchor that does not exist is dead, others are not."""
    links = "<a href='#here'> <a href='b.html'> <a href='a.html#b'> <a href='//x/'>"
    tmp_path.joinpath("a.html").write_text(f"<p id='here'>{links}", encoding="utf-8")
    dead = [("a.html", "b.html"), ("a.html", "a.html#b")]
    assert dead == dead_links(tmp_path, read(tmp_path))


def test_the_navigation_has_every_page(site: Path) -> None:
    """On the first page, one click away."""
    pages = read(site)
    assert set() == set(pages) - {"index.html"} - WITHOUT_SOURCE - {
        link.partition("#")[0] for link in pages["index.html"].tree
    }


def test_the_reference_can_be_read(site: Path) -> None:
    """Types are links to the pages of other projects; defaults are as in code."""
    text = site.joinpath("api.html").read_text(encoding="utf-8")
    signatures = re.findall(r"<dt.*?</dt>", text, re.DOTALL)
    assert [] == [each for each in signatures if UNREADABLE.search(each)]
    assert set() == LINKED - set(read(site)["api.html"].links)


def test_every_page_on_a_phone(site: Path, address: str, browser: Browser) -> None:
    """It is not wider than the screen, shows its pictures, asks nobody else."""
    for name in read(site):
        browser.open(f"{address}/{name}", PHONE)
        assert not browser.is_too_wide, name
        assert [] == browser.run(WITHOUT_PICTURE)
        assert [] == [each for each in browser.run(FROM) if address not in each]


def test_the_search(address: str, browser: Browser) -> None:
    """One types a word, and the first hit leads to a page that has it."""
    browser.open(f"{address}/index.html")
    browser.press(".sidebar-search")
    browser.keys("deferred" + Keys.ENTER)
    hits = "#search-results .search li a"
    soon(True, lambda: bool(browser.texts(hits)))
    browser.press(hits)
    soon(False, lambda: "search.html" in browser.driver.current_url)
    assert "deferred" in browser.text("article")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["index", "api", "errors", "frameworks-matrix"])
def test_look(address: str, browser: Browser, name: str, dark: bool) -> None:
    """Every text can be read, by day and by night, and no page is too wide."""
    browser.open(f"{address}/{name}.html", DESKTOP, dark=dark)
    assert [] == browser.hard_to_read
    assert not browser.is_too_wide
