"""The tables most tests use, and how to make a COMMIT fail on each database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_uow import current_session
from tests.servers.backend import MariaDBBackend

if TYPE_CHECKING:
    from asgi_uow import Database
    from tests.servers.backend import Backend


class Base(DeclarativeBase):
    """Mapped to the shop's table."""


class Item(Base):
    """An item."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


COUNT = "SELECT count(*) FROM items"
SELECT = "SELECT id FROM items ORDER BY id"
TABLES = (
    "CREATE TABLE parents (id INTEGER PRIMARY KEY)",
    (
        "CREATE TABLE items (id INTEGER PRIMARY KEY, parent INTEGER"
        " REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)"
    ),
)
MARIADB_TABLES = ("CREATE TABLE items (id INTEGER PRIMARY KEY, parent INTEGER)",)


async def create(backend: Backend) -> None:
    """Make an empty table `items`."""
    mariadb = isinstance(backend, MariaDBBackend)
    await backend.execute(*(MARIADB_TABLES if mariadb else TABLES))


async def insert(number: int, db: Database | None = None) -> None:
    """Insert an item on the current write session."""
    await current_session(db).execute("INSERT INTO items (id) VALUES (:id)", id=number)


async def insert_orphan(number: int = 9) -> None:
    """Insert an item that COMMIT refuses, on SQLite and PostgreSQL."""
    await current_session().execute("INSERT INTO items VALUES (:id, 404)", id=number)


async def items(backend: Backend) -> list[object]:
    """Look through a fresh connection."""
    return [row[0] for row in await backend.fetch(SELECT)]


async def insert_then_break_commit(backend: Backend, number: int) -> None:
    """Insert an item so that COMMIT itself fails, not the statement.

    A deferred foreign key where there is one; MariaDB has none, there the
    connection is killed.
    """
    if isinstance(backend, MariaDBBackend):
        await insert(number)
        await backend.kill_connections()
    else:
        await insert_orphan(number)
