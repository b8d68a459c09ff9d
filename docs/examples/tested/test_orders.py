"""What the application promises its clients; each test begins without orders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
from starlette.testclient import TestClient

from asgi_uow.testing import (
    assert_no_connection_held,
    count_statements,
    drop_connection,
    fail_commit,
    lose_commit_answer,
    serialization_failure,
)

from .app import app, db, send_confirmation

if TYPE_CHECKING:
    from httpx import AsyncClient

    from asgi_uow.testing import capture_hooks, sandbox

TEA = {"item": "tea"}
KEY = {"Idempotency-Key": "order-1"}


async def test_order(client: AsyncClient) -> None:
    assert (await client.post("/orders", json=TEA)).status_code == 201
    assert (await client.get("/orders")).json() == ["tea"]


def test_order_without_async() -> None:
    with TestClient(app) as client:
        assert client.post("/orders", json=TEA).status_code == 201
        assert client.get("/orders").json() == ["tea"]


def test_order_on_a_server(server: str, uow_sandbox: sandbox) -> None:
    with httpx.Client(base_url=server, headers=uow_sandbox.headers) as client:
        assert client.post("/orders", json=TEA).status_code == 201
        assert client.get("/orders").json() == ["tea"]


async def test_confirmation(client: AsyncClient, uow_hooks: capture_hooks) -> None:
    await client.post("/orders", json=TEA)

    [hook] = uow_hooks
    assert (hook.phase, hook.fn) == ("after_commit", send_confirmation)
    assert hook.args == ("tea",)


async def test_too_many(client: AsyncClient, uow_hooks: capture_hooks) -> None:
    response = await client.post("/orders", json={"item": "tea", "quantity": 101})

    assert response.status_code == 409
    assert (await client.get("/orders")).json() == []
    assert uow_hooks == []


async def test_failed_commit(client: AsyncClient, uow_hooks: capture_hooks) -> None:
    async with fail_commit(db):
        response = await client.post("/orders", json=TEA)

    assert response.status_code == 500
    assert (await client.get("/orders")).json() == []
    assert uow_hooks == []


async def test_lost_answer(client: AsyncClient, uow_hooks: capture_hooks) -> None:
    async with lose_commit_answer(db):
        response = await client.post("/orders", json=TEA)

    assert response.status_code == 500
    assert (await client.get("/orders")).json() == ["tea"]
    assert uow_hooks == []


async def test_lost_answer_with_a_key(client: AsyncClient) -> None:
    async with lose_commit_answer(db):
        response = await client.post("/orders", json=TEA, headers=KEY)

    assert response.status_code == 201
    assert (await client.get("/orders")).json() == ["tea"]


async def test_lost_connection(client: AsyncClient) -> None:
    async with drop_connection(db):
        response = await client.post("/orders", json=TEA)
    async with drop_connection(db):
        repetition = await client.post("/orders", json=TEA, headers=KEY)

    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert repetition.status_code == 201
    assert (await client.get("/orders")).json() == ["tea"]


async def test_conflict(client: AsyncClient) -> None:
    async with serialization_failure(db, times=2):
        response = await client.post("/orders", json=TEA)
        repetition = await client.post("/orders", json=TEA, headers=KEY)

    assert response.status_code == 503
    assert repetition.status_code == 201
    assert (await client.get("/orders")).json() == ["tea"]


async def test_statements(client: AsyncClient) -> None:
    with count_statements(db, expected=1):
        await client.get("/orders")
    assert_no_connection_held(db)
