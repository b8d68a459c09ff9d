"""Work that is handed to real queues, on real servers."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.integration.handoff.queues")
