"""The decision to commit or to roll back, as tables of every combination."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import TYPE_CHECKING

import pytest

from tests.support.private import (
    COMMIT,
    TRANSITIONS,
    Cause,
    State,
    commit_below_400,
    decide_exit,
    decide_response,
    exception_cause,
    rollback,
)

if TYPE_CHECKING:
    from asgi_uow._decision import Headers
    from tests.support.private import Decision

EXPLICIT = rollback(Cause.EXPLICIT)
DOOMED = rollback(Cause.DOOMED)
DOOMED_AND_REFUSED = rollback(Cause.DOOMED, replace_response=True)
BY_STATUS = rollback(Cause.STATUS)
BY_EXCEPTION = rollback(Cause.EXCEPTION)
CANCELLED = rollback(Cause.CANCELLED)

# rollback_only, doomed, forced, status below 400
RESPONSES: list[tuple[bool, bool, bool, bool, Decision]] = [
    (True, True, True, True, EXPLICIT),
    (True, True, True, False, EXPLICIT),
    (True, True, False, True, EXPLICIT),
    (True, True, False, False, EXPLICIT),
    (True, False, True, True, EXPLICIT),
    (True, False, True, False, EXPLICIT),
    (True, False, False, True, EXPLICIT),
    (True, False, False, False, EXPLICIT),
    (False, True, True, True, DOOMED_AND_REFUSED),
    (False, True, True, False, DOOMED),
    (False, True, False, True, DOOMED_AND_REFUSED),
    (False, True, False, False, DOOMED),
    (False, False, True, True, COMMIT),
    (False, False, True, False, COMMIT),
    (False, False, False, True, COMMIT),
    (False, False, False, False, BY_STATUS),
]


class RedirectError(Exception):
    """A framework's exception that becomes a response."""

    def __init__(self, status_code: object) -> None:
        super().__init__(status_code)
        self.status_code = status_code


class StatusError(Exception):
    """The same with the other spelling."""

    def __init__(self, status: object) -> None:
        super().__init__(status)
        self.status = status


REDIRECT = RedirectError(307)
FAILURE = ValueError("wrong")

# error, rollback_only, doomed, forced, commit_on_exit
EXITS: list[tuple[BaseException | None, bool, bool, bool, bool, Decision]] = [
    *(
        (error, True, doomed, forced, on_exit, EXPLICIT)
        for error in (None, FAILURE, REDIRECT)
        for doomed, forced, on_exit in product((True, False), repeat=3)
    ),
    *(
        (error, False, True, forced, on_exit, expected)
        for error, expected in (
            (None, DOOMED_AND_REFUSED),
            (FAILURE, DOOMED),
            (REDIRECT, DOOMED_AND_REFUSED),
        )
        for forced, on_exit in product((True, False), repeat=2)
    ),
    (FAILURE, False, False, True, True, BY_EXCEPTION),
    (FAILURE, False, False, True, False, BY_EXCEPTION),
    (FAILURE, False, False, False, True, BY_EXCEPTION),
    (FAILURE, False, False, False, False, BY_EXCEPTION),
    (REDIRECT, False, False, True, True, COMMIT),
    (REDIRECT, False, False, True, False, COMMIT),
    (REDIRECT, False, False, False, True, COMMIT),
    (REDIRECT, False, False, False, False, EXPLICIT),
    (None, False, False, True, True, COMMIT),
    (None, False, False, True, False, COMMIT),
    (None, False, False, False, True, COMMIT),
    (None, False, False, False, False, EXPLICIT),
]


@pytest.mark.parametrize(
    ("rollback_only", "doomed", "forced", "success", "expected"), RESPONSES
)
def test_decide_response(
    *,
    rollback_only: bool,
    doomed: bool,
    forced: bool,
    success: bool,
    expected: Decision,
) -> None:
    """Rollback-only, doomed, forced, then the status: the first match wins."""
    for status in (200, 302, 399) if success else (400, 404, 500):
        assert expected == decide_response(
            status=status,
            headers=[],
            rollback_only=rollback_only,
            doomed=doomed,
            forced=forced,
            commit_when=commit_below_400,
        )


def test_the_tables_are_complete() -> None:
    """Every combination has its row, once."""
    assert sorted(product((True, False), repeat=4)) == sorted(
        row[:-1] for row in RESPONSES
    )
    exits = {(repr(row[0]), *row[1:-1]) for row in EXITS}
    assert len(exits) == len(EXITS) == 3 * 2**4


@pytest.mark.parametrize("committed", [True, False])
def test_commit_when(*, committed: bool) -> None:
    """A rule of one's own sees status and headers and replaces the default."""
    seen: list[tuple[int, Headers]] = []

    def commit_when(status: int, headers: Headers) -> bool:
        seen.append((status, headers))
        return committed

    decision = decide_response(
        status=404 if committed else 200,
        headers=[(b"x-keep", b"1")],
        rollback_only=False,
        doomed=False,
        forced=False,
        commit_when=commit_when,
    )
    assert (COMMIT if committed else BY_STATUS) == decision
    assert [(404 if committed else 200, [(b"x-keep", b"1")])] == seen


@pytest.mark.parametrize(
    ("error", "rollback_only", "doomed", "forced", "commit_on_exit", "expected"), EXITS
)
def test_decide_exit(
    *,
    error: BaseException | None,
    rollback_only: bool,
    doomed: bool,
    forced: bool,
    commit_on_exit: bool,
    expected: Decision,
) -> None:
    """Rollback-only, doomed, the exception, forced or commit_on_exit."""
    assert expected == decide_exit(
        error,
        rollback_only=rollback_only,
        doomed=doomed,
        forced=forced,
        commit_on_exit=commit_on_exit,
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RedirectError(302), COMMIT),
        (StatusError(303), COMMIT),
        (RedirectError(399), COMMIT),
        (RedirectError(400), BY_EXCEPTION),
        (StatusError(200), BY_EXCEPTION),  # as clients of other services raise
        (StatusError(299), BY_EXCEPTION),
        (RedirectError(300), COMMIT),
        (StatusError(0), BY_EXCEPTION),
        (StatusError(500), BY_EXCEPTION),
        (RedirectError("302"), BY_EXCEPTION),
        (StatusError(None), BY_EXCEPTION),
        (asyncio.CancelledError(), CANCELLED),
        (GeneratorExit(), CANCELLED),
    ],
    ids=repr,
)
def test_exceptions_with_a_status(error: BaseException, expected: Decision) -> None:
    """Only an exception with a numeric status from 300 to 399 is no failure."""
    assert expected == decide_exit(
        error, rollback_only=False, doomed=False, forced=False, commit_on_exit=True
    )


def test_the_cause_of_an_exception() -> None:
    """A cancellation is told from a failure."""
    assert Cause.EXCEPTION is exception_cause(FAILURE)
    assert Cause.CANCELLED is exception_cause(asyncio.CancelledError())
    assert Cause.CANCELLED is exception_cause(KeyboardInterrupt())


def test_the_states_lead_to_an_end() -> None:
    """From every state the unit can come to CLOSED, from which nothing leads."""
    assert set(State) == set(TRANSITIONS)
    reachable = {State.CLOSED}
    while more := {s for s, to in TRANSITIONS.items() if to & reachable} - reachable:
        reachable |= more
    assert set(State) == reachable
    assert not TRANSITIONS[State.CLOSED]
