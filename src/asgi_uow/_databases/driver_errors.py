"""What exceptions mean, and what may be told of them outside this process.

Drivers put people's data into messages: `Duplicate entry 'ann@example.com' for key`.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from sqlalchemy import exc as sa_exc

from asgi_uow._databases import known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where the errors of drivers, and SQLAlchemy's wrappers of them, are defined.
PACKAGES = {"sqlalchemy.dialects"}.union(*(each.PACKAGES for each in known.FACTS))
USERS = ("sqlalchemy.dialects", "sqlalchemy.engine", "sqlalchemy.pool")  # of drivers
# What SQLAlchemy raises with the message of a driver, or with parameters, inside.
WRAPPERS = (sa_exc.StatementError, sa_exc.PendingRollbackError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give `error`, what it was raised from, and so on; each once."""
    seen: list[BaseException] = []
    while error is not None and not any(error is each for each in seen):
        seen.append(error)
        yield error
        error = error.__cause__


def code_of(error: BaseException | None) -> str | int | None:
    """Find the driver's code: MySQL errno, SQLSTATE, or SQLite's error name."""
    # MySQL's number comes first: the SQLSTATE in asyncmy's errors says less.
    codes = (each.code_of(cause) for cause in causes(error) for each in known.FACTS)
    return next((code for code in codes if code is not None), None)


def means(error: BaseException | None, meaning: known.Meaning) -> bool:
    code = code_of(error)
    # "57P" stands for 57P01 and all others that begin so.
    classes = {code[:2], code[:3]} if isinstance(code, str) else set()
    return not known.codes(meaning).isdisjoint({code, *classes})


def is_lost(error: BaseException) -> bool:
    if isinstance(error, sa_exc.DBAPIError):
        return error.connection_invalidated
    # SQLAlchemy does not wrap every error of a socket; but a handler has files, too.
    return isinstance(error, OSError) and _came_through(error, *USERS)


def _came_through(error: BaseException, *modules: str) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    names = (str(frame.f_globals.get("__name__")) for frame, _ in frames)
    return any(each.startswith(modules) for each in names)


def is_in_doubt(error: BaseException) -> bool:
    """Tell whether a COMMIT that ended with `error` may have been carried out.

    Only what the server has sent disproves it; a driver has errors of its own, too.
    """
    if not isinstance(error, sa_exc.DBAPIError) or code_of(error) is None:
        return True
    was_lost = is_lost(error) and not means(error, "demoted")  # see `on_error`
    return was_lost or means(error, "in_doubt")


def is_unavailable(error: BaseException) -> bool:
    """Tell whether the database could not be reached; trying again may help."""
    is_timeout = isinstance(error, sa_exc.TimeoutError)
    return is_timeout or is_lost(error) or means(error, "unavailable")


def is_outage(error: BaseException, outages: list[Exception]) -> bool:
    """Tell whether `error` is, or follows from, one of the `outages`."""
    found = [error] if outages else []
    for each in found:  # which grows
        members = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        for cause in (each.__cause__ or each.__context__, *members):
            # A task group's only error, raised again by Starlette, has the group as
            # its context, and is in the group.
            if cause is not None and not any(cause is one for one in found):
                found.append(cause)
    return any(each is outage for each in found for outage in outages)


def to_retry(
    first: BaseException | None, outages: list[Exception]
) -> BaseException | None:
    """Give the error, which came first, if the same work may succeed now."""
    if first is None:
        return None
    if isinstance(first, TimeoutError | sa_exc.TimeoutError):
        return first if _came_through(first, "sqlalchemy.engine.create") else None
    # Ours, in place of a COMMIT on a connection that is known to be dead.
    was_dead = isinstance(first, ConnectionError) and first in outages
    is_away = was_dead or is_unavailable(first) or means(first, "demoted")
    return first if is_away or means(first, "conflict") else None


def message_of(error: BaseException) -> str:
    with suppress(Exception):  # whatever its class does
        return str(error)
    return "message cannot be read"


class Redactor:
    """Takes the messages of database errors out of texts about one exception.

    Of such an error remain its class, the driver's code and the statement without
    literals; of what stands behind it only the class, since it is the driver's.
    Other exceptions keep their text, but for such a message quoted in it.
    """

    def __init__(
        self, error: BaseException, text_of: Callable[[BaseException], str] = message_of
    ) -> None:
        self._exact: dict[str, str] = {}
        self._quoted: dict[str, str] = {}
        self._found: dict[int, tuple[BaseException, bool]] = {}
        self._look(error, database=False)
        for each, database in self._found.values():
            if database:
                left = _without_data(each)
                texts = [text_of(each), message_of(each)]
                self._exact |= dict.fromkeys(texts, left)
                if is_of_database(each):
                    texts.append(str(getattr(each, "statement", None) or ""))
                    self._quoted |= dict.fromkeys(_quotations(each, *texts), left)
        self._longest_first = sorted(filter(None, self._quoted), key=len, reverse=True)

    def _look(self, error: BaseException, *, database: bool) -> None:
        database = database or is_of_database(error)
        if self._found.get(id(error), (error, None))[1] in {True, database}:
            return
        self._found[id(error)] = (error, database)
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        for each in (error.__cause__, error.__context__, *members):
            if each is not None:
                self._look(each, database=database)

    def __call__(self, text: str) -> str:
        if text in self._exact:
            return self._exact[text]
        for message in self._longest_first:
            text = text.replace(message, self._quoted[message])
        return text

    def stacktrace(self) -> str:
        """Show where each exception came from, the one looked at last."""
        lines: list[str] = []
        for each, database in reversed(self._found.values()):
            lines += traceback.format_tb(each.__traceback__)
            notes = [] if database else getattr(each, "__notes__", [])
            texts = [self(text) for text in (message_of(each), *notes)]
            lines.append(f"{name_of(type(each))}: " + "\n".join(texts) + "\n")
        return "".join(lines)


def name_of(kind: type[BaseException]) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def is_of_database(error: BaseException) -> bool:
    roots = tuple(f"{package}." for package in PACKAGES)
    names = (f"{each.__module__}." for each in type(error).__mro__)
    return isinstance(error, WRAPPERS) or any(each.startswith(roots) for each in names)


def _quotations(error: BaseException, *texts: str) -> Iterator[str]:
    """Give what others may quote of it: the text, its parts, and `repr` of those."""
    parts = (part for part in error.args if isinstance(part, str))
    for text in (*texts, *parts):
        escaped = repr(f'"{text}')[2:-1]  # in single quotes for the sake of that one
        yield from (text, escaped, escaped.replace(r"\'", "'"))


def _without_data(error: BaseException) -> str:
    code = code_of(error)
    told = "message left out" if code is None else f"driver code {code}"
    if isinstance(error, sa_exc.StatementError) and error.statement is not None:
        return f"{told}\n[SQL: {known.without_literals(error.statement)}]"
    return told
