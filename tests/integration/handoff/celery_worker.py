"""What a worker of Celery is started with: it notes in Redis what it has done."""

from __future__ import annotations

import os

from celery import Celery  # type: ignore[import-untyped]  # has no type hints
from redis import Redis

URL = os.environ["REDIS_URL"]
DONE = "done"


def finish(number: int) -> None:
    with Redis.from_url(URL) as client:
        client.rpush(DONE, number)


app = Celery(broker=URL, set_as_current=False)
app.task(finish, name="note")
