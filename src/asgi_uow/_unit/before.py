"""What happens in the transaction before COMMIT is sent: hooks, then the flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from asgi_uow._unit.after import attempt

if TYPE_CHECKING:
    from asgi_uow._unit.hooks import Hook, Hooks
    from asgi_uow._unit.participant import Sessions
    from asgi_uow._unit.unit import UnitOfWork


class HookStoppedError(Exception):
    """Carries the name of the `before_commit` hook whose error is its cause."""


async def prepare(unit: UnitOfWork, sessions: Sessions) -> None:
    """Run the `before_commit` hooks and flush, until neither adds to the other.

    Each has `hook_timeout` seconds. Raises `HookStoppedError` from what a hook has
    raised, and what the flush raises.
    """
    for _, session in sessions.all_readers():
        session.refuse_changes()
    unit.hooks.by_hook = True
    done = 0
    while True:
        for hook in _waiting(unit.hooks, done):
            done = hook.number
            if hook.dropped:
                continue
            error = await attempt(unit, "before_commit", hook)
            if isinstance(error, Exception):
                raise HookStoppedError(hook.name) from error
            if error is not None:
                raise error
        writers = list(sessions.writers.values())
        for writer in writers:
            if writer.has_changes:
                with anyio.fail_after(unit.settings.hook_timeout):
                    await writer.flush()
        if not _waiting(unit.hooks, done) and len(writers) == len(sessions.writers):
            return


def _waiting(hooks: Hooks, done: int) -> list[Hook]:
    queue = hooks.of("before_commit")
    return [hook for hook in queue if hook.number > done]
