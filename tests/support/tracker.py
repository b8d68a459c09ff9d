"""A real Sentry client whose transport keeps what would have been sent."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sentry_sdk
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Generator

    from sentry_sdk.envelope import Envelope


class RecordingTransport(Transport):
    """Keeps the bytes that would have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.sent.append(envelope.serialize())

    @property
    def events(self) -> list[Any]:
        return [json.loads(sent.splitlines()[2]) for sent in self.sent]


@contextmanager
def sentry(**options: Any) -> Generator[RecordingTransport, None, None]:
    """Have a client as `sentry_sdk.init()` makes it, for this context alone."""
    transport = RecordingTransport()
    client = sentry_sdk.Client(
        dsn="https://key@sentry.invalid/1",
        transport=transport,
        default_integrations=False,  # they would stay for the other tests
        integrations=[LoggingIntegration(), DedupeIntegration()],
        **options,
    )
    with sentry_sdk.isolation_scope() as scope:
        scope.set_client(client)
        yield transport


def exceptions(event: Any) -> list[str]:
    """Name the exceptions of an event, the one underneath first."""
    return [each["type"] for each in event["exception"]["values"]]
