"""Facts about asgi-uow, and the servers they are checked on."""
