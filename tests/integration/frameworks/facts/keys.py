"""What comes again with its idempotency key is answered, and not done again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from asgi_uow import Idempotency
from tests.integration.frameworks.case import database_fact, write
from tests.integration.frameworks.facts.replays import FORM
from tests.integration.frameworks.site import Reply, Site
from tests.support.keys import create_table

if TYPE_CHECKING:
    from tests.integration.frameworks.case import Case
    from tests.integration.frameworks.site import Upload


@database_fact
async def repeated_with_key(case: Case) -> None:
    """A POST that comes again with its key gets the first response; it ran once."""
    titles: list[str] = []

    async def handle(upload: Upload) -> Reply:
        titles.append(upload.title)
        await write(upload.number)
        return Reply("created", 201, {"x-made": "here"})

    await create_table(case.backend)
    headers = {"idempotency-key": "a key"}
    request = httpx.Request("POST", "http://server", headers=headers, **FORM)
    content = request.read()
    app = case.app(Site(uploads={"/forms": handle}), idempotency=Idempotency())
    async with case.run(app) as server:
        first, again = [
            await server.request(
                "/forms/7",
                method="POST",
                headers=[(key.lower(), value) for key, value in request.headers.raw],
                body=[content[:1000], content[1000:70_000], content[70_000:]],
            )
            for _ in range(2)
        ]
    for exchange in (first, again):
        assert (201, ["created"]) == (exchange.status, exchange.chunks)
        assert exchange.is_complete
        assert "here" == exchange.headers["x-made"]
    assert {**first.headers, "idempotency-replayed": "true"} == again.headers
    assert ["a title"] == titles
    assert [7] == await case.kept()
