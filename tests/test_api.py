"""What the package offers, and what importing it does."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, resources
from types import ModuleType
from typing import Any

import pytest

import asgi_uow
from asgi_uow import _asgi

OPTIONAL = (
    "aiosqlite",
    "asyncmy",
    "asyncpg",
    "fastapi",
    "opentelemetry",
    "psycopg",
    "pytest",
    "sanic",
    "sentry_sdk",
    "starlette",
)


def test_all() -> None:
    """`__all__` is sorted and names everything public."""
    public = {
        name
        for name, value in vars(asgi_uow).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(public - {"annotations"}) == asgi_uow.__all__


@pytest.mark.parametrize("name", ["observers", "otel", "sanic", "sentry"])
def test_all_of_a_module(name: str) -> None:
    """`__all__` is sorted and names what the module defines for others."""
    module = import_module(f"asgi_uow.{name}")
    defined = {
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and isinstance(value, type)
        and not key.startswith("_")
    }
    assert sorted(module.__all__) == module.__all__
    assert defined <= set(module.__all__) <= set(vars(module))


def test_star_import() -> None:
    """`from asgi_uow import *` gives exactly what `__all__` names."""
    namespace: dict[str, object] = {}
    exec("from asgi_uow import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == asgi_uow.__all__


def test_everything_is_documented() -> None:
    """Every public name says what it means."""
    assert [] == [name for name in asgi_uow.__all__ if not vars(asgi_uow)[name].__doc__]


def test_optional_packages_are_not_imported() -> None:
    """The root and `database` import no driver, framework or error tracker."""
    code = (
        "import sys, asgi_uow, asgi_uow.database, asgi_uow.observers\n"
        f"print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert ("[]\n", "") == (done.stdout, done.stderr)


def test_typed() -> None:
    """The package ships its types."""
    assert resources.files(asgi_uow).joinpath("py.typed").is_file()


def test_asgi_types_are_loose() -> None:
    """Scope and messages are Any: every framework type-checks."""
    assert Any is _asgi.Scope is _asgi.Message
