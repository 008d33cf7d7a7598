"""EventLog: the events of one background response, which are stored before anyone sees them."""

from __future__ import annotations

import asyncio

from octavo_server.store.responses import ResponseStore

NumberedEvent = tuple[int, bytes]


class EventLog:
    """Stores events beside the work that they tell of, many at a time where they come faster than they are written.

    Args:
        responses: where they are stored.
        response_id: whose they are.

    Attributes:
        news: set, and replaced, when there are further events, or will be no more.
    """

    def __init__(self, responses: ResponseStore, response_id: str) -> None:
        self._responses = responses
        self._response_id = response_id
        self._waiting: list[NumberedEvent] = []
        self._writer: asyncio.Task[None] | None = None
        self.news = asyncio.Event()

    def append(self, event: NumberedEvent) -> None:
        """Take in an event; it is stored soon."""
        self._waiting.append(event)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Wait until all is stored.

        Raises:
            StoreFailed: if that could not be done.
        """
        if self._writer is not None:
            await self._writer

    def tell(self) -> None:
        """Wake those who wait for news."""
        self.news.set()
        self.news = asyncio.Event()

    async def _write(self) -> None:
        while self._waiting:
            events, self._waiting = self._waiting, []
            await self._responses.add_events(self._response_id, events)
            self.tell()
        self._writer = None
