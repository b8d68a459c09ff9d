"""Settling a COMMIT whose answer was lost: PostgreSQL can be asked afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import move_on_after, sleep
from sqlalchemy import exc as sa_exc
from sqlalchemy import text

from asgi_uow._databases.dialects import code_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine

TRANSACTION_ID = (
    "SELECT CAST(pg_current_xact_id_if_assigned() AS text)"
    " || '@' || CAST((SELECT stats_reset FROM pg_stat_bgwriter) AS text)"
)
"""What `was_committed` needs, asked before COMMIT; NULL if nothing was written.

The statistics are reset by every crash, also of a single backend, and by no restart.
"""

STATUS = (
    "SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8)),"
    " CAST((SELECT stats_reset FROM pg_stat_bgwriter) AS text)"
)

ANSWERS: Mapping[object, bool] = {"committed": True, "aborted": False, "22023": False}
"""22023: the server has not given the id to anybody (since it crashed)."""

PAUSE = 0.05
"""Seconds between two questions to a server that cannot tell yet."""


async def was_committed(
    engine: AsyncEngine, transaction: str, seconds: float
) -> bool | None:
    """Ask what became of a transaction; None if it cannot be told.

    `transaction` is what `TRANSACTION_ID` gave before COMMIT. Asks again for so
    many `seconds` while the server is away or still at it. After a crash the id
    of a lost transaction may be another's: then "committed" proves nothing, but
    "aborted", or an id that is not given out yet, still proves the loss.
    """
    transaction_id, _, epoch = transaction.partition("@")
    answer: bool | None = None
    epoch_now: str | None = None
    with move_on_after(seconds):
        while answer is None:
            await sleep(PAUSE)
            try:
                async with engine.connect() as connection:
                    parameters = {"id": transaction_id}
                    result = await connection.execute(text(STATUS), parameters)
                    status, epoch_now = result.one()
            except (sa_exc.DBAPIError, OSError) as error:
                status = code_of(error)
            if status == "committed" and epoch_now != epoch:
                break
            answer = ANSWERS.get(status)
    return answer
