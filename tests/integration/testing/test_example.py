"""The project that the page about tests shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support import ROOT
from tests.support.databases import DATABASES, on

if TYPE_CHECKING:
    import pytest

    from tests.servers import Backend

PROJECT = ROOT / "docs" / "examples" / "tested"
PLUGINS = ("-p", "no:cacheprovider", "-p", "anyio.pytest_plugin")
OURS = ("-p", "asgi_uow.pytest_plugin")


@on(*DATABASES)
async def test_the_example_passes(
    backend: Backend, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tests pass on every database, and leave no rows behind."""
    monkeypatch.setenv("DATABASE_URL", backend.url)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = pytester.runpytest_subprocess(*PLUGINS, *OURS, str(PROJECT))
    result.assert_outcomes(passed=11)
    assert 0 == await backend.scalar("SELECT count(*) FROM orders")
