"""Engines from URLs and options, and from keys such as `DATABASE_POOL_SIZE`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import warnings
from contextlib import suppress
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import asbool

from asgi_uow._databases import known
from asgi_uow._databases.nodes import Nodes
from asgi_uow.errors import ConfigurationError, MissingDriverError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

DEFAULTS: Mapping[str, object] = {
    "pool_reset_on_return": None,  # a listener sends ROLLBACK only where it is needed
    # Errors go to logs and error trackers, parameters are people's data.
    "hide_parameters": True,
}
# SQLAlchemy takes these out of what the driver gets.
PREPARED = ("prepared_statement_cache_size", "prepared_statement_name_func")
SQLALCHEMYS = ("async_fallback", *PREPARED)
# An in-memory database is its connection: one, for one unit at a time, for good.
ONE_CONNECTION: Mapping[str, object] = {
    "poolclass": sa.AsyncAdaptedQueuePool,
    "pool_size": 1,
    "max_overflow": 0,
    "pool_recycle": -1,
}

# Of SQLAlchemy's `Session`; not those of engines or for the unit of work to set.
_SWITCHES = {"autoflush", "enable_baked_queries", "expire_on_commit", "twophase"}
OF_SESSIONS = _SWITCHES | {"info", "query_cls"}

BETWEEN_URLS = re.compile(r",[,\s]*(?=[\w+]+://|$)")
HTTP_NAME = re.compile(r"(?a:[\w!#$%&'*+.^`|~-])+")  # a "token" of RFC 9110
POOLERS: Mapping[Any, Any] = {it: it or None for it in ("transaction", "session", "")}


def _is_async(it: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, (it, type(it).__call__)))


def _observes(it: Any) -> bool:
    return callable(it) and not (_is_async(it) or isinstance(it, type))


def _is_above_0(it: Any) -> bool:
    return it is not True and it + 0.0 > 0


def _is_finite(n: Any, least: float = 0) -> bool:
    return isinstance(n, int | float) and n is not True and least <= n + 0.0 < math.inf


def _has(it: Any, method: str) -> bool:
    return callable(getattr(it, method)) and not isinstance(it, type)


def _takes(it: Any, number: int) -> bool:
    with suppress(ValueError):  # of C, without a signature
        inspect.signature(it, follow_wrapped=False).bind(*range(number))
    return callable(it)


# Names of options, what they must be, and a function that tells whether a value is.
_BOOLEAN = "True or False", (True, False).__contains__
_RULES: tuple[tuple[str, str, Callable[[Any], object]], ...] = (
    ("app", "the application, which comes first", callable),
    ("attempts", "a whole number above 0", lambda it: range(it) and it is not True),
    ("autoflush commit_flushes commit_on_exit", *_BOOLEAN),
    ("backoff keep max_backoff wait", "seconds", _is_finite),
    ("causal_reads", "CausalReads(secret), or None", lambda it: _has(it, "positions")),
    ("commit_timeout deadline hook_timeout", "seconds above 0, or None", _is_above_0),
    ("held_idle", "seconds above 0, or None", _is_above_0),
    ("commit_when", "a function of status and headers", lambda it: _takes(it, 2)),
    ("url", "a URL, or a list of URLs", len),
    ("when", "a function of the scope", lambda it: _takes(it, 1) and not _is_async(it)),
    ("scope", "a function of the scope, or None", _observes),
    ("echo echo_pool", "a boolean or 'debug'", (0, 1, None, "debug").__contains__),
    ("error_app", "an ASGI application, or None", callable),
    ("expire_on_commit required resolve_unknown twophase", *_BOOLEAN),
    ("cookie header", "a name in ASCII, without spaces", HTTP_NAME.fullmatch),
    ("idempotency", "Idempotency(...), or None", lambda it: _has(it, "wrap")),
    ("key", "a text of at least one character, or None", lambda it: len(it + "")),
    ("max_age", "seconds, at least 1", lambda it: _is_finite(it, 1)),
    ("max_body", "a number of bytes", lambda it: it >= 0 == it % 1),
    ("max_overflow", "a whole number from -1 on", lambda it: it + 1 >= 0 == it % 1),
    ("methods", "a list of methods", lambda it: "," not in "".join(it) != it),
    ("observers", "a list of functions", lambda it: len(it) == sum(map(_observes, it))),
    ("on_begin", "an async function of the session, or None", _is_async),
    ("pool_pre_ping", "True, False or None", (True, False).__contains__),
    ("pool_recycle", "a number, or -1 for no limit", lambda it: it >= -1),
    ("pool_size", "a whole number, not below 0", lambda it: it >= 0 == it % 1),
    ("pool_timeout", "seconds, or None", lambda s: s + 0.0 >= 0),
    ("pooler", "'transaction', 'session' or None", POOLERS.get),
    ("poolclass", "a subclass of Pool, or None", lambda it: issubclass(it, sa.Pool)),
    ("read_isolation", "'REPEATABLE READ' or None", {"REPEATABLE READ"}.__contains__),
    ("table", "the name of a table", lambda it: it.isprintable() and it.strip(".")),
    ("retry", "Retry(...), or None", lambda it: _has(it, "covers")),
    ("readers read_urls", "a list", lambda s: type(s) not in (str, sa.URL) and iter(s)),
)


def check(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for an option that cannot work; shows no text."""
    for names, kind, is_right in _RULES:
        for name in options.keys() & names.split():
            value = options[name]
            with suppress(AttributeError, OverflowError, TypeError):
                if (value is None and kind.endswith("None")) or is_right(value):
                    continue
            shown = value if isinstance(value, int | float) else type(value).__name__
            message = f"{name} must be {kind}; it is {shown}."
            raise ConfigurationError(message)


