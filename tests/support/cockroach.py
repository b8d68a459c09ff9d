"""CockroachDB's dialects at a server of PostgreSQL.

Those of sqlalchemy-cockroachdb where it is installed, as it can be with SQLAlchemy 2.0
alone; elsewhere stand-ins of the same name.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from sqlalchemy import make_url
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg

if TYPE_CHECKING:
    from sqlalchemy import URL


class StandInAsyncpg(PGDialect_asyncpg):
    name = "cockroachdb"
    supports_statement_cache = True


class StandInPsycopg(PGDialectAsync_psycopg):
    name = "cockroachdb"
    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[PGDialectAsync_psycopg]:  # noqa: ARG003
        return cls


PLACES = {
    "asyncpg": (__name__, "StandInAsyncpg"),
    "psycopg": (__name__, "StandInPsycopg"),
}
IS_INSTALLED = importlib.util.find_spec("sqlalchemy_cockroachdb") is not None

for _driver, _place in ({} if IS_INSTALLED else PLACES).items():
    registry.register(f"cockroachdb.{_driver}", *_place)


def cockroach(url: str) -> str:
    """Give the URL of a server of PostgreSQL as one of CockroachDB."""
    driver = make_url(url).get_driver_name()
    named = make_url(url).set(drivername=f"cockroachdb+{driver}")
    return named.render_as_string(hide_password=False)
