"""`Database.check()`: what it tells of the writer and of each reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy import exc as sa_exc

from tests.support.databases import DRIVERS, SERVER_DRIVERS, checked_out, on
from tests.support.site import Site, down, site_with

if TYPE_CHECKING:
    from tests.servers import Backend, ServerBackend

pytestmark = on(*DRIVERS)


async def test_check(backend: Backend) -> None:
    """The report tells of the writer and of each reader."""
    async with site_with(backend, backend.url, down(backend)) as site:
        report = await site.db.check(timeout=30)
        assert report.ok
        assert report.writer.ok
        assert [True, False] == [reader.ok for reader in report.readers]
        assert report.readers[0].error is None
        assert report.readers[1].error is not None
        assert [0, 0, 0] == checked_out(site.db)


async def test_check_in_time(backend: Backend) -> None:
    """A server whose connections are all in use is reported when time is up."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
    async with site_with(backend, **options) as site:
        async with site.db.read_engine.connect():
            report = await site.db.check(timeout=0.05)
        assert not report.ok
        assert "no answer within 0.05 seconds" == report.writer.error
        assert (await site.db.check(timeout=30)).ok


@on(*SERVER_DRIVERS)
async def test_check_of_a_replica_that_is_lost(backend: ServerBackend) -> None:
    """A reader that is lost while it is asked for its lag is not well."""
    async with (
        backend.proxy() as proxy,
        site_with(backend, backend.through(proxy.port)) as site,
    ):
        lost = proxy.cut_before(lambda trip: trip.startswith(("SHOW", "SELECT CASE")))
        report = await site.db.check(timeout=30)
        assert lost.fired.is_set()
        assert report.ok
        assert not report.readers[0].ok
        assert [0, 0] == checked_out(site.db)


async def test_check_of_a_replica_that_does_not_tell(site: Site) -> None:
    """Who may not ask how far a reader is behind finds the reader well."""

    def refuse(*args: Any) -> None:
        if args[2].startswith(("SHOW", "SELECT CASE")):
            raise sa_exc.OperationalError(args[2], (), Exception())

    event.listen(site.db.readers[0].sync_engine, "before_cursor_execute", refuse)
    report = await site.db.check(timeout=30)
    assert report.readers[0].ok
    assert report.readers[0].lag is None