def _boolean(value: object) -> bool:
    return asbool(str(value).strip() or "false")


def _echo(value: object) -> bool | str:
    return "debug" if str(value).strip().lower() == "debug" else _boolean(value)


def _number(kind: type[float]) -> Callable[[object], float]:
    return lambda value: kind(str(value))  # not of True; no integer of 1.5


def _urls(value: Any) -> tuple[str | sa.URL, ...]:
    if isinstance(value, sa.URL):
        return (value,)
    # A password may have a comma, and a URL several hosts.
    parts = BETWEEN_URLS.split(value) if isinstance(value, str) else value
    urls = (it if isinstance(it, sa.URL) else str(it).strip() for it in parts)
    return tuple(filter(None, urls))


def _addresses(value: object) -> str | sa.URL | Sequence[str | sa.URL]:
    # An object, as of settings, may be one URL.
    urls = _urls(value if type(value) in (list, tuple, sa.URL) else str(value))
    if not urls:
        raise ValueError(value)
    return urls[0] if len(urls) == 1 else urls


def _pool_class(value: object) -> type[sa.Pool]:
    found = getattr(sa.pool, value, None) if isinstance(value, str) else value
    if isinstance(found, type) and issubclass(found, sa.Pool):
        return found
    raise ValueError(value)


_KEYS: Mapping[str, tuple[str, Callable[[object], object], str]] = {
    "URL": ("url", _addresses, "a URL, or several of one database"),
    "READ_URLS": ("read_urls", _urls, "a list of URLs, or URLs with commas between"),
    "ECHO": ("echo", _echo, "a boolean or 'debug'"),
    "ECHO_POOL": ("echo_pool", _echo, "a boolean or 'debug'"),
    "POOL_SIZE": ("pool_size", _number(int), "an integer"),
    "MAX_OVERFLOW": ("max_overflow", _number(int), "an integer"),
    "POOL_PRE_PING": ("pool_pre_ping", _boolean, "a boolean"),
    "POOL_RECYCLE": ("pool_recycle", _number(int), "a whole number of seconds"),
    "POOL_TIMEOUT": ("pool_timeout", _number(float), "a number of seconds"),
    "POOLER": ("pooler", POOLERS.__getitem__, "'transaction' or 'session'"),
    "POOL_CLASS": ("poolclass", _pool_class, "a class name of sqlalchemy.pool"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What the keys say; the URLs are kept out of the repr."""

    url: str | sa.URL | Sequence[str | sa.URL] = dataclasses.field(repr=False)
    read_urls: tuple[str | sa.URL, ...] = dataclasses.field(repr=False)
    engine_options: Mapping[str, Any]


def read(mapping: Mapping[str, object], prefix: str) -> Config:
    """Cast the keys of `mapping` that start with `prefix`; None counts as absent."""
    # Without the prefix: DATABASE_USER is nearer to DATABASE_URL than USER to URL.
    for name in (key[len(prefix) :] for key in mapping if key.startswith(prefix)):
        near = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.8)
        if near and name not in _KEYS:
            message = f"{prefix}{name} is not a configuration key of asgi-uow; "
            message += f"did you mean {prefix}{near[0]}?"
            warnings.warn(message, stacklevel=3)
    if not mapping.get(f"{prefix}URL"):
        message = f"{prefix}URL is missing: set it to a URL such as sqlite:///app.db."
        raise ConfigurationError(message)
    found: dict[str, Any] = {}
    for name, (option, cast, kind) in _KEYS.items():
        key = prefix + name
        if (value := mapping.get(key)) is None:
            continue
        try:
            found[option] = cast(value)
        except (KeyError, TypeError, ValueError):
            message = f"{key} must be {kind}; what it is set to cannot be read as that."
            raise ConfigurationError(message) from None
    return Config(found.pop("url"), found.pop("read_urls", ()), found)


def create_writer(
    urls: str | sa.URL | Sequence[str | sa.URL],
    options: Mapping[str, Any],
    *,
    asks_later: object,
) -> AsyncEngine:
    """Make the engine of a writer, which may have several addresses."""
    if isinstance(urls, str | sa.URL):
        return create_engine(urls, options)
    check({"url": urls})
    first, *others = [create_engine(each, options) for each in urls]
    if others:
        engines = [each.sync_engine for each in (first, *others)]
        nodes = Nodes(engines, known.DATABASES.get(first.dialect.name))
        if asks_later or "async_creator" in options:
            message = "Several URLs: not with resolve_unknown or twophase, which might "
            message += "ask another server, nor with async_creator: that has its own."
            raise ConfigurationError(message)
        first.sync_engine.nodes = nodes  # type: ignore[attr-defined]
    return first


def create_engine(url: str | sa.URL, options: Mapping[str, Any]) -> AsyncEngine:
    """Make an engine with defaults that suit the database; `options` win over them."""
    parsed, database = _read_url(url)
    defaults = {**DEFAULTS, **database.ENGINE_OPTIONS}
    if options.get("poolclass") is None:
        defaults["pool_timeout"] = 10.0
    forced = ONE_CONNECTION if known.is_memory(parsed) else {}
    check(options)
    try:
        # Before SQLAlchemy looks for the driver: to install it would not help.
        if not parsed.get_dialect().get_async_dialect_cls(parsed).is_async:
            message = f"{parsed.drivername!r} is not an async driver: leave the driver "
            message += "out to get the usual one, or name an async one."
            raise ConfigurationError(message)  # noqa: TRY301  # goes on as it is
        engine = create_async_engine(parsed, **{**defaults, **options, **forced})
        _check_arguments(engine, options.get("connect_args") or {})
    except ModuleNotFoundError as error:
        driver = parsed.get_driver_name()
        raise MissingDriverError(driver, database.EXTRAS.get(driver)) from error
    except sa_exc.NoSuchModuleError as error:
        message = f"SQLAlchemy knows no database {parsed.drivername!r}."
        if database.DIALECT is not None:
            message += f" Install {database.DIALECT}."
        raise ConfigurationError(message) from error
    except ConfigurationError:
        raise
    except (TypeError, ValueError, sa_exc.ArgumentError) as error:
        message = f"The engine cannot be made of its URL and options: {error}"
        raise ConfigurationError(message) from error
    return engine


def _check_arguments(engine: AsyncEngine, given: Mapping[str, Any]) -> None:
    """Refuse at once what the driver would refuse when it connects."""
    dialect, driver = engine.dialect, known.driver_of(engine.dialect)
    if driver.connects_with is not None and "async_creator_fn" not in given:
        both = resolve_name(driver.connects_with), dialect.connect  # CockroachDB's
        taken = {name for each in both for name in inspect.signature(each).parameters}
        asked = {*dialect.create_connect_args(engine.url)[1], *dict(given)}
        for key in asked.difference(taken, SQLALCHEMYS, driver.connects_also()):
            message = f"The driver {dialect.driver} takes no {key!r}: leave it out."
            raise ConfigurationError(message)


def _read_url(url: str | sa.URL) -> tuple[sa.URL, known.Database]:
    try:
        parsed = sa.make_url(url)
    except (sa_exc.ArgumentError, ValueError):
        # Not chained: SQLAlchemy 2.0 quotes the string, password and all.
        message = "The database URL cannot be read; it should look like "
        message += "postgresql://user:password@host/name or sqlite:///app.db. A "
        message += "password with special characters has to be percent-encoded."
        raise ConfigurationError(message) from None
    name = known.ALIASES.get(parsed.drivername, parsed.drivername)
    database = known.DATABASES.get(name.partition("+")[0], known.Database())
    if "+" not in name and database.EXTRAS:
        name = f"{name}+{next(iter(database.EXTRAS))}"
    try:
        query = database.url_query(parsed.query, name.partition("+")[2])
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return parsed.set(drivername=name, query=query), database
