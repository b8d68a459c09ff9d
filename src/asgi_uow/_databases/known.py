"""Databases and drivers: a new one is a file as `Database` describes, and a row."""

from __future__ import annotations

import functools
import os
import re
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from asgi_uow._databases import cockroachdb, mysql, postgresql, sqlite

if TYPE_CHECKING:
    from asyncio import Task
    from collections.abc import Callable, Collection, Mapping

    from sqlalchemy import URL, Dialect, Insert, Table
    from sqlalchemy.ext.asyncio import AsyncConnection

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
    "unsupported",  # a statement that the server does not have, such as SAVEPOINT
]
Kind: TypeAlias = Literal["transaction_control", "implicit_commit", "setting", "local"]


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
    errors_hide_state: bool = False  # `in_transaction` is that of before an error
    connect_args: tuple[tuple[str, object], ...] = ()  # unless the engine has its own
    pooled_args: tuple[tuple[str, object], ...] = ()  # so that no statement is kept
    connects_with: str | None = None  # its signature names what it takes

    def __init__(self, said: object = None) -> None:
        # On the object: what is asked for each statement is found sooner there.
        self.exclusive_streams: bool = True  # it can do nothing beside a stream
        self.in_transaction: Callable[[Any], bool] = lambda _: True
        self.is_dead: Callable[[Any], bool] = lambda _: False
        # Is a statement in flight, whoever has sent it?
        self.is_busy: Callable[[Any], bool] = lambda _: False
        # Which may be `unbuffered_active`: has rows still to be read.
        self.last_result: Callable[[Any], Any] = lambda _: None
        # Is it not read-only (any more)?
        self.reports_writable: Callable[[Any], bool] = lambda _: False
        # What stops a statement, from elsewhere; its own requests to do so.
        self.cancel_sql: Callable[[Any], str | None] = lambda _: None
        self.cancellations: Callable[[Any], Collection[Task[None]]] = lambda _: ()
        self.socket: Callable[[Any], Any] = lambda _: None  # or what has its fileno()
        self.stop: Callable[[Any], object] = lambda _: None  # its thread, if any
        self.hurry = self.stop  # what waits for a lock, as its unit has a deadline
        # With what does it connect that no signature names?
        self.connects_also: Callable[[], Collection[str]] = tuple
        super().__init__(said)

    def aborts_transaction(self, _: Any, error: BaseException, /) -> bool:
        """Has the server rolled back more than the statement that failed?"""
        return any(each.code_of(error) in codes("aborting") for each in FACTS)

    async def is_pooled(self, _: Any, /) -> bool:  # by what answers in its own name
        return False

    def cut_off(self, raw: Any, /) -> None:
        """Have what waits for the server fail at once; this way, from any thread."""
        # Not close(): what waits for the socket would wait for ever.
        own = self.socket(raw)
        with suppress(Exception):  # also a driver's own: the server was first
            if own is not None and own.fileno() >= 0:
                with socket.socket(fileno=os.dup(own.fileno())) as same:
                    same.shutdown(socket.SHUT_RDWR)


class NoLock:
    """In place of SQLAlchemy's, which 2.0 has for asyncmy and asyncpg alone."""

    _locked = _waiters = False

    def __setattr__(self, *_: object) -> None:
        pass  # nobody takes it

    async def acquire(self) -> None:
        pass

    def release(self) -> None:
        pass


NO_LOCK = NoLock()


class Database(_Facts):
    """What a file of facts says about its database. SQL that is None does not exist."""

    EXTRAS: Mapping[str, str] = {}  # by the driver they install, the usual one first
    DIALECT: str | None = None  # the package it is in, if not in SQLAlchemy
    PACKAGES: frozenset[str]  # where drivers, sync ones too, define their errors
    ENGINE_OPTIONS: Mapping[str, object] = {}
    SINGLE_WRITER: bool = False  # only one transaction can write at a time
    READ_ONLY_STATEMENT: str  # makes a connection read-only, for as long as it lives
    BEGIN_READ_ONLY: str | None = None  # sent by asgi-uow where no driver does
    IS_READ_ONLY: str = "SELECT 0"  # is the server (now) a replica, without writes?
    LAG: str = "SELECT NULL AS Seconds_Behind_Master"
    POOLER: Literal["session"] | None = None  # assumed where none is named
    # Fails if it was aborted unseen, or has the driver know its state.
    QUESTION_BEFORE_COMMIT: str | None = None
    # Sent by asgi-uow, since the driver sends none: it is always in autocommit mode, so
    # what follows an error that ended the transaction is committed at once.
    BEGIN_WRITE: str | None = None
    # Sent likewise for another isolation level, where the driver's would stay.
    BEGIN_AT_LEVEL: str | None = None
    TRANSACTION_ID: str | None = None  # asked before COMMIT, for `was_committed`
    AWAIT_STANDBYS: str | None = None  # its COMMIT waits till they have what is kept
    CODES: Mapping[str, frozenset[int | str]]  # by `Meaning`; "57P" is a class
    REFUSED: int | str  # the code of a constraint that fails at COMMIT, for tests
    CONFLICT: int | str  # likewise: one of CODES["conflict"]
    SET_LOCAL_LASTS: bool = False  # longer than the transaction
    TRANSACTION_CONTROL: str | None = None  # regular expression, beside `_USUAL`
    IMPLICIT_COMMIT: str | None = None  # likewise: what commits what came before
    KEPT_AT_ONCE: tuple[str, ...] = ()  # verbs of those that keep something themselves
    DRIVERS: Mapping[str, Any]  # by SQLAlchemy's name; see `Driver`
    # Finds the code in a driver's error, or in SQLAlchemy's around it.
    code_of: Callable[[BaseException], int | str | None]

    # Has a `rowcount` of 1 if the row is new, and changes none that is there.
    insert_if_new: Callable[[Table, dict[str, Any]], Insert]

    # What a URL asks for, as the driver wants it; raises ValueError where it cannot.
    def url_query(self, query: Mapping[str, Any], _driver: str, /) -> dict[str, Any]:
        return dict(query)

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

    # Given an AUTOCOMMIT connection and what TRANSACTION_ID said: what became of it;
    # None if it cannot be told. Raises what is to be asked again.
    async def was_committed(self, *_: object) -> bool | None:
        return None


