"""An application that takes orders; nothing in it is there for its tests."""

from __future__ import annotations

import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_uow import (
    Database,
    Idempotency,
    Retry,
    UnitOfWorkMiddleware,
    after_commit,
    current_read_session,
    current_session,
    idempotency_table,
)


class Base(DeclarativeBase):
    """What the tables are declared in."""


class Order(Base):
    """An order."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(40))
    quantity: Mapped[int]


idempotency_table(Base.metadata)
db = Database.from_url(os.environ.get("DATABASE_URL", "sqlite:///orders.db"))
app = FastAPI()
app.add_middleware(UnitOfWorkMiddleware, db, retry=Retry(), idempotency=Idempotency())


class NewOrder(BaseModel):
    """What a client sends."""

    item: str
    quantity: int = 1


async def send_confirmation(item: str) -> None:
    """Stand for a call to a mail server."""
    print(f"Your {item} is on its way.")


@app.post("/orders", status_code=201)
async def create_order(new: NewOrder) -> None:
    """Keep an order and confirm it; a client with a key may ask again."""
    current_session().add(Order(**new.model_dump()))
    after_commit(send_confirmation, new.item)
    if new.quantity > 100:
        raise HTTPException(409, "We do not have that many.")


@app.get("/orders")
async def list_orders() -> list[str]:
    """Name what was ordered."""
    return [*await current_read_session().scalars(select(Order.item))]
