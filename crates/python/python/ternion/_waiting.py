"""Awaiting the native module: an object is polled, and calls back when it is worth to poll it again."""

from __future__ import annotations

import asyncio
from typing import Any, Callable


async def ready(poll: Callable[[Callable[[], None]], Any], cancel: Callable[[], None]) -> Any:
    """What ``poll`` returns once it is not ``...``. If the task is cancelled meanwhile, so is the work."""
    loop = asyncio.get_running_loop()
    while True:
        awake = loop.create_future()
        result = poll(lambda: _wake(loop, awake))
        if result is not ...:
            return result
        try:
            await awake
        except BaseException:
            cancel()
            raise


def _wake(loop: asyncio.AbstractEventLoop, awake: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_set, awake)
    except RuntimeError:
        pass  # The loop is closed, so nobody waits.


def _set(awake: asyncio.Future[None]) -> None:
    if not awake.done():
        awake.set_result(None)
