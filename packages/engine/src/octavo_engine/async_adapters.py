"""AsyncAdapters: loads and unloads an engine's adapters from outside of the thread that steps it."""

from __future__ import annotations

import asyncio

from octavo_engine.adapters.info import AdapterInfo
from octavo_engine.async_standby import Ask
from octavo_engine.engine import Engine


class AsyncAdapters:
    """Files are read in a thread of their own, so that the engine goes on meanwhile.

    Args:
        engine: whose adapters these are.
        ask: has something done by the engine's thread.
    """

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self._engine = engine
        self._ask = ask

    async def load(self, name: str, path: str, *, in_place: bool) -> AdapterInfo:
        """Read an adapter and serve it. See `EngineClient.load_adapter`."""
        adapters = self._engine.adapters
        adapters.check_name(name, in_place=in_place)
        weights = await asyncio.to_thread(adapters.read, path)
        return await self._ask(lambda: adapters.put(name, path, weights, in_place=in_place))

    async def unload(self, name: str) -> None:
        """Serve a name no more. See `EngineClient.unload_adapter`."""
        adapters = self._engine.adapters
        await self._ask(lambda: adapters.unload(name))

    def listed(self) -> list[AdapterInfo]:
        """Return the adapters that are served; none where none can be."""
        return self._engine.adapters.listed() if self._engine.serves_adapters else []

    async def prepare(self, name: str) -> None:
        """Read an adapter again that has left the host's memory, before a request that names it is added."""
        adapters = self._engine.adapters
        path = adapters.path_to_read(name)
        if path is not None:
            weights = await asyncio.to_thread(adapters.read, path)
            await self._ask(lambda: adapters.bring_back(name, weights))
