"""The one ContextVar: the unit of work of this request, block or hook.

It holds the unit of work itself, never its parts: a framework that runs a handler in
a child task or a thread hands it a copy of the context, and what is changed inside
the object still arrives, while a value bound again would not.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

    from asgi_uow._unit.unit import UnitOfWork

current: ContextVar[UnitOfWork | None] = ContextVar("asgi_uow.current", default=None)


@contextmanager
def use(unit: UnitOfWork | None) -> Generator[None]:
    """Make `unit` (or none) the current one; a request never trusts what it finds.

    Servers start a pipelined request in the context of the one before.
    https://github.com/encode/uvicorn/issues/2167
    """
    token = current.set(unit)
    try:
        yield
    finally:
        current.reset(token)
