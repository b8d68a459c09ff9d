"""What the shop keeps: customers, products in stock, orders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

if TYPE_CHECKING:
    from sqlalchemy import Dialect

    from asgi_uow import Database

IN_STOCK = "shop_demo_in_stock"


def _knows_deferred_keys(*_: object, dialect: Dialect, **__: object) -> bool:
    """MariaDB and MySQL do not."""
    return dialect.name in {"sqlite", "postgresql"}


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "shop_demo_customer"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)


class Product(Base):
    __tablename__ = "shop_demo_product"
    __table_args__ = (CheckConstraint("quantity >= 0", name=IN_STOCK),)

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    quantity: Mapped[int]


class Order(Base):
    __tablename__ = "shop_demo_order"
    # Looked at when the transaction commits, so that COMMIT itself can fail.
    __table_args__ = (
        ForeignKeyConstraint(
            ["customer_name"],
            ["shop_demo_customer.name"],
            deferrable=True,
            initially="DEFERRED",
        ).ddl_if(callable_=_knows_deferred_keys),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_name: Mapped[str] = mapped_column(String(40))
    product_name: Mapped[str] = mapped_column(ForeignKey(Product.name))
    quantity: Mapped[int]

    product: Mapped[Product] = relationship()

    def __str__(self) -> str:
        """Say who gets what."""
        return f"{self.id}: {self.quantity} {self.product_name}, {self.customer_name}"


async def open_shop(database: Database) -> None:
    """Make the tables and fill the shelves; a unit of work outside a request."""
    await close_shop(database)
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with database as unit:
        unit.session().add_all(
            [Customer(name="Ann"), Product(name="tea", quantity=100)],
        )


async def close_shop(database: Database) -> None:
    """Drop the tables."""
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
