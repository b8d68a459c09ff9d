"""Everything asgi-uow raises.

```
AsgiUowError
├── ConfigurationError            a URL, key or option that cannot work (ValueError)
│   └── MissingDriverError        the driver is not installed (ImportError)
├── EngineNotInitialisedError     a Database without an engine was used
├── NoUnitOfWorkError             there is no unit of work here (LookupError)
│   └── UnknownDatabaseError      the unit of work does not serve this database
├── BlockReusedError              one unit_of_work() was entered twice (RuntimeError)
├── NestedUnitOfWorkError         a unit inside a unit of the same database
├── UnitOfWorkClosedError         the unit of work has ended
├── ManagedTransactionError       commit(), rollback() or close() by hand
├── ReadOnlySessionError          a write on the read session
├── NoSavepointsError             the server has no savepoints (NotImplementedError)
├── WrongLoopError                used in another event loop or process (RuntimeError)
├── TransactionGoneError          the database has ended the transaction by itself
├── ConcurrentUseError            a call while the session is busy with another
├── DeadlineExceededError         a call after the unit's deadline (TimeoutError)
├── KeyInUseError                 who has the idempotency key has not ended yet
├── SandboxError                  what a sandbox of a test cannot do (RuntimeError)
├── TooManyHooksError             hooks register hooks without an end
└── UnitOfWorkFailedError         a commit was wanted and the work was not kept
    ├── BeforeCommitError         a before_commit hook raised
    ├── CommitFailedError         flush or COMMIT failed; rolled back
    ├── DoomedError               the database had already rolled the work back
    ├── OutcomeUnknownError       nobody knows whether the work was kept
    └── PartialCommitError        one database committed, another did not
```

All but the root are also of the builtin type that fits. None that is raised out of
`send` is an `OSError`: frameworks mistake that for a client that went away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_uow._decision import Cause, Outcome


class AsgiUowError(Exception):
    """The base of every error of this package."""

    # Not "message": Sentry would report an attribute of that name.
    template = "{}"
    page: str | None = None  # the address of docs/errors.md, once it is published

    def __str__(self) -> str:
        about = f" {self.page}#{type(self).__name__.lower()}" if self.page else ""
        return self._say() + about

    def _say(self) -> str:
        return self.template.format(*self.args)


class ConfigurationError(AsgiUowError, ValueError):
    """A URL, configuration key or option that cannot work; never shows a password."""


class MissingDriverError(ConfigurationError, ImportError):
    """The database driver of the URL is not installed."""

    def _say(self) -> str:
        driver, extra = self.args
        remedy = f"pip install 'asgi-uow[{extra}]'" if extra else f"install {driver}"
        return f"The database driver {driver!r} is not installed: {remedy}."


class EngineNotInitialisedError(AsgiUowError, RuntimeError):
    """A `Database` that has no engine yet was used."""

    template = "No engine: create it with Database.from_url(url), or assign db.engine."


class NoUnitOfWorkError(AsgiUowError, LookupError):
    """There is no unit of work in this context."""

    template = (
        "{} needs a unit of work: add UnitOfWorkMiddleware to the application, or use "
        "`async with db:` outside a request (once per message of a websocket)."
    )
    wrong_order = (  # the template where the process has a middleware
        "{} needs a unit of work, and UnitOfWorkMiddleware is not around this code. In "
        "a request put it outside of what asks (`add_middleware`: the last is outside);"
        " elsewhere use `async with db:` (once per message of a websocket)."
    )


class UnknownDatabaseError(NoUnitOfWorkError):
    """The current unit of work does not serve the database that was asked for."""

    template = (
        "{}: the current unit of work does not serve {!r}. Pass it to "
        "UnitOfWorkMiddleware(app, ...) or unit_of_work(...) too."
    )


class BlockReusedError(AsgiUowError, RuntimeError):
    """A `unit_of_work(...)` that was entered before was entered again."""

    template = "Used before: a new one for each block, `async with unit_of_work(db):`."


class NestedUnitOfWorkError(AsgiUowError, RuntimeError):
    """A unit of work was opened inside one of the same database."""

    template = (
        "A unit of work for {!r} is open here. Use savepoint() for a part that may "
        "fail, or unit_of_work(db, independent=True), which has its own connection."
    )


class SandboxError(AsgiUowError, RuntimeError):
    """Something that cannot be done, or undone, in a sandbox of `asgi_uow.testing`."""


class UnitOfWorkClosedError(AsgiUowError, RuntimeError):
    """The unit of work has ended and refuses the operation."""

    template = (
        "{}: this unit of work is {.value}, and its write session closed for good. For "
        "work after the response open a unit of work of its own with `async with db:`."
    )


class ManagedTransactionError(AsgiUowError, RuntimeError):
    """The transaction of a unit of work was ended by hand."""

    template = (
        "{} was called by hand inside a unit of work, which ends by itself when the "
        "response starts. Use set_rollback_only(reason) to have nothing kept, "
        "savepoint() for a part that may fail, or flush() to send changes now. "
        "Database(..., commit_flushes=True) has a library's commit() flush."
    )


class ReadOnlySessionError(AsgiUowError, RuntimeError):
    """Something was written on the read session; nothing was changed."""

    template = "{} was refused: read-only. Write with current_session() (or db.write)."


class NoSavepointsError(AsgiUowError, NotImplementedError):
    """The server refuses SAVEPOINT: it cannot undo a part of a transaction."""

    template = (
        "This server has no savepoints (Aurora DSQL has none). Leave savepoint() out, "
        "or do that part in unit_of_work(db, independent=True), committed by itself."
    )


class WrongLoopError(AsgiUowError, RuntimeError):
    """What belongs to one event loop, or one process, was used in another.

    A session and its unit belong to the loop of the first call; an in-memory database
    to the loop that uses it, and to the process that made it.
    """

    template = (
        "This session, or in-memory database, is of {}, and cannot be used in another "
        "event loop or process. Open another unit of work here, `async with "
        "unit_of_work(db, independent=True):`; use a file in place of memory."
    )


class TransactionGoneError(AsgiUowError, RuntimeError):
    """The database has ended the transaction; another statement would be kept alone."""

    template = "The database ended this transaction: let its error leave the handler."


class ConcurrentUseError(AsgiUowError, RuntimeError):
    """A call came in between that the session cannot serve at the same time."""

    template = (
        "{} came in between: on the same session {}. Let that end first; a stream ends "
        "when it is read to its end, or with `await result.close()`. For a response, "
        "stream from current_read_session() before writing, or inside `async with db:`."
    )


class DeadlineExceededError(AsgiUowError, TimeoutError):
    """A call had no answer when the deadline of the unit of work was over."""

    template = "The unit reached its `deadline`: do less in it, or give it more time."


class KeyInUseError(AsgiUowError, RuntimeError):
    """Who has the idempotency key was not at its end in time; nothing was done."""

    template = (
        "This idempotency key is in use: whoever has it is still at work. Nothing was "
        "done here: try again later."
    )


class TooManyHooksError(AsgiUowError, RuntimeError):
    """The hooks of one unit of work have registered too many others."""

    template = (
        "{}(): hooks may register {} others. Does one register itself again? Register "
        "one hook that does all the work in a loop."
    )


class UnitOfWorkFailedError(AsgiUowError, RuntimeError):
    """A commit was wanted and the work was not kept, or may not have been.

    `outcome` and `cause` say what happened; `__cause__` is the error underneath.
    `retry_after`: seconds; None unless nothing was kept and trying again may help.
    """

    what = "The unit of work was not committed"

    def __init__(
        self,
        outcome: Outcome,
        cause: Cause,
        *,
        detail: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(outcome, cause)
        self.outcome: Outcome = outcome
        self.cause: Cause = cause
        self.retry_after = retry_after
        self._end = f": {detail}" if detail else "."

    def _say(self) -> str:
        about = f"outcome: {self.outcome.value}, cause: {self.cause.value}"
        return f"{self.what} ({about}){self._end}"


class BeforeCommitError(UnitOfWorkFailedError):
    """A `before_commit` hook raised or took too long; everything was rolled back."""

    what = "A before_commit hook stopped the commit"


class CommitFailedError(UnitOfWorkFailedError):
    """The flush or the COMMIT failed; everything was rolled back."""

    what = "The commit failed and everything was rolled back"


class DoomedError(UnitOfWorkFailedError):
    """The database had rolled the work back and the application went on regardless."""

    what = (
        "The database had already given this transaction up: let its error leave the "
        "handler, or put savepoint() around what may fail"
    )


class OutcomeUnknownError(UnitOfWorkFailedError):
    """COMMIT was not answered, or something else has ended the transaction."""

    what = (
        "The end of the transaction was not seen; it may or may not have been kept: "
        "look before you do it again"
    )


class PartialCommitError(UnitOfWorkFailedError):
    """One database of the unit committed and a later one did not."""

    what = "Only some of the databases committed: compare them before you do it again"
