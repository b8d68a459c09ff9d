"""Fixtures for pytest: a sandbox for each test, its hooks and its statements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asgi_uow.testing import capture_hooks, count_statements, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asgi_uow import Database


@pytest.fixture
def uow_database() -> Any:
    """Give your `Database`, or several in a list: override it in conftest.py."""
    message = (
        "The fixture uow_database is yours: define it in conftest.py, and have it "
        "return the Database of your application, or a list of several."
    )
    raise pytest.UsageError(message)


@pytest.fixture
def uow_sandbox(uow_database: Database | Sequence[Database]) -> Iterator[sandbox]:
    """Roll back, after the test, whatever it has had the databases do."""
    several = isinstance(uow_database, list | tuple)
    with sandbox(*(uow_database if several else (uow_database,))) as box:  # type: ignore[arg-type,misc]
        yield box


@pytest.fixture
def uow_hooks(request: pytest.FixtureRequest) -> Iterator[capture_hooks]:
    """Capture the hooks of the test, which are not called."""
    _enter_first(request)
    with capture_hooks() as hooks:
        yield hooks


@pytest.fixture
def uow_statements(
    request: pytest.FixtureRequest, uow_database: Database | Sequence[Database]
) -> Iterator[list[str]]:
    """List what the test has executed on the first database."""
    _enter_first(request)
    first = uow_database[0] if isinstance(uow_database, list | tuple) else uow_database
    with count_statements(first) as statements:  # type: ignore[arg-type]
        yield statements


def _enter_first(request: pytest.FixtureRequest) -> None:
    if "uow_sandbox" in request.fixturenames:
        request.getfixturevalue("uow_sandbox")
