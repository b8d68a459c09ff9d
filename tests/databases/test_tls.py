"""TLS and other words in URLs, as clouds hand them out, reach the driver."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from asgi_uow import Database
from asgi_uow.errors import ConfigurationError
from tests.servers.process import HOST, MariaDB, PostgreSQL, Server
from tests.support.databases import on

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.servers import MariaDBBackend, PostgreSQLBackend

FILES = {"key": "../key.pem", "cert": "../cert.pem"}  # seen from the server's data


@contextmanager
def with_certificate(server: Server) -> Generator[str]:
    """A server with a certificate for its address; gives the path of that."""
    folder = server.folder
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=shop"
    names = ["-addext", f"subjectAltName=IP:{HOST}"]
    files = ["-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    command = ["openssl", *words.split(), *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    if server._run_as is not None:
        shutil.chown(folder / "key.pem", server._run_as)
    with server:
        yield str(folder / "cert.pem")


async def is_encrypted(url: str, question: str) -> bool:
    """Ask the writer and the reader of a database, with a replica if there is one."""
    db = Database.from_url(url, read_urls=[url])
    async with db:
        answers = {await db.read.scalar(question), await db.write.scalar(question)}
    await db.dispose()
    assert 1 == len(answers)
    return bool(answers.pop())


async def test_postgresql(postgresql: PostgreSQLBackend) -> None:
    """The words of libpq work with asyncpg too, and asyncpg's with psycopg."""
    options = ("--ssl=on", *(f"--ssl_{k}_file={path}" for k, path in FILES.items()))
    question = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    with with_certificate(server := PostgreSQL(*options)) as path:
        for driver in ("", "+psycopg"):
            url = f"postgresql{driver}://postgres@{HOST}:{server.port}/postgres"
            for words in (
                "sslmode=require",
                "ssl=require",
                "ssl=true",
                f"sslmode=verify-full&sslrootcert={path}",
            ):
                assert await is_encrypted(f"{url}?{words}", question), words
            for words in ("sslmode=disable", "ssl=false"):
                assert not await is_encrypted(f"{url}?{words}", question), words
            with pytest.raises(Exception, match="certificate"):
                await is_encrypted(f"{url}?sslmode=verify-full", question)
    assert postgresql.port != server.port


async def test_mariadb(mariadb: MariaDBBackend) -> None:
    """What MySQL's clients call it works with asyncmy."""
    options = tuple(f"--ssl-{key}={path}" for key, path in FILES.items())
    question = "SELECT variable_value <> '' FROM information_schema.session_status"
    question += " WHERE variable_name = 'Ssl_cipher'"
    with with_certificate(server := MariaDB(*options)) as path:
        url = f"mysql://root@{HOST}:{server.port}/mysql"
        for words in (
            "ssl_mode=REQUIRED",
            "ssl-mode=REQUIRED",
            "sslmode=required",
            "ssl=true",
            f"ssl_ca={path}",
            f"ssl_mode=VERIFY_IDENTITY&ssl_ca={path}",
            f"ssl_mode=VERIFY_CA&ssl_ca={path}",
        ):
            assert await is_encrypted(f"{url}?{words}", question), words
        for words in ("", "?ssl_mode=DISABLED", "?sslmode=disable", "?ssl=false"):
            assert not await is_encrypted(url + words, question), words
        named = url.replace(HOST, "localhost")  # which is not in the certificate
        words = f"ssl_mode=VERIFY_IDENTITY&ssl_ca={path}"
        with pytest.raises(Exception, match="certificate"):
            await is_encrypted(f"{named}?{words}", question)
    assert mariadb.port != server.port


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres://h/d?sslmode=require&channel_binding=require", "channel_binding"),
        ("postgres://h/d?pgbouncer=true", "'pgbouncer': leave it out"),
        ("postgres://h/d?sslpassword=secret", "'sslpassword': leave it out"),
        ("postgresql+psycopg://h/d?pgbouncer=true", "psycopg takes no 'pgbouncer'"),
        ("mysql://h/d?ssl_mode=VERIFY_CA", "ssl_mode is DISABLED, REQUIRED, or"),
        ("mysql://h/d?ssl_mode=PREFERRED", "ssl_mode is DISABLED, REQUIRED, or"),
        ("mysql://h/d?sslaccept=strict", "asyncmy takes no 'sslaccept'"),
    ],
)
def test_what_cannot_be(url: str, message: str) -> None:
    """What the driver would refuse with its first connection is refused at once."""
    for urls in ((url, []), (url.partition("?")[0], [url])):
        with pytest.raises(ConfigurationError, match=message):
            Database.from_url(urls[0], read_urls=urls[1])


@pytest.mark.parametrize(
    ("url", "arguments", "message"),
    [
        ("postgres://h/d", {"sslmode": "require"}, "asyncpg takes no 'sslmode'"),
        ("postgres://h/d", {"connect_timeout": 3}, "'connect_timeout': leave it out"),
        ("postgresql+psycopg://h/d", {"ssl": True}, "psycopg takes no 'ssl'"),
        ("mysql://h/d", {"timeout": 3}, "asyncmy takes no 'timeout'"),
        ("mysql://h/d", 7, "cannot be made of its URL and options"),
        ("mysql://h/d", "x", "cannot be made of its URL and options"),
        (
            "mysql://h/d?connect_timeout=abc",
            {},
            "cannot be made of its URL and options",
        ),
    ],
)
def test_arguments_that_cannot_be(url: str, arguments: Any, message: str) -> None:
    """So is what is passed on to the driver, beside the URL."""
    with pytest.raises(ConfigurationError, match=message):
        Database.from_url(url, connect_args=arguments)


@pytest.mark.parametrize("name", ["async_creator_fn", "prepared_statement_name_func"])
def test_arguments_of_sqlalchemy(name: str) -> None:
    """What SQLAlchemy takes, or a function that connects, may be anything."""
    arguments = {name: str, "server_settings": {"application_name": "shop"}}
    db = Database.from_url("postgres://h/d", connect_args=arguments)
    assert "asyncpg" == db.engine.dialect.driver


@pytest.mark.parametrize("name", ["async_creator", "pool"])
def test_one_place_for_all(name: str) -> None:
    """What connects to one server connects to no replica: refused, not ignored."""
    with pytest.raises(ConfigurationError, match=f"{name} would connect reads too"):
        read_urls, option = ["postgres://r/d"], {name: object()}
        Database.from_url("postgres://h/d", read_urls=read_urls, **option)  # type: ignore[arg-type]


@on("asyncpg", "psycopg")
async def test_what_the_server_is_told(backend: PostgreSQLBackend) -> None:
    """Settings in a URL are the server's with asyncpg as they are with psycopg."""
    words = "application_name=shop&options=-c%20search_path%3Dseven"
    db = Database.from_url(f"{backend.url}?{words}")
    async with db:
        for session in (db.read, db.write):
            assert "shop" == await session.scalar("SHOW application_name")
            assert "seven" == await session.scalar("SHOW search_path")
    await db.dispose()
