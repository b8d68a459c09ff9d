"""Databases and drivers: a new one is a file as `Database` describes, and a row."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asgi_uow._databases import mysql, postgresql, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import URL, Dialect
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

Meaning: TypeAlias = Literal[
    "read_only",  # refused, since nothing can be written there
    "demoted",  # the writer has become a replica: its pool has to find the new one
    "unavailable",  # not reached, or closed; trying again may help
    "absent",  # no such file: of a replica an outage, of the writer a wrong URL
    "conflict",  # with another transaction; trying again may help
    "in_doubt",  # COMMIT may have been carried out
    "disconnect",  # the connection is of no use, and SQLAlchemy does not know
    "recovery_conflict",  # a replica stopped a read in the way of its replication
    "aborting",  # the whole transaction is rolled back, whatever the savepoints
    "syntax",  # not understood, so nothing was done
]
Kind: TypeAlias = Literal["transaction_control", "implicit_commit"]  # of a statement


class _Facts:
    """What a file says; where it says nothing, what the class says."""

    def __init__(self, said: object = None) -> None:
        names = (name for name in dir(said) if not name.startswith("_"))
        vars(self).update({name: getattr(said, name) for name in names})


class Driver(_Facts):
    """Asked without a round trip; what it returns here is right for any, if slow."""

    is_known: bool = False  # if not, its connections are always rolled back
    savepoints_survive: bool = False  # an error aborts at most the innermost of them
    cursor_needs_begin: bool = False  # a cursor exists only inside a transaction
    exclusive_streams: bool = True  # the connection can do nothing beside a stream
    cancels_on_server: bool = False  # a cancelled statement, where it can still await
    errors_hide_state: bool = False  # `in_transaction` is that of before an error
    connect_args: tuple[tuple[str, object], ...] = ()  # unless the engine has its own

    def in_transaction(self, _: Any, /) -> bool:
        return True

    def is_dead(self, _: Any, /) -> bool:
        return False

    is_busy = is_dead  # is a statement in flight, whoever has sent it?
    last_result = is_dead  # which may be `unbuffered_active`: has rows still to be read
    reports_writable = is_dead  # does the server say it is not read-only (any more)?

    def aborts_transaction(self, _: Any, error: BaseException, /) -> bool:
        """Has the server rolled back more than the statement that failed?"""
        return any(each.code_of(error) in codes("aborting") for each in FACTS)

    def process_id(self, _: Any, /) -> int | None:
        return None

    def cut_off(self, _: Any, /) -> None:  # what waits for the server fails at once
        return None


class NoLock:
    """In place of SQLAlchemy's, which 2.0 has for asyncmy and asyncpg alone."""

    _locked = _waiters = False

    async def acquire(self) -> None:
        pass

    def release(self) -> None:
        pass


NO_LOCK = NoLock()


class Database(_Facts):
    """What a file of facts says about its database. SQL that is None does not exist."""

    EXTRAS: Mapping[str, str]  # by the driver they install; the first is the default
    PACKAGES: frozenset[str]  # where drivers, sync ones too, define their errors
    URL_QUERY: Mapping[str, str] = {}  # added to the URL, unless it says otherwise
    ENGINE_OPTIONS: Mapping[str, object] = {}
    SINGLE_WRITER: bool = False  # only one transaction can write at a time
    READ_ONLY_STATEMENT: str  # makes a connection read-only, for as long as it lives
    IS_READ_ONLY: str = "SELECT 0"  # is the server (now) a replica, without writes?
    LAG: str = "SELECT NULL AS Seconds_Behind_Master"
    CANCEL_SQL: str | None = None  # stops a process's statement, from elsewhere
    # Fails if it was aborted unseen, or has the driver know its state.
    QUESTION_BEFORE_COMMIT: str | None = None
    # Sent by asgi-uow, since the driver sends none: it is always in autocommit mode, so
    # what follows an error that ended the transaction is committed at once.
    BEGIN_WRITE: str | None = None
    TRANSACTION_ID: str | None = None  # asked before COMMIT, for `was_committed`
    CODES: Mapping[str, frozenset[int | str]]  # by `Meaning`; "57P" is a class
    TRANSACTION_CONTROL: str | None = None  # regular expression, beside `_USUAL`
    IMPLICIT_COMMIT: str | None = None  # likewise: what commits what came before
    DRIVERS: Mapping[str, Any]  # by SQLAlchemy's name; see `Driver`
    # Finds the code in a driver's error, or in SQLAlchemy's around it.
    code_of: Callable[[BaseException], int | str | None]

    # Prepares a new connection; gives codes that are "aborting" there, beside CODES.
    def set_up(self, _raw: Any, /, *, read_only: bool) -> frozenset[int | str]:  # noqa: ARG002
        return frozenset()

    # How far a replica must be to have all commits the writer has answered; None where
    # nothing can be waited for. Asked after COMMIT on an AUTOCOMMIT connection.
    async def position(self, _connection: AsyncConnection, /) -> str | None:
        return None

    # Waits for `seconds`, the network apart, until the server has reached `position`
    # (a promoted replica has); False if not, or for what is no position. Asked before
    # any read, in AUTOCOMMIT or a transaction that ends with it; one round trip if so.
    async def wait_for(
        self, _connection: AsyncConnection, _position: str, _seconds: float, /
    ) -> bool:
        return False

    # What became of a transaction (by TRANSACTION_ID); None if it cannot be told. Asks
    # again for so many `seconds` while the server is away or still at it.
    async def was_committed(
        self, _engine: AsyncEngine, _transaction: str, _seconds: float, /
    ) -> bool | None:
        return None


