"""Where in its life a unit of work is, and what it refuses from there on."""

from __future__ import annotations

from asgi_uow._decision import TRANSITIONS, UNDECIDED, WRITABLE, State
from asgi_uow.errors import UnitOfWorkClosedError


class Life:
    """The state of one unit of work; every step is checked."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        """Begin."""
        self.state: State = State.NEW

    def move(self, state: State) -> None:
        """Take a step; raises `UnitOfWorkClosedError` for one that does not exist."""
        if state not in TRANSITIONS[self.state]:
            operation = f"becoming {state.value}"
            raise UnitOfWorkClosedError(operation, self.state)
        self.state = state

    @property
    def is_open(self) -> bool:
        """Whether the end is not decided yet."""
        return self.state in UNDECIDED

    @property
    def is_writable(self) -> bool:
        """Whether the write sessions may still execute something.

        If not, COMMIT or ROLLBACK is being sent or lies behind.
        """
        return self.state in WRITABLE

    def check_undecided(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the end has been decided."""
        if not self.is_open:
            raise UnitOfWorkClosedError(operation, self.state)

    def check_writable(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the flush before COMMIT is over."""
        if not self.is_writable:
            raise UnitOfWorkClosedError(operation, self.state)

    def check_readable(self, operation: str) -> None:
        """Raise `UnitOfWorkClosedError` once the response is over."""
        if self.state is State.CLOSED:
            raise UnitOfWorkClosedError(operation, self.state)
