from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """OpenTelemetry's SDK, for this test alone."""
    telemetry = Telemetry()
    yield telemetry
    telemetry.shutdown()
