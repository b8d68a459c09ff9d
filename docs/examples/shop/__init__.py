"""A small shop that shows what asgi-uow promises: `python -m docs.examples.shop`."""

from __future__ import annotations
