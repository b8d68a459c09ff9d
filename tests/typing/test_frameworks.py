"""Adding the middleware type-checks with every framework; here it also runs.

A comment that ignores an error is a claim: without that error the comment itself is
one for mypy (`warn_unused_ignores`). For pyright there is none to ignore.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from blacksheep import Application, Router
from django.core import asgi as django_asgi  # type: ignore[import-untyped]
from falcon.asgi import App
from fastapi import FastAPI
from litestar import Litestar
from quart import Quart
from sanic import Sanic
from starlette.applications import Starlette
from starlette.middleware import Middleware

from asgi_uow import Database, UnitOfWorkMiddleware

if TYPE_CHECKING:
    from litestar.types import ASGIApp as LitestarASGIApp

    from asgi_uow._asgi import ASGIApp


@pytest.fixture
def db() -> Database:
    """A database that nobody connects to."""
    return Database.from_url("sqlite://")


def test_starlette(db: Database) -> None:
    """Starlette takes the class with its arguments, early or late."""
    app = Starlette(middleware=[Middleware(UnitOfWorkMiddleware, db)])
    app.add_middleware(UnitOfWorkMiddleware, db, hook_timeout=1.0)
    assert 2 == len(app.user_middleware)


def test_fastapi(db: Database) -> None:
    """FastAPI takes the class with its arguments, early or late."""
    app = FastAPI(middleware=[Middleware(UnitOfWorkMiddleware, db)])
    app.add_middleware(UnitOfWorkMiddleware, db, hook_timeout=1.0)
    assert 2 == len(app.user_middleware)


def test_litestar(db: Database) -> None:
    """Litestar is wrapped, or takes a function that wraps."""

    def unit_of_work(app: LitestarASGIApp) -> LitestarASGIApp:
        return UnitOfWorkMiddleware(app, db)

    app = Litestar(middleware=[unit_of_work])
    assert [unit_of_work] == app.middleware
    wrapped: ASGIApp = UnitOfWorkMiddleware(app, db)
    assert isinstance(wrapped, UnitOfWorkMiddleware)


def test_quart(db: Database) -> None:
    """Quart keeps its own object and has the inside wrapped."""
    app = Quart(__name__)
    # For mypy no method can be replaced, though Quart's documentation says so.
    app.asgi_app = UnitOfWorkMiddleware(app.asgi_app, db)  # type: ignore[method-assign]
    assert isinstance(app.asgi_app, UnitOfWorkMiddleware)


def test_falcon(db: Database) -> None:
    """Falcon is wrapped."""
    falcon = App()
    app: ASGIApp = UnitOfWorkMiddleware(falcon, db)
    assert isinstance(app, UnitOfWorkMiddleware)


def test_blacksheep(db: Database) -> None:
    """BlackSheep is wrapped."""
    app: ASGIApp = UnitOfWorkMiddleware(Application(router=Router()), db)
    assert isinstance(app, UnitOfWorkMiddleware)


def test_django(db: Database) -> None:
    """Django is wrapped; it ships no type hints."""
    import_module("tests.integration.frameworks.on_django")  # makes the settings
    application: ASGIApp = UnitOfWorkMiddleware(django_asgi.get_asgi_application(), db)
    assert isinstance(application, UnitOfWorkMiddleware)


def test_sanic(db: Database) -> None:
    """Sanic is wrapped."""
    app: ASGIApp = UnitOfWorkMiddleware(Sanic("typed"), db)
    assert isinstance(app, UnitOfWorkMiddleware)
