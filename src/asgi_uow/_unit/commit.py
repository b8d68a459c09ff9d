"""One COMMIT, and what is known of it while it is on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from asgi_uow._databases.known import database_of, driver_of
from asgi_uow.errors import TransactionGoneError

if TYPE_CHECKING:
    from asgi_uow._databases.engines import Engines
    from asgi_uow._sessions.session import Session


class Commit:
    """One COMMIT: may it have reached the server, and has the server answered?"""

    def __init__(self, db: Engines, session: Session) -> None:
        self.db = db
        self.session = session
        self.transaction_id: str | None = None
        self.sent = False
        self.in_doubt = False

    @property
    def two_phase(self) -> bool:
        return self.session.sync_session.twophase

    @property
    def acknowledged(self) -> bool:
        return self.session.sync_session.committed

    @property
    def is_kept(self) -> bool:
        """Whether there was anything to keep, and this step was its COMMIT."""
        return self.sent and bool(self.session.sync_session.connections)

    async def prepare(self) -> None:
        """Have the server promise that it can commit."""
        session = self.session
        session.hand_over()
        async with session.turn:
            await session.close_streams()
            await _require_whole(session)
            await session.run_sync(lambda sync: sync.prepare())

    async def run(self) -> None:
        """Commit, and give the connection back."""
        session = self.session
        session.hand_over()
        async with session.turn:
            await session.close_streams()
            statement = database_of(self.db.engine.dialect).TRANSACTION_ID
            wanted = self.db.resolve_unknown and session.sync_session.connections
            if wanted and statement is not None:
                self.transaction_id = await session.scalar(statement)
            await _require_whole(session)
            self.sent = True
            await session.commit()
            await session.close()


async def _require_whole(session: Session) -> None:
    """Raise unless the transaction is there and whole, just before COMMIT.

    `ConnectionError` if the driver knows that a connection is dead: this tells
    "certainly not committed" from "nobody knows". `TransactionGoneError` if a
    statement through the driver itself, which the journal does not see, has
    ended it or has failed; PostgreSQL has to be asked for that.
    """
    sync = session.sync_session
    for connection in sync.connections:
        raw = connection.connection.driver_connection
        driver = driver_of(connection.dialect)
        if driver.is_dead(raw):
            message = "the connection was lost before COMMIT was sent"
            raise ConnectionError(message)
        if connection.dialect.name == "sqlite" and not driver.in_transaction(raw):
            raise sync.journal.give_up(TransactionGoneError())
        if connection.dialect.name == "postgresql" and sync.exposed:
            try:
                await session.scalar("SELECT 1")
            except DBAPIError as error:
                raise TransactionGoneError from error
