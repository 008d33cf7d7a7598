"""AsyncStandby: puts an engine to sleep, wakes it and changes its weights, from outside of the thread that steps it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from octavo_engine.errors import InvalidRequest
from octavo_engine.standby import Closing, MemoryReport, SleepMode, Standby, check_level

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
        do: has something done by it without waiting.
        idle: waits until no request runs or waits.
        abort_all: ends all requests and tells their readers; for the engine's thread.
    """

    def __init__(
        self,
        standby: Standby,
        ask: Ask,
        do: Callable[[Callable[[], None]], None],
        idle: Callable[[], Awaitable[None]],
        abort_all: Callable[[], None],
    ) -> None:
        self._standby = standby
        self._ask = ask
        self._do = do
        self._idle = idle
        self._abort_all = abort_all

    async def sleep(self, level: int, mode: SleepMode | None) -> MemoryReport:
        """Let go of weights and KV cache."""
        check_level(level)
        async with self._alone("is being put to sleep", mode) as alone:
            return await alone.end(lambda: self._standby.sleep(level))

    async def wake_up(self, tags: Sequence[str] | None) -> MemoryReport:
        """Take what is missing into memory again."""
        async with self._alone("is waking up", None) as alone:
            parts = self._standby.needs(tags)
            weights = await asyncio.to_thread(self._standby.read_weights) if "weights" in parts else None
            return await alone.end(lambda: self._standby.wake(parts, weights))

    async def update_weights(self, path: str, mode: SleepMode | None) -> MemoryReport:
        """Replace the weights."""
        async with self._alone("is taking other weights", mode) as alone:
            weights = await asyncio.to_thread(self._standby.read_weights, path)
            return await alone.end(lambda: self._standby.replace(weights))

    @contextlib.asynccontextmanager
    async def _alone(self, why: str, mode: SleepMode | None) -> AsyncIterator[_Alone]:
        if mode not in _MODES:
            raise InvalidRequest(f'mode must be "wait" or "abort", or left out, got {mode!r}', param="mode")
        closing = Closing(why)
        try:
            await self._ask(lambda: self._standby.close(closing, only_if_idle=mode is None))
            if mode == "abort":
                await self._ask(self._abort_all)
            await self._idle()  # steps in flight count
            yield _Alone(self._standby, self._ask, closing)
        finally:
            self._do(lambda: self._standby.open(closing))


class _Alone:
    """An operation while nothing runs."""

    def __init__(self, standby: Standby, ask: Ask, closing: Closing) -> None:
        self._standby = standby
        self._ask = ask
        self._closing = closing
        self._begun = standby.measure()

    async def end(self, change: Callable[[], None]) -> MemoryReport:
        """Make the change and let requests in again, in one go, so that whoever waits for it can send some."""

        def make() -> None:
            change()
            self._standby.open(self._closing)

        await self._ask(make)
        return self._standby.report(self._begun)
