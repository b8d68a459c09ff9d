"""Every test can ask for a database: see `tests.support.databases`."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.servers", "tests.support")
pytest_plugins = ["tests.servers.plugin", "tests.support.fixtures", "pytester"]
