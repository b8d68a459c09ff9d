"""Who answers, by framework; hand-written code comes first."""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from . import peers
from .hosts import on_asgi, on_fastapi, on_starlette

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from .apps import Maker
    from .hosts import Host
    from .peers import Work

    Make: TypeAlias = Callable[[Work, str, AsyncExitStack], Any]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to answer the request."""

    name: str
    framework: str
    package: str
    """What has to be installed."""
    make: Make

    def maker(self, work: Work) -> Maker:
        return partial(self.make, work)


FRAMEWORKS: dict[str, Host] = {
    "asgi": on_asgi,
    "starlette": on_starlette,
    "fastapi": on_fastapi,
}
BY_FRAMEWORK: dict[str, list[tuple[str, str, Callable[..., Any]]]] = {
    "asgi": [
        ("hand-written", "asgi_uow", peers.hand_written),
        ("ours", "asgi_uow", peers.ours),
        (
            "context-async-sqlalchemy",
            "context_async_sqlalchemy",
            peers.context_async_sqlalchemy,
        ),
    ],
    "starlette": [
        ("hand-written", "starlette", peers.hand_written),
        ("ours", "starlette", peers.ours),
        ("advanced-alchemy", "advanced_alchemy", peers.advanced_alchemy),
        ("svcs", "svcs", peers.svcs),
    ],
    "fastapi": [
        ("hand-written", "fastapi", peers.hand_written),
        ("ours", "fastapi", peers.ours),
        ("yield dependency", "fastapi", peers.yield_dependency),
        (
            "yield, scope=function",
            "fastapi",
            partial(peers.yield_dependency, scope="function"),
        ),
        (
            "context-async-sqlalchemy",
            "context_async_sqlalchemy",
            partial(peers.context_async_sqlalchemy, on_fastapi=True),
        ),
        (
            "fastapi-async-sqlalchemy",
            "fastapi_async_sqlalchemy",
            peers.fastapi_async_sqlalchemy,
        ),
        ("fastapi-sqla", "fastapi_sqla", peers.fastapi_sqla),
    ],
}
"""Name, what has to be installed, and how it is made."""
CONTESTANTS = [
    Contestant(name, framework, package, partial(make, FRAMEWORKS[framework]))
    for framework, contestants in BY_FRAMEWORK.items()
    for name, package, make in contestants
]


@cache
def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def installed(framework: str) -> list[Contestant]:
    """Return the contestants on a framework, hand-written code first."""
    return [
        each
        for each in CONTESTANTS
        if each.framework == framework and is_installed(each.package)
    ]


def missing() -> list[str]:
    """Return the names of what is left out."""
    return [each.name for each in CONTESTANTS if not is_installed(each.package)]


def load() -> None:
    """Import all that is installed, so that processes that are forked need not."""
    for each in CONTESTANTS:
        if is_installed(each.package):
            importlib.import_module(each.package)


VARIANTS: list[tuple[str, str, Make]] = [
    ("hand-written", "fastapi", partial(peers.hand_written, on_fastapi)),
    (
        "yield dependency",
        "fastapi",
        partial(peers.yield_dependency, on_fastapi),
    ),
    (
        "yield, scope=function",
        "fastapi",
        partial(peers.yield_dependency, on_fastapi, scope="function"),
    ),
    (
        "advanced-alchemy, autocommit",
        "advanced_alchemy",
        partial(peers.advanced_alchemy, on_starlette),
    ),
    (
        "advanced-alchemy, the handler commits",
        "advanced_alchemy",
        partial(peers.advanced_alchemy, on_starlette, commits=True),
    ),
    (
        "context-async-sqlalchemy, for FastAPI",
        "context_async_sqlalchemy",
        partial(peers.context_async_sqlalchemy, on_fastapi, on_fastapi=True),
    ),
    (
        "context-async-sqlalchemy, for ASGI",
        "context_async_sqlalchemy",
        partial(peers.context_async_sqlalchemy, on_fastapi),
    ),
    (
        "fastapi-async-sqlalchemy",
        "fastapi_async_sqlalchemy",
        partial(peers.fastapi_async_sqlalchemy, on_fastapi),
    ),
    ("fastapi-sqla", "fastapi_sqla", partial(peers.fastapi_sqla, on_fastapi)),
    ("svcs, suppress_context_exit=False", "svcs", partial(peers.svcs, on_starlette)),
    (
        "svcs, the handler commits",
        "svcs",
        partial(peers.svcs, on_starlette, commits=True),
    ),
    ("ours", "fastapi", partial(peers.ours, on_fastapi)),
]
"""Contestants of the truth table: with the options that make more of it true."""


def variants(*, is_postgresql: bool) -> dict[str, Make]:
    """Return what can be tried on a database; on others that option needs a table."""
    found = {name: make for name, package, make in VARIANTS if is_installed(package)}
    if is_postgresql:
        ours = partial(peers.ours, on_fastapi, resolve_unknown=True)
        found["ours, resolve_unknown=True"] = ours
    return found
