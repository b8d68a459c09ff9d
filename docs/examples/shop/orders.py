"""Placing an order: the same code in a request, in a script and in a test."""

from __future__ import annotations

from typing import TypedDict

from sqlalchemy.exc import DBAPIError

from asgi_uow import after_commit, current_session

from .models import IN_STOCK, Order, Product

outbox: list[str] = []
"""Stands for the mail server: what is in here cannot be taken back."""


class Wanted(TypedDict):
    """What the client sends."""

    customer: str
    product: str
    quantity: int


class UnknownProductError(LookupError):
    """There is no such product."""


class OutOfStockError(Exception):
    """More was wanted than there is."""


async def place_order(wanted: Wanted) -> Order:
    """Note the order, take the goods from the shelf, confirm by mail once it is sure.

    Raises `UnknownProductError` and `OutOfStockError`.
    """
    session = current_session()
    product = await session.get(Product, wanted["product"])
    if product is None:
        raise UnknownProductError(wanted["product"])
    order = Order(
        customer_name=wanted["customer"],
        product=product,
        quantity=wanted["quantity"],
    )
    session.add(order)
    await session.flush()  # the order has its number now
    # Counted by the database: two orders at the same time cannot both be right.
    product.quantity = Product.quantity - order.quantity
    try:
        await session.flush()
    except DBAPIError as error:
        if IN_STOCK in str(error.orig):
            raise OutOfStockError(wanted["product"]) from error
        raise
    after_commit(send_mail, order.customer_name, f"order {order.id} is on its way")
    return order


async def send_mail(to: str, text: str) -> None:
    """Send a mail; called only after the order is really in the database."""
    outbox.append(f"to {to}: {text}")
