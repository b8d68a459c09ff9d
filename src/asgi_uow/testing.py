"""A kit for the tests of applications: nothing that they do is left behind."""

from __future__ import annotations

from asgi_uow._testing.faults import (
    drop_connection,
    fail_commit,
    lose_commit_answer,
    serialization_failure,
)
from asgi_uow._testing.sandbox import SandboxMiddleware, sandbox
from asgi_uow._testing.watching import (
    CapturedHook,
    Statements,
    assert_no_connection_held,
    capture_hooks,
    count_statements,
)

__all__ = [
    "CapturedHook",
    "SandboxMiddleware",
    "Statements",
    "assert_no_connection_held",
    "capture_hooks",
    "count_statements",
    "drop_connection",
    "fail_commit",
    "lose_commit_answer",
    "sandbox",
    "serialization_failure",
]
