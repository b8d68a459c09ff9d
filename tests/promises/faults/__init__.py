"""What happens when servers, connections and requests die."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.promises.faults.bank")
