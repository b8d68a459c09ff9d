"""Wrong arguments: the error comes where they are given, and says what to do."""

from __future__ import annotations

import functools
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

import asgi_uow as uow
from asgi_uow import Database, UnitOfWorkMiddleware, unit_of_work
from asgi_uow.errors import ConfigurationError, NoUnitOfWorkError
from asgi_uow.observers import LoggingObserver
from tests.support import shop
from tests.support.asgi import endpoint, request
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_uow._asgi import Receive, Scope, Send

URL = "sqlite+aiosqlite:///shop.db"
APP: Any = endpoint(lambda: shop.insert(1))
ENGINE: Any = create_async_engine(URL)
DB = Database.from_url(URL)
NO_DATABASES = [
    (URL, "not str: make it with Database.from_url(url)"),
    (ENGINE, "not AsyncEngine: make it with"),
    (APP, "not function: make it with"),
    (None, "not NoneType: make it with"),
]


@pytest.mark.parametrize(("wrong", "message"), NO_DATABASES)
@pytest.mark.parametrize(
    "use", [functools.partial(UnitOfWorkMiddleware, APP, DB), unit_of_work]
)
def test_no_database(use: Callable[[Any], object], wrong: object, message: str) -> None:
    """What is no Database is named, and how to make one of it."""
    with pytest.raises(TypeError) as caught:
        use(wrong)
    assert message in str(caught.value)
    assert "needs at least one Database" in str(caught.value)


@pytest.mark.parametrize(("wrong", "message"), NO_DATABASES[:3])
@on("aiosqlite")
async def test_no_database_in_an_accessor(
    db: Database, wrong: Any, message: str
) -> None:
    """So it is where a handler asks for a session."""
    async with db as unit:
        for use in (
            uow.current_session,
            uow.current_read_session,
            uow.savepoint,
            unit.session,
            unit.read_session,
        ):
            with pytest.raises(TypeError) as caught:
                use(wrong)
            assert message in str(caught.value)
        with pytest.raises(TypeError, match="not str"):
            async with uow.parallel_read(URL):  # type: ignore[arg-type]
                raise NotImplementedError


@pytest.mark.parametrize("app", [DB, ENGINE, "shop:app", None])
def test_swapped(app: Any) -> None:
    """The application comes first, and what is none is refused at once."""
    with pytest.raises(ConfigurationError, match="which comes first") as caught:
        UnitOfWorkMiddleware(app, APP)
    assert type(app).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("commit_when", True, "a function of status and headers"),
        ("commit_when", None, "a function of status and headers"),
        ("commit_when", lambda: True, "a function of status and headers"),
        ("commit_when", len, "a function of status and headers"),
        ("commit_timeout", -1, "seconds above 0, or None"),
        ("commit_timeout", 0, "seconds above 0, or None"),
        ("commit_timeout", "30", "seconds above 0, or None"),
        ("commit_timeout", float("nan"), "seconds above 0, or None"),
        ("hook_timeout", -0.5, "seconds above 0, or None"),
        ("hook_timeout", Decimal(5), "seconds above 0, or None"),
        ("hook_timeout", "5", "seconds above 0, or None"),
        ("observers", print, "a list of functions"),
        ("observers", ["logging"], "a list of functions"),
        ("observers", [APP], "a list of functions"),
        ("observers", [LoggingObserver], "a list of functions"),
        ("causal_reads", "secret", r"CausalReads\(secret\), or None"),
        ("causal_reads", uow.CausalReads, r"CausalReads\(secret\), or None"),
        ("error_app", "app", "an ASGI application, or None"),
    ],
)
def test_options_of_the_middleware(option: str, value: Any, kind: str) -> None:
    """An option that cannot work is refused when the middleware is made."""
    with pytest.raises(ConfigurationError, match=f"^{option} must be {kind}") as caught:
        UnitOfWorkMiddleware(APP, DB, **{option: value})
    shown = value if isinstance(value, int | float) else type(value).__name__
    assert str(caught.value).endswith(f"; it is {shown}.")


@on("aiosqlite")
async def test_unit_used_as_a_session(db: Database) -> None:
    """`async with db as session` gives a unit, which says where the session is."""
    async with db as unit:
        session: Any = unit
        for name in ("execute", "scalars", "add", "commit"):
            with pytest.raises(
                AttributeError, match=r"its session is uow\.session\(\)"
            ):
                getattr(session, name)
        assert not hasattr(session, "execute")


@on("aiosqlite")
async def test_outside_of_the_middleware(db: Database) -> None:
    """A middleware that is outside of ours is told that the order is wrong."""
    inner = UnitOfWorkMiddleware(APP, db)

    async def authenticate(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(
            NoUnitOfWorkError, match="is not around this code"
        ) as caught:
            uow.current_session()
        assert "the last is outside" in str(caught.value)
        await inner(scope, receive, send)

    assert 200 == (await request(authenticate)).status


def test_without_a_middleware() -> None:
    """Where the process has no middleware, the error asks for one."""
    code = (
        "import asgi_uow as uow\n"
        "try:\n    uow.current_session()\n"
        "except uow.errors.NoUnitOfWorkError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert "add UnitOfWorkMiddleware to the application" in done.stdout
