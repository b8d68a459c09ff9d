"""The shop: an ordinary Starlette application, and one line for its units of work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import func, select
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Mount, Route

from asgi_uow import (
    Outcome,
    UnitOfWorkMiddleware,
    current_read_session,
    set_rollback_only,
)
from asgi_uow.inspector import Inspector
from asgi_uow.observers import LoggingObserver, UnitFinished

from . import accidents
from .models import Order, Product
from .orders import OutOfStockError, UnknownProductError, outbox, place_order
from .steps import STEPS

if TYPE_CHECKING:
    from starlette.requests import Request

    from asgi_uow import Database
    from asgi_uow.observers import Event

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

outcomes: list[str] = []
"""What became of the units of work, for the page and the tour."""


async def new_order(request: Request) -> JSONResponse:
    """Place an order; an answer of 400 or above keeps nothing of it."""
    try:
        placed = await place_order(await request.json())
    except UnknownProductError:
        return JSONResponse({"error": "no such product"}, 404)
    except OutOfStockError:
        return JSONResponse({"error": "out of stock"}, 409)
    return JSONResponse({"order": placed.id}, 201)


async def dry_run(request: Request) -> JSONResponse:
    """Place an order as `new_order` does, and keep nothing although all is well."""
    response = await new_order(request)
    set_rollback_only("dry run")
    return JSONResponse({"would answer": response.status_code})


async def state(_: Request) -> JSONResponse:
    """Show the shelves, the latest orders and what has been sent."""
    session = current_read_session()
    products = await session.scalars(select(Product).order_by(Product.name))
    latest = await session.scalars(select(Order).order_by(Order.id.desc()).limit(8))
    return JSONResponse(
        {
            "stock": {product.name: product.quantity for product in products},
            "order_count": await session.scalar(select(func.count(Order.id))),
            "orders": [str(order) for order in latest],
            "outbox": outbox,
            "outcomes": outcomes,
        },
    )


async def steps(_: Request) -> JSONResponse:
    """List the buttons of the page."""
    return JSONResponse([dataclasses.asdict(step) for step in STEPS])


async def page(_: Request) -> HTMLResponse:
    """Show the page; touches no session, so it costs the database nothing."""
    return HTMLResponse(PAGE)


def note_outcome(event: Event) -> None:
    """Remember how a unit of work ended; those that only read are left out."""
    if not isinstance(event, UnitFinished):
        return
    if event.databases or event.outcome is not Outcome.COMMITTED:
        why = f" ({event.cause.value})" if event.cause else ""
        outcomes.append(event.outcome.value + why)


routes = [
    Route("/", page),
    Route("/state", state),
    Route("/steps", steps),
    Route("/orders", new_order, methods=["POST"]),
    Route("/orders/dry-run", dry_run, methods=["POST"]),
    Mount("/accidents", routes=accidents.routes),
]


def create_app(database: Database) -> Starlette:
    """Put the shop together."""
    unit_of_work = Middleware(
        UnitOfWorkMiddleware,
        database,
        observers=(LoggingObserver(), note_outcome),
    )
    inspector = Mount("/uow", Inspector(database, debug=True))  # what the page shows
    return Starlette(routes=[*routes, inspector], middleware=[unit_of_work])
