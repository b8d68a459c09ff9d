from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asgi_uow._unit import options
from tests.support.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """OpenTelemetry's SDK, for this test alone."""
    telemetry = Telemetry()
    yield telemetry
    telemetry.shutdown()


@pytest.fixture(autouse=True)
def _inspectors() -> Iterator[None]:
    """Leave no inspector behind, which costs the units of other tests."""
    yield
    options.inspected.clear()
