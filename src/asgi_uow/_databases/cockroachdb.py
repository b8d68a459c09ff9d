"""Facts of CockroachDB: no replicas, and the protocol and drivers of PostgreSQL."""

from __future__ import annotations

from asgi_uow._databases import postgresql

DIALECT = "sqlalchemy-cockroachdb"
EXTRAS, PACKAGES = postgresql.EXTRAS, postgresql.PACKAGES
READ_ONLY_STATEMENT = postgresql.READ_ONLY_STATEMENT
QUESTION_BEFORE_COMMIT = postgresql.QUESTION_BEFORE_COMMIT
POOLER = "session"  # no look for one: pg_backend_pid() is no process, and may differ
# https://www.cockroachlabs.com/docs/stable/transaction-retry-error-reference
CODES, DRIVERS = postgresql.CODES, postgresql.DRIVERS
REFUSED, CONFLICT = postgresql.REFUSED, postgresql.CONFLICT
code_of, url_query = postgresql.code_of, postgresql.url_query
insert_if_new = postgresql.insert_if_new


def set_up(_: object, *, read_only: bool) -> frozenset[int | str]:  # noqa: ARG001
    """After a restart error no savepoint can be rolled back to."""
    return frozenset({"40001"})
