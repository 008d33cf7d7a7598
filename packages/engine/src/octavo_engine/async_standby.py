"""AsyncStandby: puts an engine to sleep, wakes it and changes its weights, from outside of the thread that steps it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from octavo_engine.errors import InvalidRequest
from octavo_engine.standby import Measurement, MemoryReport, SleepMode, Standby, check_level

T = TypeVar("T")
_MODES = (None, "wait", "abort")


class Ask(Protocol):
    """Has something done by the engine's thread and returns what came of it."""

    def __call__(self, question: Callable[[], T]) -> Awaitable[T]:
        """Do it."""
        ...


class AsyncStandby:
    """One operation at a time, with requests kept out; whatever ends it early lets them in again.

    Weights are read in a thread of their own, so that the engine answers questions meanwhile.

    Args:
        standby: of the engine.
        ask: has something done by the engine's thread.
        idle: waits until no request runs or waits.
        abort_all: ends all requests and tells their readers; for the engine's thread.
    """

    def __init__(
        self, standby: Standby, ask: Ask, idle: Callable[[], Awaitable[None]], abort_all: Callable[[], None]
    ) -> None:
        self._standby = standby
        self._ask = ask
        self._idle = idle
        self._abort_all = abort_all

    async def sleep(self, level: int, mode: SleepMode | None) -> MemoryReport:
        """Let go of weights and KV cache."""
        check_level(level)
        async with self._alone("is being put to sleep", mode) as begun:
            await self._ask(lambda: self._standby.sleep(level))
            return self._standby.report(begun)

    async def wake_up(self, tags: Sequence[str] | None) -> MemoryReport:
        """Take what is missing into memory again."""
        async with self._alone("is waking up", None) as begun:
            parts = self._standby.needs(tags)
            weights = await asyncio.to_thread(self._standby.read_weights) if "weights" in parts else None
            await self._ask(lambda: self._standby.wake(parts, weights))
            return self._standby.report(begun)

    async def update_weights(self, path: str, mode: SleepMode | None) -> MemoryReport:
        """Replace the weights."""
        async with self._alone("is taking other weights", mode) as begun:
            weights = await asyncio.to_thread(self._standby.read_weights, path)
            await self._ask(lambda: self._standby.replace(weights))
            return self._standby.report(begun)

    @contextlib.asynccontextmanager
    async def _alone(self, why: str, mode: SleepMode | None) -> AsyncIterator[Measurement]:
        if mode not in _MODES:
            raise InvalidRequest(f'mode must be "wait" or "abort", or left out, got {mode!r}', param="mode")
        await self._ask(lambda: self._standby.close(why, only_if_idle=mode is None))
        try:
            if mode == "abort":
                await self._ask(self._abort_all)
            await self._idle()  # steps in flight count
            yield self._standby.measure()
        finally:
            self._standby.open()
