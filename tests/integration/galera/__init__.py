"""What happens on a Galera cluster, whose nodes all take writes."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.integration.galera.campaign")
