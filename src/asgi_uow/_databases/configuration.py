"""Configuration keys such as `DATABASE_POOL_SIZE`, cast and checked."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy.pool
from sqlalchemy import URL

from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
FALSE = frozenset({"0", "false", "f", "no", "n", "off", ""})


def _boolean(value: object) -> bool:
    word = str(value).strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise ValueError(word)


def _echo(value: object) -> bool | str:
    return "debug" if str(value).strip().lower() == "debug" else _boolean(value)


def _integer(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    return int(str(value).strip())


def _seconds(value: object) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(str(value).strip())


def _url(value: object) -> str:
    if isinstance(value, URL):
        return value.render_as_string(hide_password=False)
    return str(value).strip()


def _urls(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise TypeError(parts)
    return tuple(part for part in map(_url, parts) if part)


def _pool_class(value: object) -> type[sqlalchemy.pool.Pool]:
    found = getattr(sqlalchemy.pool, value, None) if isinstance(value, str) else value
    if isinstance(found, type) and issubclass(found, sqlalchemy.pool.Pool):
        return found
    raise ValueError(value)


_ENGINE_OPTIONS: Mapping[str, tuple[str, Callable[[object], object], str]] = (
    MappingProxyType(
        {
            "ECHO": ("echo", _echo, "a boolean or 'debug'"),
            "ECHO_POOL": ("echo_pool", _echo, "a boolean or 'debug'"),
            "POOL_SIZE": ("pool_size", _integer, "an integer"),
            "MAX_OVERFLOW": ("max_overflow", _integer, "an integer"),
            "POOL_PRE_PING": ("pool_pre_ping", _boolean, "a boolean"),
            "POOL_RECYCLE": ("pool_recycle", _integer, "a whole number of seconds"),
            "POOL_TIMEOUT": ("pool_timeout", _seconds, "a number of seconds"),
            "POOL_CLASS": ("poolclass", _pool_class, "a class name of sqlalchemy.pool"),
        },
    )
)
_KEYS = ("URL", "READ_URLS", *_ENGINE_OPTIONS)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the keys say; the URLs are kept out of the repr."""

    url: str = dataclasses.field(repr=False)
    read_urls: tuple[str, ...] = dataclasses.field(repr=False)
    engine_options: Mapping[str, Any]


def read(mapping: Mapping[str, object], prefix: str) -> Config:
    """Cast the keys of `mapping` that start with `prefix`; None counts as absent.

    Raises `ConfigurationError` naming key and expected kind, never the value.
    Warns of a key that looks like a misspelt one.
    """
    for key in mapping:
        if key.startswith(prefix):
            _warn_if_misspelt(key, prefix)
    url = mapping.get(f"{prefix}URL")
    if not url:
        message = f"{prefix}URL is missing: set it to a URL such as sqlite:///app.db."
        raise ConfigurationError(message)
    options = {
        option: _cast(mapping, prefix + key, cast, kind)
        for key, (option, cast, kind) in _ENGINE_OPTIONS.items()
        if mapping.get(prefix + key) is not None
    }
    read_urls: tuple[str, ...] = ()
    if mapping.get(f"{prefix}READ_URLS") is not None:
        kind = "a list of URLs, or URLs with commas between"
        read_urls = _cast(mapping, f"{prefix}READ_URLS", _urls, kind)
    return Config(_url(url), read_urls, options)


def _cast(
    mapping: Mapping[str, object],
    key: str,
    cast: Callable[[object], T],
    kind: str,
) -> T:
    try:
        return cast(mapping[key])
    except (TypeError, ValueError):
        message = f"{key} must be {kind}; what it is set to cannot be read as that."
        raise ConfigurationError(message) from None


def _warn_if_misspelt(key: str, prefix: str) -> None:
    # Without the prefix: DATABASE_USER is nearer to DATABASE_URL than USER to URL.
    name = key.removeprefix(prefix)
    near = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.8)
    if near and name not in _KEYS:
        warnings.warn(
            f"{key} is not a configuration key of asgi-uow; "
            f"did you mean {prefix}{near[0]}?",
            stacklevel=4,
        )
