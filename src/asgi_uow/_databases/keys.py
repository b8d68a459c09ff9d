"""Idempotency keys: the rows that say what was done, kept with the work itself."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import sqlalchemy as sa

from asgi_uow._databases import known
from asgi_uow._databases.driver_errors import is_of_database

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.orm import Session

TABLE = "idempotency_keys"
PAUSE = 0.1  # seconds between two looks for a row
TRIES = 4  # at least, as one may meet a server that does not answer
HASH = 64  # characters of a SHA-256
BLOB = 2**32 - 1  # bytes; what MySQL would make of less is too small


def idempotency_table(metadata: sa.MetaData, name: str = TABLE) -> sa.Table:
    """Give the table of the keys, for `metadata.create_all` and your migrations.

    It holds hashes of keys and requests, and the responses that are sent again.
    """
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.CHAR(HASH), primary_key=True),
        sa.Column("request", sa.CHAR(HASH), nullable=False),
        sa.Column("run", sa.CHAR(HASH), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False, index=True),
        sa.Column("status", sa.SmallInteger),
        sa.Column("fingerprint", sa.String(2 * HASH)),
        sa.Column("response", sa.LargeBinary(BLOB)),
    )


@functools.cache
def table_of(name: str) -> sa.Table:
    """Give the table for statements; "schema.name" is in that schema."""
    schema, _, own = name.rpartition(".")
    return idempotency_table(sa.MetaData(schema=schema or None), own)


def digest(*parts: bytes) -> str:
    """Hash parts so that no two ways to divide the same bytes are alike."""
    lengths = b",".join(str(len(part)).encode() for part in parts)
    return hashlib.sha256(b"\n".join((lengths, *parts))).hexdigest()


def _token() -> str:
    return secrets.token_hex(HASH // 2)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A key in a table, of which request it is, and who claims it."""

    table: sa.Table
    id: str
    request: str
    run: str = dataclasses.field(default_factory=_token)
    """What the row has of this claim at first, and once all is done."""
    done: str = dataclasses.field(default_factory=_token)

    @classmethod
    def of(cls, table: sa.Table, whose: str, key: str, *request: bytes) -> Claim:
        """Name a key by its hash: no database takes two that differ for the same."""
        return cls(table, digest(whose.encode(), key.encode()), digest(*request))

    def insert(self, database: known.Database, *, proves: bool = False) -> sa.Insert:
        """Give what has a `rowcount` of 1 if the key is new; waits for who has it."""
        now = -int(time.time()) if proves else int(time.time())
        row = {"id": self.id, "request": self.request, "run": self.run, "created": now}
        insert = database.insert_if_new(self.table, row)
        return insert.execution_options(preserve_rowcount=True, **known.OWN_STATEMENT)

    @property
    def is_here(self) -> sa.ColumnElement[bool]:
        return self.table.c.id == self.id

    def select(self) -> sa.Select[Any]:
        # MySQL shows what was committed since the transaction began to a lock alone.
        select = sa.select(self.table).where(self.is_here).with_for_update()
        return select.execution_options(**known.OWN_STATEMENT)

    @property
    def is_left(self) -> sa.ColumnElement[bool]:
        """The row of `was_kept`, where that was broken off: it is nobody's."""
        return self.is_here & (self.table.c.created < 0)

    def take_over(self) -> sa.Update:
        row = {"request": self.request, "run": self.run, "created": int(time.time())}
        update = self.table.update().where(self.is_left).values(row)
        return update.execution_options(**known.OWN_STATEMENT)

    def update(self, **values: object) -> sa.Update:
        """Say as the last thing before COMMIT that all is done."""
        update = self.table.update().where(self.is_here).values(run=self.done, **values)
        return update.execution_options(**known.OWN_STATEMENT)

    def explain(self, error: BaseException) -> None:
        """Say on an error of the database what it was about."""
        if is_of_database(error):
            error.add_note(
                f"while claiming a key: is the table {self.table.fullname!r} there, as "
                "idempotency_table(metadata) describes it?"
            )


def leave_mark(session: Session, database: known.Database) -> str | Claim:
    """Leave with a transaction what tells later whether it was committed."""
    if (question := database.TRANSACTION_ID) is not None:
        return str(session.scalar(sa.text(question)) or "")
    token = _token()
    mark = Claim(table_of(TABLE), _token(), digest(b"mark"), run=token, done=token)
    session.execute(mark.insert(database))
    return mark


async def was_kept(
    engine: AsyncEngine, mark: str | Claim, seconds: float
) -> bool | None:
    """Tell whether the transaction of this mark was committed; None if nobody says."""
    database = known.database_of(engine.dialect)
    limit = seconds if isinstance(mark, str) else seconds / TRIES
    with anyio.move_on_after(seconds):
        while True:
            # Whatever a server, or what is in its place, answers: it is asked again.
            with suppress(Exception), anyio.fail_after(limit):
                async with engine.connect() as connection:
                    try:
                        await connection.execution_options(isolation_level="AUTOCOMMIT")
                        is_kept = await _is_kept(connection, mark, database)
                        if is_kept and database.AWAIT_STANDBYS is not None:
                            await connection.exec_driver_sql(database.AWAIT_STANDBYS)
                        return is_kept
                    finally:
                        if isinstance(mark, Claim):
                            # To reset its level SQLAlchemy has MySQL commit, unlimited.
                            await connection.invalidate()
            await anyio.sleep(PAUSE)
    return None


async def _is_kept(
    connection: AsyncConnection, mark: str | Claim, database: known.Database
) -> bool | None:
    if isinstance(mark, str):
        return await database.was_committed(connection, mark)
    # Who can make the claim again knows that the transaction is gone for good: as long
    # as it is open, on whatever connection, the insert waits for it. It is committed,
    # and deleted at once, since the nodes of a cluster know of each other at COMMIT
    # alone.
    await connection.execute(mark.insert(database, proves=True))
    # Also where it was inserted by a try before this one, whose answer was lost.
    taken_back = await connection.execute(mark.table.delete().where(mark.is_left))
    if taken_back.rowcount == 1:
        return False
    # Another may have claimed the key since then, and have done what it is for.
    selected = sa.select(mark.table.c.run).where(mark.is_here)
    run = (await connection.execute(selected)).scalar_one()
    if run == mark.run != mark.done:
        return None  # something has kept the claim before all was done
    return bool(run == mark.done)


def is_expired(table: sa.Table, keep: float) -> sa.ColumnElement[bool]:
    """Tell of keys that are older than `keep` seconds, also of what a look has left."""
    then = int(time.time() - keep)
    return table.c.created.between(1 - then, then - 1)
