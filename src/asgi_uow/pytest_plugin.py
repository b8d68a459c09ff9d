"""Fixtures for pytest: a sandbox for each test, its hooks and its statements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asgi_uow.testing import capture_hooks, count_statements, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asgi_uow.database import Database
    from asgi_uow.testing import Statements


@pytest.fixture
def uow_database() -> Database | Sequence[Database]:
    """Give your `Database`, or several in a list: override it in conftest.py."""
    message = (
        "The fixture uow_database is yours: define it in conftest.py, and have it "
        "return the Database of your application, or a list of several."
    )
    raise pytest.UsageError(message)


@pytest.fixture
def uow_sandbox(uow_database: Database | Sequence[Database]) -> Iterator[sandbox]:
    """Roll back, after the test, whatever it has had the databases do."""
    with sandbox(*_all(uow_database)) as box:
        yield box


@pytest.fixture
def uow_hooks(request: pytest.FixtureRequest) -> Iterator[capture_hooks]:
    """Capture the hooks of the test, which are not called."""
    _enter_sandbox(request)
    with capture_hooks() as hooks:
        yield hooks


@pytest.fixture
def uow_statements(
    request: pytest.FixtureRequest, uow_database: Database | Sequence[Database]
) -> Iterator[Statements]:
    """List what the test has executed on the first database."""
    _enter_sandbox(request)
    with count_statements(_all(uow_database)[0]) as statements:
        yield statements


def _all(databases: Any) -> Sequence[Database]:
    return databases if isinstance(databases, list | tuple) else (databases,)


def _enter_sandbox(request: pytest.FixtureRequest) -> None:
    """Have the sandbox of the test, if it has one, entered first."""
    if "uow_sandbox" in request.fixturenames:
        request.getfixturevalue("uow_sandbox")
