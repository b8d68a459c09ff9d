"""Options of a `Database`: whose they are, and which ones cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_uow import Database
from asgi_uow.errors import ConfigurationError
from tests.support.databases import on

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Backend

URL = "sqlite+aiosqlite:///shop.db"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pool_size", "x"),
        ("pool_size", "5"),
        ("pool_size", None),
        ("pool_size", -5),
        ("pool_size", 2.5),
        ("max_overflow", "x"),
        ("max_overflow", None),
        ("max_overflow", -2),
        ("pool_timeout", "x"),
        ("pool_timeout", -1),
        ("pool_recycle", "1h"),
        ("pool_recycle", None),
        ("pool_pre_ping", "no"),
        ("echo", "yes"),
        ("echo_pool", "yes"),
        ("poolclass", "NullPool"),
        ("poolclass", dict),
        ("read_urls", URL),
        ("autoflush", "no"),
        ("expire_on_commit", "no"),
        ("commit_flushes", "no"),
        ("commit_on_exit", "no"),
        ("resolve_unknown", "no"),
        ("twophase", "no"),
        ("read_isolation", "SERIALIZABLE"),
    ],
)
def test_an_option_that_cannot_work(option: str, value: Any) -> None:
    """It is refused when the database is made, and the error says what it may be."""
    with pytest.raises(ConfigurationError, match=f"^{option} must be ") as caught:
        Database.from_url(URL, **{option: value})
    assert URL not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 0, "max_overflow": -1, "pool_timeout": None, "pool_recycle": -1},
        {"pool_timeout": 0.5, "pool_recycle": 1800, "pool_pre_ping": True},
        {"echo": False, "echo_pool": None, "hide_parameters": False},
        {"poolclass": NullPool},
    ],
)
def test_an_option_that_works(options: dict[str, Any]) -> None:
    """What SQLAlchemy takes is passed on."""
    assert Database.from_url(URL, **options).engine.dialect.name == "sqlite"


def test_a_value_that_is_refused_after_a_cast() -> None:
    """So is one that a key of the configuration gives."""
    with pytest.raises(ConfigurationError, match=r"^pool_size must be a whole number"):
        Database.from_config({"DATABASE_URL": URL, "DATABASE_POOL_SIZE": "-5"})


@on("aiosqlite")
async def test_session_options_of_from_url(backend: Backend) -> None:
    """`from_url` passes options of sessions to the sessions, of engines to engines."""
    info = {"from": "from_url"}
    db = Database.from_url(
        backend.url, autoflush=False, info=info, pool_size=3, execution_options={"a": 1}
    )
    async with db:
        assert not db.write.sync_session.autoflush
        assert "from_url" == db.write.info["from"]
        assert 1 == db.engine.sync_engine.get_execution_options()["a"]
    assert "Pool size: 3" in db.engine.pool.status()
    await db.dispose()


@pytest.mark.parametrize("option", ["bind", "sync_session_class", "close_resets_only"])
def test_options_that_belong_to_the_unit(option: str) -> None:
    """They are refused, wherever they are given."""
    options: Any = {option: None}
    with pytest.raises(ConfigurationError, match=option):
        Database(create_async_engine(URL), **options)
    with pytest.raises(ConfigurationError, match=option):
        Database.from_url(URL, **options)


@pytest.mark.parametrize("option", ["pool_size", "echo", "poolsize"])
def test_engine_options_beside_an_engine(option: str) -> None:
    """`Database(engine)` takes options of sessions; the others belong to the engine."""
    options: Any = {option: 5}
    with pytest.raises(ConfigurationError, match=f"'{option}' is no option .*from_url"):
        Database(create_async_engine(URL), **options)


def test_one_reader_instead_of_a_list() -> None:
    """A reader that is not in a list is named as the mistake it is."""
    engine: Any = create_async_engine(URL)
    with pytest.raises(ConfigurationError, match=r"^readers must be a list"):
        Database(engine, readers=engine)


@pytest.mark.parametrize("form", ["sqlite:///{}", "sqlite:///file:{}?uri=true"])
async def test_a_folder_that_is_missing(tmp_path: Path, form: str) -> None:
    """The error names the folder; once somebody has made it, the database works."""
    folder = tmp_path / "not there"
    db = Database.from_url(form.format(folder / "shop.db"))
    with pytest.raises(
        sa_exc.OperationalError, match="is there such a folder"
    ) as caught:
        async with db:
            await db.write.execute("CREATE TABLE t (id INTEGER)")
    assert f": {folder / 'shop.db'};" in str(caught.value)
    folder.mkdir()
    async with db:
        await db.write.execute("CREATE TABLE t (id INTEGER)")
    await db.dispose()
