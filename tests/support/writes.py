"""The ways to write, all of them tried on the read session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, select, update

from tests.support.databases import DRIVERS
from tests.support.shop import Item

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import TypeAlias

    from sqlalchemy.orm import Session as SyncSession

    from asgi_uow import Session

    Call: TypeAlias = Callable[[Session], Awaitable[object]]

INSERT = "INSERT INTO items (id) VALUES (2)"
SELECT = "SELECT id FROM items ORDER BY id"
SET_CONFIG = "SELECT set_config('default_transaction_read_only', 'off', false)"
ROUTINES = {
    "aiosqlite": (),
    "asyncmy": (
        "CREATE SEQUENCE numbers",
        (
            "CREATE FUNCTION buy(n INT) RETURNS INT MODIFIES SQL DATA"
            " BEGIN INSERT INTO items (id) VALUES (n); RETURN n; END"
        ),
        (
            "CREATE PROCEDURE buy_too(n INT) MODIFIES SQL DATA"
            " INSERT INTO items (id) VALUES (n)"
        ),
        "CREATE PROCEDURE open_up() SET SESSION TRANSACTION READ WRITE",
        (
            "CREATE FUNCTION open_too() RETURNS INT"
            " BEGIN SET SESSION tx_read_only = 0; RETURN 1; END"
        ),
    ),
    "asyncpg": (
        "CREATE SEQUENCE numbers",
        (
            "CREATE FUNCTION buy(n integer) RETURNS integer LANGUAGE sql"
            " AS 'INSERT INTO items (id) VALUES (n) RETURNING id'"
        ),
        (
            "CREATE PROCEDURE buy_too(n integer) LANGUAGE sql"
            " AS 'INSERT INTO items (id) VALUES (n)'"
        ),
        f"CREATE FUNCTION open_too() RETURNS text LANGUAGE sql AS $${SET_CONFIG}$$",
        (
            "CREATE PROCEDURE open_up() LANGUAGE plpgsql"
            " AS $$ BEGIN PERFORM open_too(); END $$"
        ),
    ),
}
ROUTINES["psycopg"] = ROUTINES["asyncpg"]


# The ways to write


def sql(statement: str) -> Call:
    return lambda session: session.execute(statement)


def core(statement: Any) -> Call:
    return lambda session: session.execute(statement)


async def flush(session: Session) -> None:
    session.add(Item(id=2))
    try:
        await session.flush()
    finally:
        session.expunge_all()  # or the unit would be refused its end too


async def bulk(session: Session) -> None:
    def save(sync: SyncSession) -> None:
        sync.bulk_save_objects([Item(id=2)])

    await session.run_sync(save)


async def on_connection(session: Session) -> None:
    connection = await session.connection()
    await connection.execute(insert(Item).values(id=2))


def on_driver(statement: str) -> Call:
    async def call(session: Session) -> None:
        raw = await driver_connection(session)
        execute = raw.query if hasattr(raw, "query") else raw.execute
        await execute(statement)

    return call


async def driver_connection(session: Session) -> Any:
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


def everywhere(call: Call) -> Mapping[str, Call]:
    return dict.fromkeys(DRIVERS, call)


def where(
    sqlite: str = "", mariadb: str = "", asyncpg: str = "", psycopg: str = ""
) -> Mapping[str, Call]:
    statements = zip(DRIVERS, (sqlite, mariadb, asyncpg, psycopg), strict=True)
    return {driver: sql(statement) for driver, statement in statements if statement}


def servers(mariadb: str, postgresql: str, sqlite: str = "") -> Mapping[str, Call]:
    return where(sqlite, mariadb, postgresql, postgresql)


WITH_INSERT = f"WITH n AS ({INSERT} RETURNING id) SELECT id FROM n"
CTE = insert(Item.__table__).values(id=2).returning(Item.id).cte()  # type: ignore[arg-type]
SET_SESSION = "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"

CALLS: Mapping[str, Mapping[str, Call]] = {
    "`INSERT` as text": everywhere(sql(INSERT)),
    "`UPDATE` as text": everywhere(sql("UPDATE items SET id = 3")),
    "`DELETE` as text": everywhere(sql("DELETE FROM items")),
    "`WITH ... (INSERT ...) SELECT`": servers("", WITH_INSERT),
    "two statements in one text": where(
        mariadb=f"SELECT 1; {INSERT}", psycopg=f"SELECT 1; {INSERT}"
    ),
    "`add()` and `flush()`": everywhere(flush),
    "`insert()`": everywhere(core(insert(Item).values(id=2))),
    "`update()`": everywhere(core(update(Item).values(id=3))),
    "`delete()`": everywhere(core(delete(Item))),
    "`insert()` in a `cte()`": dict.fromkeys(DRIVERS[2:], core(select(CTE.c.id))),
    "`bulk_save_objects()`": everywhere(bulk),
    "`insert()` on `session.connection()`": everywhere(on_connection),
    "`INSERT` on the driver's own connection": everywhere(on_driver(INSERT)),
    "`SELECT ... FOR UPDATE`": servers(f"{SELECT} FOR UPDATE", f"{SELECT} FOR UPDATE"),
    "`FOR SHARE`, `LOCK IN SHARE MODE`": servers(
        f"{SELECT} LOCK IN SHARE MODE", f"{SELECT} FOR SHARE"
    ),
    "`CREATE TABLE`": everywhere(sql("CREATE TABLE other (id INTEGER)")),
    "`CREATE TEMPORARY TABLE`": everywhere(
        sql("CREATE TEMPORARY TABLE another (id INTEGER)")
    ),
    "a function that writes": servers("SELECT buy(2)", "SELECT buy(2)"),
    "a procedure that writes": servers("CALL buy_too(2)", "CALL buy_too(2)"),
    "`nextval` of a sequence": servers(
        "SELECT NEXTVAL(numbers)", "SELECT nextval('numbers')"
    ),
    "`SET TRANSACTION READ WRITE`": servers(
        "SET TRANSACTION READ WRITE", "SET TRANSACTION READ WRITE"
    ),
    "the same for the whole session": servers(
        "SET SESSION TRANSACTION READ WRITE", SET_SESSION, "PRAGMA query_only = 0"
    ),
    "its variable: `tx_read_only`, `set_config()`": servers(
        "SET @@SESSION.tx_read_only = 0", SET_CONFIG
    ),
    "the same on the driver's own connection": {
        "aiosqlite": on_driver("PRAGMA query_only = 0"),
        "asyncmy": on_driver("SET SESSION TRANSACTION READ WRITE"),
        "asyncpg": on_driver(SET_SESSION),
        "psycopg": on_driver(SET_SESSION),
    },
    "a procedure that does it": servers("CALL open_up()", "CALL open_up()"),
    "a function that does it": servers("SELECT open_too()", "SELECT open_too()"),
    "`RESET ALL`": servers("", "RESET ALL"),
    "`START TRANSACTION READ WRITE`": servers(
        "START TRANSACTION READ WRITE", "START TRANSACTION READ WRITE"
    ),
}
BY_THE_SESSION = {"`add()` and `flush()`", "`insert()`", "`update()`", "`delete()`"}
"""What is refused before the database is asked, so there is no error of its driver."""
