from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.browser.chromium import Browser, opened
from tests.integration.browser.servers import Chromium
from tests.servers.plugin import require

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests; each loads its own page."""
    require(Chromium)
    with Chromium() as server, opened(server) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; at the end it must not have complained."""
    chromium.complaints()
    yield chromium
    complaints = chromium.complaints()
    chromium.driver.get("about:blank")  # what asks again and again asks no more
    assert [] == complaints