DATABASES: Mapping[str, Database] = {  # by SQLAlchemy's name of the dialect
    **dict.fromkeys(("mysql", "mariadb"), Database(mysql)),
    "postgresql": Database(postgresql),
    "cockroachdb": Database(cockroachdb),
    "sqlite": Database(sqlite),
}
OWN = "asgi_uow.own"  # the option of a statement that is not the user's
OWN_STATEMENT: Mapping[str, Any] = {OWN: True}
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


_COMMENTS = r"(?:\s|/\*.*?\*/|--[^\n]*\n|\#[^\n]*\n)*"


def _pattern(*statements: str | None) -> re.Pattern[str]:
    alternatives = "|".join(filter(None, statements))
    return re.compile(f"(?is){_COMMENTS}(?:{alternatives})")


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
# What the next statement finds on its connection: by an expression, or by no query.
_LEAVES = (
    r"\b(?:GET_LOCK|pg_(?:try_)?advisory_lock(?:_shared)?)\s*\(|@\w+\s*:=|\bINTO\s+@"
)
_QUERY = _pattern(r"(?:SELECT|WITH|VALUES)\b[^;]*;?\s*$")
_ASKED = re.compile(rf"(?i)\bset_config\b|\b\w*FOUND_ROWS\b|{_LEAVES}")
_SETTINGS = re.compile(r"(?i)\b(?:CALL|SET|RESET|DISCARD|PRAGMA|PREPARE|ATTACH|LOCK)\b")
_LOCAL = re.compile(rf"(?is)\bset_config\b|{_COMMENTS}SET\s+LOCAL\b")
_SETTING = re.compile(  # where SET is not that of UPDATE
    r"(?is)\bset_config\b(?!(?:(?!\bset_config\b).)*,\s*"  # unless it says: local
    r"(?:true|'t(?:rue)?'|\$\d+|%s|%\(\w+\)s)(?:::\w+)?\s*\))"
    rf"|{_LEAVES}|(?:^|;){_COMMENTS}(?:/\*M?!\d*\s*)?(?:RESET\b|PREPARE\b|LISTEN\b|"
    r"CREATE\s+(?:GLOBAL\s+|LOCAL\s+)?TEMP(?:ORARY)?\b|"
    r"SET\b(?!\s+(?:LOCAL|TRANSACTION|STATEMENT|CONSTRAINTS)\b)|"
    r"DISCARD\b|USE\b|PRAGMA\b[^;]*[=(])"
)


def controls(database: Database, statement: str) -> bool:
    """Tell whether what is transaction control somewhere is so in this database."""
    own = _pattern(_USUAL, database.TRANSACTION_CONTROL)
    return own.match(statement) is not None


@functools.lru_cache(maxsize=1024)
def kind_of(statement: str) -> Kind | None:
    """Tell what ends a transaction, commits it on some databases, or sets something."""
    if _CONTROL.match(statement):
        return "transaction_control"
    if _COMMITS.match(statement):
        return "implicit_commit"
    local: Kind | None = "local" if _LOCAL.search(statement) else None
    return "setting" if _SETTING.search(statement) else local


def without_literals(statement: str) -> str:
    """Show a statement to others: with placeholders alone, or no more than its verb."""
    if _PLAIN.fullmatch(statement):
        return _NUMBER.sub("?", statement)
    verb = _VERB.match(statement)
    return "a statement" if verb is None else " ".join(verb[1].upper().split())


@functools.lru_cache(maxsize=1024)
def changes_settings(statement: str) -> bool:
    no_query = _SETTINGS.search(statement) and not _QUERY.match(statement)
    return bool(no_query or _ASKED.search(statement))


def shown(url: URL) -> str:
    """Show a URL without its passwords."""
    hidden = {key: "hidden" for key in url.query if "pass" in key.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)