DATABASES: Mapping[str, Database] = {  # by SQLAlchemy's name of the dialect
    **dict.fromkeys(("mysql", "mariadb"), Database(mysql)),
    "postgresql": Database(postgresql),
    "sqlite": Database(sqlite),
}
ALIASES = {"postgres": "postgresql"}  # which SQLAlchemy does not know
is_memory = sqlite.is_memory

FACTS = tuple(dict.fromkeys(DATABASES.values()))
_UNKNOWN = Driver()
# Of any database: a file leaves out the drivers that are described in another.
_DRIVERS = {name: Driver(said) for each in FACTS for name, said in each.DRIVERS.items()}


def driver_of(dialect: Dialect) -> Driver:
    return _DRIVERS.get(dialect.driver, _UNKNOWN)


def database_of(dialect: Dialect) -> Database:
    return DATABASES[dialect.name]


@functools.cache
def codes(meaning: Meaning) -> frozenset[int | str]:
    return frozenset().union(*(each.CODES.get(meaning, ()) for each in FACTS))


def _pattern(*statements: str | None) -> re.Pattern[str]:
    comments = r"(?:\s|/\*.*?\*/|--[^\n]*\n|\#[^\n]*\n)*"
    alternatives = "|".join(filter(None, statements))
    return re.compile(f"(?is){comments}(?:{alternatives})")


_USUAL = (
    r"COMMIT\b|BEGIN\b|START\s+TRANSACTION\b|END\b|ABORT\b|"
    r"ROLLBACK\b(?!(?:\s+(?:WORK|TRANSACTION))?\s+TO\b)"
)
_CONTROL = _pattern(_USUAL, *(each.TRANSACTION_CONTROL for each in FACTS))
_COMMITS = _pattern(*(each.IMPLICIT_COMMIT for each in FACTS))
# More words could be a name, or a password. A comment can hide a quote.
_VERB = _pattern(r"((?:(?:CREATE|ALTER|DROP)(?:\s+OR\s+REPLACE)?|SET)\s+[a-z]+|[a-z]+)")
_DML = r"(?is)\s*(?:SELECT|INSERT|UPDATE|DELETE|WITH)\b"
_PLAIN = re.compile(_DML + r"""(?:(?!--|/\*|\$\D)[^'"\\#])*""")
# What ends no transaction, unseen, if no answer comes to it.
HARMLESS = re.compile(
    r"(?is)(?:\s|/\*(?!M?!).*?\*/|--[^\n]*\n)*"
    r"(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|MERGE|WITH|SAVEPOINT|RELEASE|ROLLBACK)\b"
    r"[^;]*;?\s*"
)
_NUMBER = re.compile(r"(?<![\w$])\d[\w.]*")
_SETTINGS = re.compile(r"(?i)\b(?:CALL|SET|RESET|DISCARD|PRAGMA|set_config)\b")


@functools.lru_cache(maxsize=1024)
def kind_of(statement: str) -> Kind | None:
    """Tell what begins or ends a transaction, or commits it on some databases."""
    if _CONTROL.match(statement):
        return "transaction_control"
    return "implicit_commit" if _COMMITS.match(statement) else None


def without_literals(statement: str) -> str:
    """Show a statement to others: with placeholders alone, or no more than its verb."""
    if _PLAIN.fullmatch(statement):
        return _NUMBER.sub("?", statement)
    verb = _VERB.match(statement)
    return "a statement" if verb is None else " ".join(verb[1].upper().split())


@functools.lru_cache(maxsize=1024)
def changes_settings(statement: str) -> bool:
    return _SETTINGS.search(statement) is not None


def shown(url: URL) -> str:
    """Show a URL without its passwords."""
    hidden = {key: "hidden" for key in url.query if "pass" in key.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)
