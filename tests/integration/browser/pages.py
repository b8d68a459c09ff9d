"""The pages of the documentation, as Sphinx writes them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WITHOUT_SOURCE = {"genindex.html", "search.html"}


def build(folder: Path) -> Path:
    """Have Sphinx write the site into a folder; a warning is an error."""
    options = ["-W", "-n", "-q", "-E", "-b", "html", "-d", str(folder / "doctrees")]
    site = folder / "html"
    subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(site)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        timeout=300,
    )
    return site


@dataclasses.dataclass
class Page(HTMLParser):
    """What a page can be asked for, and what it asks for."""

    name: str
    anchors: set[str] = dataclasses.field(default_factory=set[str])
    links: list[str] = dataclasses.field(default_factory=list[str])
    tree: list[str] = dataclasses.field(default_factory=list[str])
    """The links of the navigation."""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(
        self, tag: str, attrs: Sequence[tuple[str, str | None]]
    ) -> None:
        """Take the names and addresses of an element."""
        known = {name: value or "" for name, value in attrs}
        self.anchors |= {known[name] for name in ("id", "name") if name in known}
        of = {"a": "href", "link": "href", "img": "src", "script": "src"}.get(tag, "")
        if of in known:
            self.links.append(urljoin(self.name, known[of]))
            if "reference internal" in known.get("class", ""):
                self.tree.append(self.links[-1])


def read(site: Path) -> dict[str, Page]:
    """Give the pages by their paths."""
    pages: dict[str, Page] = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        pages[name] = Page(name)
        pages[name].feed(path.read_text(encoding="utf-8"))
    return pages


def dead_links(site: Path, pages: dict[str, Page]) -> list[tuple[str, str]]:
    """Give page and address of links to files and anchors that do not exist."""
    dead: list[tuple[str, str]] = []
    for page in pages.values():
        for link in filter(lambda each: not urlsplit(each).netloc, page.links):
            name, anchor = urldefrag(link)
            there = pages.get(name)
            is_there = (site / unquote(urlsplit(name).path)).is_file()
            if not is_there or (there and anchor and anchor not in there.anchors):
                dead.append((page.name, link))
    return dead
