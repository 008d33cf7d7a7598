"""Durable: what an app does beside answering: responses in the background, batches, and the end of what is too old."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import FastAPI
from starlette.requests import Request

from octavo_server.background_metrics import BackgroundMetrics
from octavo_server.background_responses import BackgroundResponses
from octavo_server.batch_runner import BatchRunner
from octavo_server.errors import ApiError
from octavo_server.exchange import current_exchange
from octavo_server.generation import cancel_all
from octavo_server.keys import ApiKey
from octavo_server.local_calls import LocalCalls
from octavo_server.protocol.violations import summarise
from octavo_server.state import ServerState
from octavo_server.store.database import StoreFailed
from octavo_server.store.store import Store

DAY = 24 * 3600
_SWEEP_SECONDS = 3600

_log = logging.getLogger(__name__)


class Durable:
    """The store of an app and the work that goes on from it.

    Args:
        app: answers the lines of batches.
        state: of the app.
        store: what it keeps.

    Attributes:
        store: what the app keeps.
        responses: those in the background.
        batches: those at work.
    """

    def __init__(self, app: FastAPI, state: ServerState, store: Store) -> None:
        keys = {_owner(key): key for key in state.settings.key_ring()}
        slots = asyncio.Semaphore(state.settings.max_num_background)
        self._retention = state.settings.retention_days * DAY
        self._sweeper: asyncio.Task[None] | None = None
        self.store = store
        self.responses = BackgroundResponses(state, store.responses, slots, keys)
        metrics = BackgroundMetrics(state.metrics.registry)
        self.batches = BatchRunner(store, LocalCalls(app, keys), slots, state.settings, metrics.lines)
        metrics.count(lambda: self.responses.num_open, lambda: self.batches.num_open)

    async def start(self) -> None:
        """Take up what the last server left, and sweep from now on."""
        await self.responses.recover()
        await self.batches.recover()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop; what is at work is taken up by the next server."""
        if self._sweeper is not None:
            await cancel_all([self._sweeper])
        await self.responses.close()
        await self.batches.close()

    async def _sweep(self) -> None:
        while True:
            now = time.time()
            try:
                await self.store.responses.delete_older(now - self._retention)
                await self.store.batches.delete_older(now - self._retention)
                await self.store.files.delete_expired(now)
            except StoreFailed as error:
                _log.error("what is too old could not be deleted: %s", error)
            await asyncio.sleep(_SWEEP_SECONDS)


def durable_of(request: Request) -> Durable:
    """Return what the app that serves a request keeps and does."""
    durable: Durable = request.app.state.durable
    return durable


def owner_of(request: Request) -> str:
    """Return whose a request is: of all who have its API key, by a digest of it; without keys all are one."""
    if (owner := getattr(request.state, "owner", None)) is not None:
        return str(owner)  # of a batch, in whose name this server asks
    exchange = current_exchange()
    return "" if exchange is None or exchange.key is None else _owner(exchange.key)


def _owner(key: ApiKey) -> str:
    return key.digest.hex()


def not_found(kind: str, given: str) -> ApiError:
    """Return the answer where no stored thing has an id."""
    return ApiError(404, f"no {kind} {summarise(given)} is stored", param="id", code=f"{kind}_not_found")
