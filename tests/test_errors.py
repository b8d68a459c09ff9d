"""The tree of errors is what its docstring shows, and every message helps."""

from __future__ import annotations

import builtins
import copy
import inspect
import re

import pytest

from asgi_uow import Database, Outcome, errors
from asgi_uow._testing.shared import HELD
from tests.support import ROOT
from tests.support.private import Cause, State

LINE = re.compile(
    r"^(?P<depth>[│├└─ ]*)(?P<name>\w+Error)(?: .*?(?:\((?P<mixin>\w+)\))?)?$"
)
DB = Database.from_url("postgresql://app:s3cret@db.example/shop")

PAGE = ROOT / "docs" / "errors.md"
ENTRY = re.compile(r"^##+ `(\w+)`\n\n(.*?)(?=^#|\Z)", re.DOTALL | re.MULTILINE)
SITE = "https://docs.example/errors.html"
FAILED = (Outcome.ROLLED_BACK, Cause.COMMIT_FAILED)
REMEDIES: list[tuple[errors.AsgiUowError, str]] = [
    (errors.MissingDriverError("asyncpg", "postgresql"), "asgi-uow[postgresql]"),
    (errors.MissingDriverError("aiomysql", None), "install aiomysql"),
    (errors.EngineNotInitialisedError(), "Database.from_url("),
    (errors.NoUnitOfWorkError("savepoint()"), "async with db:"),
    (errors.UnknownDatabaseError("session()", DB), "UnitOfWorkMiddleware(app, ...)"),
    (errors.BlockReusedError(), "async with unit_of_work(db):"),
    (errors.NestedUnitOfWorkError(DB), "savepoint()"),
    (errors.NestedUnitOfWorkError(DB), "unit_of_work(db, independent=True)"),
    (errors.UnitOfWorkClosedError("session()", State.CLOSED), "async with db:"),
    (errors.ManagedTransactionError("session.commit()"), "set_rollback_only(reason)"),
    (errors.ManagedTransactionError("session.commit()"), "savepoint()"),
    (errors.ReadOnlySessionError("A flush"), "current_session()"),
    (errors.NoSavepointsError(), "unit_of_work(db, independent=True)"),
    (errors.WrongLoopError("process 7"), "independent=True"),
    (errors.TransactionGoneError(), "leave the handler"),
    (
        errors.ConcurrentUseError("session.execute()", "a stream() is being read"),
        "await result.close()",
    ),
    (errors.DeadlineExceededError(), "give it more time"),
    (errors.KeyInUseError(), "try again later"),
    (errors.SandboxError(HELD), "Leave its block"),
    (errors.TooManyHooksError("after_commit", 100), "in a loop"),
    (errors.UnitOfWorkFailedError(*FAILED), "not committed"),
    (errors.BeforeCommitError(*FAILED, detail="send"), "before_commit hook"),
    (errors.CommitFailedError(*FAILED), "everything was rolled back"),
    (errors.DoomedError(*FAILED), "let its error leave the handler"),
    (errors.OutcomeUnknownError(*FAILED), "look before you do it again"),
    (errors.PartialCommitError(*FAILED), "compare them before you do it again"),
]


def documented() -> dict[str, tuple[str | None, str | None]]:
    """The tree of the docstring: name, parent and builtin."""
    tree = inspect.cleandoc(errors.__doc__ or "").split("```")[1]
    found: dict[str, tuple[str | None, str | None]] = {}
    parents: list[str] = []
    for line in filter(None, tree.splitlines()):
        match = LINE.fullmatch(line)
        assert match, line
        depth = len(match["depth"]) // 4
        del parents[depth:]
        found[match["name"]] = (parents[-1] if parents else None, match["mixin"])
        parents.append(match["name"])
    return found


def defined() -> dict[str, type[BaseException]]:
    """The exceptions of the module."""
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }


def entries() -> list[tuple[str, str]]:
    """What the page says under the heading of a class: name and text."""
    return ENTRY.findall(PAGE.read_text(encoding="utf-8"))


def test_the_tree() -> None:
    """The tree names every class, in order of definition, under its parent."""
    tree = documented()
    assert set(defined()) == set(tree)
    for name, (parent, mixin) in tree.items():
        bases = [base.__name__ for base in defined()[name].__bases__]
        assert (parent or "Exception") == bases[0]
        if mixin is not None:
            assert [mixin] == bases[1:]


@pytest.mark.parametrize(
    "kind", list(defined().values()), ids=lambda kind: kind.__name__
)
def test_builtins(kind: type[BaseException]) -> None:
    """All but the root are a builtin too; what leaves `send` is no OSError."""
    fitting = [
        base
        for base in kind.__mro__
        if vars(builtins).get(base.__name__) is base
        and base not in {object, BaseException, Exception}
    ]
    assert (kind is errors.AsgiUowError) == (not fitting)
    assert (kind is errors.DeadlineExceededError) == issubclass(kind, OSError)


@pytest.mark.parametrize(
    ("error", "remedy"), REMEDIES, ids=lambda value: type(value).__name__
)
def test_remedies(error: errors.AsgiUowError, remedy: str) -> None:
    """Every message says what to do, or what is certain; never the password."""
    assert remedy in str(error)
    assert "s3cret" not in str(error)


@pytest.mark.parametrize(
    "error", [error for error, _ in REMEDIES], ids=lambda error: type(error).__name__
)
def test_copies(error: errors.AsgiUowError) -> None:
    """A copy of an error, made for another process for example, says the same."""
    assert str(error) == str(copy.copy(error))


@pytest.mark.parametrize(
    "error", [error for error, _ in REMEDIES], ids=lambda error: type(error).__name__
)
def test_the_address(
    error: errors.AsgiUowError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there is a site, every message ends in the address of its error."""
    alone = str(error)
    monkeypatch.setattr(errors.AsgiUowError, "page", SITE)
    assert f"{alone} {SITE}#{type(error).__name__.lower()}" == str(error)


def test_the_page_has_a_heading_for_every_error() -> None:
    """The page has one for each class, and for nothing else: addresses stay."""
    assert sorted(defined()) == sorted(name for name, _ in entries())


@pytest.mark.parametrize("name", defined())
def test_the_page_says_what_to_do(name: str) -> None:
    """It says for each class of which builtin it is, when it is raised, what to do."""
    text = dict(entries())[name]
    mixin = documented()[name][1]
    assert mixin is None or f"Also a `{mixin}`." in text
    assert ["When", "What to do"] == re.findall(r"\*\*(.+?):\*\* [\w`]", text)


def test_every_error_has_a_message() -> None:
    """No error but the two that are always given one can be raised without."""
    told = {type(error).__name__ for error, _ in REMEDIES}
    assert {"AsgiUowError", "ConfigurationError"} == set(defined()) - told


def test_what_a_failure_carries() -> None:
    """A failure tells outcome, cause and whether trying again may help."""
    failure = errors.CommitFailedError(
        Outcome.ROLLED_BACK, Cause.COMMIT_FAILED, retry_after=1
    )
    assert Outcome.ROLLED_BACK is failure.outcome
    assert Cause.COMMIT_FAILED is failure.cause
    assert 1 == failure.retry_after
    assert str(failure) == (
        "The commit failed and everything was rolled back "
        "(outcome: rolled back, cause: commit_failed)."
    )
    hook = errors.BeforeCommitError(*FAILED, detail="Mailer.send")
    assert str(hook).endswith("cause: commit_failed): Mailer.send")
    assert hook.retry_after is None
