"""What an application sees, stated once and run over every framework."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "tests.integration.frameworks.case", "tests.integration.frameworks.facts"
)
