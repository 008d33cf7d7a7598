"""Outlet: where the parts of an answer that has begun go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Send

WriteNow = Callable[[bytes], bool]
"""Sends a part of an answer without waiting; False if it cannot, and nothing was sent."""

WRITE_NOW = "octavo.write_now"
"""The extension of an ASGI scope under which a server that has a `WriteNow` for the request offers it."""


class Outlet:
    """Sends parts in order: at once where the connection takes them, otherwise as soon as it does.

    Args:
        send: ASGI's.
        write_now: the way that waits for nothing; None if there is none.

    Attributes:
        last_sent: when a part was sent last, in seconds of the event loop's clock.
    """

    def __init__(self, send: Send, write_now: WriteNow | None) -> None:
        self._send = send
        self._write_now = write_now
        self._clock = asyncio.get_running_loop().time
        self._unsent: list[bytes] = []
        self._sender: asyncio.Task[None] | None = None
        self.last_sent = self._clock()

    def write(self, part: bytes) -> None:
        """Send a part, or keep it until the connection takes it."""
        self.last_sent = self._clock()
        if self._sender is None and self._write_now is not None and self._write_now(part):
            return
        self._unsent.append(part)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_unsent())

    async def drained(self) -> None:
        """Return when the connection has taken all that was written."""
        if self._sender is not None:
            await asyncio.shield(self._sender)  # who stops waiting does not stop what is on its way

    async def end(self, part: bytes = b"") -> None:
        """End the answer, with a last part; what was not sent by then goes before it."""
        await self.drained()
        await self._send({"type": "http.response.body", "body": part, "more_body": False})

    def close(self) -> None:
        """Drop what was not sent."""
        self._unsent.clear()
        if self._sender is not None:
            self._sender.cancel()
            self._sender = None

    async def _send_unsent(self) -> None:
        try:
            while self._unsent:
                parts = b"".join(self._unsent)
                self._unsent.clear()
                await self._send({"type": "http.response.body", "body": parts, "more_body": True})
        finally:
            self._sender = None
