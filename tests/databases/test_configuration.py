"""What `Database.from_config` reads, casts and refuses."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from starlette.datastructures import Secret

from asgi_uow import Database
from asgi_uow.errors import ConfigurationError
from tests.support.private import read_configuration as read

if TYPE_CHECKING:
    from tests.servers import SQLiteBackend

URL = "postgresql://app:s3cret@db.example/shop"
TRUE = ["1", "true", "T", "yes", " Y ", "On", True, 1]
FALSE = ["0", "false", "F", "no", "n", "OFF", "", False, 0]


def options(**keys: object) -> dict[str, object]:
    """The engine options that `keys` give."""
    return dict(read({"URL": URL, **keys}, "").engine_options)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("POOL_PRE_PING", value, {"pool_pre_ping": True}) for value in TRUE),
        *(("POOL_PRE_PING", value, {"pool_pre_ping": False}) for value in FALSE),
        ("ECHO", "on", {"echo": True}),
        ("ECHO", "0", {"echo": False}),
        ("ECHO", " Debug", {"echo": "debug"}),
        ("ECHO_POOL", "debug", {"echo_pool": "debug"}),
        ("ECHO_POOL", "no", {"echo_pool": False}),
        ("POOL_SIZE", "20", {"pool_size": 20}),
        ("POOL_SIZE", 20, {"pool_size": 20}),
        ("MAX_OVERFLOW", " -1 ", {"max_overflow": -1}),
        ("POOL_RECYCLE", "600", {"pool_recycle": 600}),
        ("POOL_TIMEOUT", "2.5", {"pool_timeout": 2.5}),
        ("POOL_TIMEOUT", 30, {"pool_timeout": 30.0}),
        ("POOL_CLASS", "NullPool", {"poolclass": NullPool}),
        ("POOLER", "session", {"pooler": "session"}),
        ("POOLER", "", {"pooler": None}),
        ("POOL_CLASS", AsyncAdaptedQueuePool, {"poolclass": AsyncAdaptedQueuePool}),
    ],
)
def test_casts(key: str, value: object, expected: dict[str, object]) -> None:
    """Strings from the environment become what the engine takes."""
    assert expected == options(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("ECHO", "s3cret", "a boolean or 'debug'"),
        ("ECHO_POOL", "2", "a boolean or 'debug'"),
        ("POOL_SIZE", "s3cret", "an integer"),
        ("POOL_SIZE", True, "an integer"),
        ("POOL_SIZE", "", "an integer"),
        ("MAX_OVERFLOW", "1.5", "an integer"),
        ("POOL_PRE_PING", "s3cret", "a boolean"),
        ("POOL_RECYCLE", "1h", "a whole number of seconds"),
        ("POOL_TIMEOUT", "s3cret", "a number of seconds"),
        ("POOL_TIMEOUT", True, "a number of seconds"),
        ("POOL_CLASS", "S3cretPool", "a class name of sqlalchemy.pool"),
        ("POOL_CLASS", "event", "a class name of sqlalchemy.pool"),
        ("POOL_CLASS", dict, "a class name of sqlalchemy.pool"),
        ("POOLER", "statement", "'transaction' or 'session'"),
        ("POOL_CLASS", 3, "a class name of sqlalchemy.pool"),
        ("READ_URLS", 3, "a list of URLs, or URLs with commas between"),
    ],
)
def test_a_value_that_does_not_cast(key: str, value: object, kind: str) -> None:
    """The error names key and kind, never the value."""
    with pytest.raises(ConfigurationError) as caught:
        Database.from_config({"DATABASE_URL": URL, f"DATABASE_{key}": value})
    assert str(caught.value) == (
        f"DATABASE_{key} must be {kind}; what it is set to cannot be read as that."
    )
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("url", [None, ""])
def test_without_a_url(url: str | None) -> None:
    """A missing URL is an error that names its key."""
    with pytest.raises(ConfigurationError, match=r"^SHOP_URL is missing: set it to"):
        Database.from_config({"SHOP_URL": url}, prefix="SHOP_")


def test_none_is_absent() -> None:
    """A key that is None is as good as a key that is not there."""
    config = read({"DATABASE_URL": URL, "DATABASE_POOL_SIZE": None}, "DATABASE_")
    assert {} == config.engine_options
    assert () == config.read_urls
    assert () == read({"URL": URL, "READ_URLS": None}, "").read_urls


@pytest.mark.parametrize(
    "value",
    [
        "sqlite:///a , sqlite:///b,",
        ["sqlite:///a", "sqlite:///b"],
        ("sqlite:///a", "sqlite:///b"),
    ],
)
def test_read_urls(value: object) -> None:
    """Replicas are a list, or one string with commas."""
    assert ("sqlite:///a", "sqlite:///b") == read(
        {"URL": URL, "READ_URLS": value}, ""
    ).read_urls


def test_several_addresses() -> None:
    """The writer's may be a list too; a comma in a password is part of it."""
    nodes = ["mysql://ann:a,b@one/shop", "mysql://ann:a,b@two/shop"]
    assert (*nodes,) == read({"URL": ", ".join(nodes)}, "").url
    assert (*nodes,) == read({"URL": nodes}, "").url
    assert nodes[0] == read({"URL": nodes[0]}, "").url
    assert nodes[0] == read({"URL": f"{nodes[0]} ,, "}, "").url
    config = read({"URL": URL, "READ_URLS": make_url(URL)}, "")
    assert (make_url(URL),) == config.read_urls
    with pytest.raises(ConfigurationError, match=r"^URL must be a URL"):
        read({"URL": ","}, "")
    db = Database.from_config({"DATABASE_URL": ",".join(nodes)})
    assert db.name.startswith("mysql+asyncmy://ann:***@one/shop?")


