"""What an adapter has to bring, and what it builds an application from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from asgi_uow import Database
    from asgi_uow._asgi import ASGIApp

    Handler: TypeAlias = Callable[[], Awaitable["Reply"]]
    SyncHandler: TypeAlias = Callable[[], "Reply"]
    UploadHandler: TypeAlias = Callable[["Upload"], Awaitable["Reply"]]
    OnMessage: TypeAlias = Callable[[str], Awaitable[str]]
    Hook: TypeAlias = Callable[[], Awaitable[None]]

T = TypeVar("T")
NONE: Mapping[Any, Any] = {}


async def nothing() -> None:
    """Do nothing."""


async def event_stream(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Write server-sent events, where that is left to the application."""
    async for event in events:
        yield f"data: {event}\n\n"


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response: a text or, if given, something longer.

    `background` runs once the response has been sent.
    """

    text: str = ""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    chunks: AsyncIterator[str] | None = None
    sync_chunks: Iterator[str] | None = None
    events: AsyncIterator[str] | None = None
    file: Path | None = None
    background: Callable[[], Awaitable[None]] | None = None


@dataclasses.dataclass(frozen=True)
class Injected:
    """A handler, and two dependencies that the framework calls before it."""

    handler: Handler
    first: Callable[[], object]
    second: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Upload:
    """What came with a POST of a form, as the framework gives it to a handler."""

    number: int
    """From the path."""
    title: str
    """The field of the form that is a text."""
    filename: str
    content: bytes
    """Of the field `file`."""
    scope: Any


@dataclasses.dataclass(frozen=True)
class Site:
    """What an application serves, by path; handlers take no argument."""

    routes: Mapping[str, Handler] = dataclasses.field(default_factory=lambda: NONE)
    sync_routes: Mapping[str, SyncHandler] = dataclasses.field(
        default_factory=lambda: NONE
    )
    heads: Mapping[str, Handler] = dataclasses.field(default_factory=lambda: NONE)
    """Served for HEAD only."""
    uploads: Mapping[str, UploadHandler] = dataclasses.field(
        default_factory=lambda: NONE
    )
    """Each serves POST with a number after its path."""
    injected: Mapping[str, Injected] = dataclasses.field(default_factory=lambda: NONE)
    websockets: Mapping[str, OnMessage] = dataclasses.field(
        default_factory=lambda: NONE
    )
    """Each is called with every message and returns the answer to it."""
    listeners: Mapping[str, Hook] = dataclasses.field(default_factory=lambda: NONE)
    """Each is called by an event that a handler emits."""
    mounts: Mapping[str, ASGIApp] = dataclasses.field(default_factory=lambda: NONE)
    middleware: Hook | None = None
    """Called by a middleware of the framework's own, before the handler."""
    middleware_after: Hook = nothing
    """Called by one after the handler, before the response is sent."""
    error_handlers: Mapping[type[Exception], SyncHandler] = dataclasses.field(
        default_factory=lambda: NONE
    )
    startup: Hook = nothing
    shutdown: Hook = nothing


class Adapter(ABC):
    """A framework, and the way in which the middleware is added to it."""

    name: ClassVar[str]

    lacks: ClassVar[Mapping[str, str]] = {}
    """The facts that it cannot show, and why."""

    answers_failures: ClassVar[bool] = False
    """Whether it answers an exception out of `send` with a response of its own."""

    has_lifespan: ClassVar[bool] = True

    listens_in_unit: ClassVar[bool] = True
    """Whether what listens to an event runs in the context of who emits it."""

    @abstractmethod
    def application(self, site: Site, *databases: Database, **options: Any) -> ASGIApp:
        """Build it with the middleware, without databases without."""

    @abstractmethod
    def not_found(self) -> Exception:
        """Make the exception that a handler raises for a 404."""

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in the framework's own way of not blocking."""
        raise NotImplementedError
