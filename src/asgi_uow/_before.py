"""What happens in the transaction before COMMIT is sent: hooks, then the flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from ._after import watched

if TYPE_CHECKING:
    from ._hooks import Hook, Hooks
    from ._sessions import Sessions
    from ._unit import UnitOfWork


class HookStoppedError(Exception):
    """Carries the name of the `before_commit` hook whose error is its cause."""


async def prepare(unit: UnitOfWork, sessions: Sessions) -> None:
    """Run the `before_commit` hooks and flush, until neither adds to the other.

    Each has `hook_timeout` seconds. Raises `HookStoppedError` from what a hook has
    raised, and what the flush raises.
    """
    for _, session in sessions.all_readers():
        session.refuse_changes()
    timeout = unit.settings.hook_timeout
    unit.hooks.by_hook = True
    done = 0
    while True:
        for hook in _waiting(unit.hooks, done):
            done = hook.number
            if hook.dropped:
                continue
            try:
                with watched(unit, "before_commit", hook):
                    await hook.call(timeout)
            except Exception as error:
                raise HookStoppedError(hook.name) from error
        writers = list(sessions.writers.values())
        for writer in writers:
            if writer.has_changes:
                with anyio.fail_after(timeout):
                    await writer.flush()
        if not _waiting(unit.hooks, done) and len(writers) == len(sessions.writers):
            return


def _waiting(hooks: Hooks, done: int) -> list[Hook]:
    queue = hooks.of("before_commit")
    return [hook for hook in queue if hook.number > done]
