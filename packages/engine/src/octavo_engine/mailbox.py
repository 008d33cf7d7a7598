"""How what the engine's thread brings reaches its readers, with one call a step into each event loop; and Mailbox."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo_engine.errors import EngineError
from octavo_engine.types import SequenceUpdate


class Reader(Protocol):
    """Whoever reads a request's updates."""

    loop: asyncio.AbstractEventLoop

    def put(self, update: SequenceUpdate | EngineError) -> None:
        """Take an update, or the error that ends the request; called on the loop only."""
        ...


@dataclass(slots=True)
class Mailbox:
    """Where a request's updates are kept until a task takes them; filled on the task's event loop only."""

    loop: asyncio.AbstractEventLoop
    updates: list[SequenceUpdate | EngineError] = field(default_factory=list)
    _arrival: asyncio.Future[None] | None = None

    def put(self, update: SequenceUpdate | EngineError) -> None:
        """Add an update, or the error that ends the request."""
        self.updates.append(update)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def take(self) -> list[SequenceUpdate]:
        """Return what has come since the last time, once there is something; raise an error that came."""
        if not self.updates:
            self._arrival = self.loop.create_future()
            await self._arrival
        taken, self.updates = self.updates, []
        updates = []
        for update in taken:
            if isinstance(update, EngineError):
                raise update
            updates.append(update)
        return updates


Letter = tuple[Reader, SequenceUpdate | EngineError]


def post(loop: asyncio.AbstractEventLoop, letters: Sequence[Letter]) -> None:
    """Give letters to readers of a loop, from any thread."""
    with contextlib.suppress(RuntimeError):  # the readers' event loop has closed: nobody is left to tell
        loop.call_soon_threadsafe(_put, letters)


def _put(letters: Sequence[Letter]) -> None:
    for reader, update in letters:
        reader.put(update)
