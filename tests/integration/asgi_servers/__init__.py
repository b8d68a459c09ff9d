"""What a client sees over a socket, stated once and run over every ASGI server."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "tests.integration.asgi_servers.case", "tests.integration.asgi_servers.facts"
)