def test_an_object_of_settings() -> None:
    """It need not be a string to be one URL."""
    assert URL == read({"URL": Secret(URL)}, "").url


def test_a_url_object() -> None:
    """A URL that is an object keeps its password."""
    config = read({"URL": make_url(URL), "READ_URLS": [make_url(URL)]}, "")
    assert make_url(URL) == config.url
    assert (make_url(URL),) == config.read_urls


def test_a_misspelt_key() -> None:
    """A key that looks misspelt is warned of at the caller's line."""
    message = (
        "DATABASE_POOLSIZE is not a configuration key of asgi-uow; "
        r"did you mean DATABASE_POOL_SIZE\?"
    )
    with pytest.warns(UserWarning, match=f"^{message}$") as caught:
        Database.from_config({"DATABASE_URL": URL, "DATABASE_POOLSIZE": "5"})
    assert [__file__] == [warning.filename for warning in caught]


def test_keys_of_others() -> None:
    """Other programs' DATABASE_* variables, and other prefixes, are left alone."""
    mapping = {
        "DATABASE_URL": URL,
        "DATABASE_USER": "app",
        "DATABASE_PASSWORD": "s3cret",
        "DATABASE_HOST": "db.example",
        "DATABASE_NAME": "shop",
        "DATABASE_MIGRATIONS": "1",
        "POOLSIZE": "5",
        "CACHE_URLS": "x",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {} == read(mapping, "DATABASE_").engine_options


def test_no_password_in_the_repr() -> None:
    """What was read shows its options, not its URLs."""
    shown = repr(read({"URL": URL, "READ_URLS": URL, "POOL_SIZE": "5"}, ""))
    assert shown == "Config(engine_options={'pool_size': 5})"


async def test_a_database_from_the_environment(
    sqlite: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.environ` is a mapping as good as any; the engine gets the options."""
    import os

    monkeypatch.setenv("DATABASE_URL", sqlite.url)
    monkeypatch.setenv("DATABASE_READ_URLS", sqlite.url)
    monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
    monkeypatch.setenv("DATABASE_ECHO", "off")
    db = Database.from_config(os.environ)
    async with db:
        await db.write.execute("CREATE TABLE t (id INTEGER)")
        assert [] == (await db.read.execute("SELECT id FROM t")).all()
    assert "t" == await sqlite.scalar("SELECT name FROM sqlite_master")
    assert 1 == len(db.readers)
    pools = [engine.sync_engine.pool for engine in (db.engine, *db.readers)]
    assert [3, 3] == [
        pool.size() for pool in pools if isinstance(pool, AsyncAdaptedQueuePool)
    ]
    await db.dispose()
