"""Embeddings of many inputs side by side, and how alike two of them are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from operator import mul
from typing import Any

from octavo_engine.api import EngineClient
from octavo_engine.types import EmbeddingOutput
from octavo_engine.types import Request as EngineRequest
from octavo_server.generation import cancel_all


async def embed_all(engine: EngineClient, requests: Sequence[EngineRequest]) -> list[EmbeddingOutput]:
    """Run requests with task `embed` at the same time; if one fails, the others are aborted."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(_embed(engine, request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_all(tasks)


async def _embed(engine: EngineClient, request: EngineRequest) -> EmbeddingOutput:
    return await engine.embed(request)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors of unit length, from -1 to 1."""
    product: float = sum(map(mul, one, other))
    return max(-1.0, min(1.0, product))
