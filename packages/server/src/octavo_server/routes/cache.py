"""POST /v1/cache/warm; POST and GET /v1/cache/pins, DELETE /v1/cache/pins/{id}."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire_cache import CachePin, CachePinDeleted, CachePinList, CacheWarmResponse, WarmedPrompt
from octavo_engine.api import EngineClient
from octavo_engine.pins import Pin
from octavo_engine.types import Request as EngineRequest
from octavo_engine.types import WarmOutput
from octavo_server.generation import cancel_all, claim, until_disconnect
from octavo_server.mapping import warm_requests
from octavo_server.protocol.body import read_body
from octavo_server.protocol.cache import CachePinBody, CacheWarmBody
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.post("/v1/cache/warm")
async def warm(request: Request) -> Response:
    """Compute prompts, or the beginning of a chat, into the prefix cache."""
    state = state_of(request)
    body = await read_body(request, CacheWarmBody)
    model = state.resolve_model(body.model)
    requests = await warm_requests(
        body, state.engine.text, request_id=f"warm-{uuid.uuid4().hex}", adapter=state.adapter_of(model)
    )
    outputs = await until_disconnect(request, _warm_all(state.engine, claim(requests)))
    data = [
        WarmedPrompt(
            index=index,
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.cached.total,
            warm_tokens=output.num_warm_tokens,
        )
        for index, output in enumerate(outputs)
    ]
    return json_response(CacheWarmResponse(data=data, model=model).model_dump())


@router.post("/v1/cache/pins")
async def create_pin(request: Request) -> Response:
    """Compute a prompt, or the beginning of a chat, into the prefix cache and keep it there."""
    state = state_of(request)
    body = await read_body(request, CachePinBody)
    model = state.resolve_model(body.model)
    requests = await warm_requests(
        body, state.engine.text, request_id=f"pin-{uuid.uuid4().hex}", adapter=state.adapter_of(model), pin=True
    )
    (pinning,) = claim(requests)
    return json_response(_wire(await until_disconnect(request, state.engine.pin(pinning))).model_dump())


@router.get("/v1/cache/pins")
async def list_pins(request: Request) -> Response:
    """List the pins of a salt, or of none."""
    pins = await state_of(request).engine.pins(_salt(request))
    return json_response(CachePinList(data=[_wire(pin) for pin in pins]).model_dump())


@router.delete("/v1/cache/pins/{pin_id}")
async def delete_pin(request: Request, pin_id: str) -> Response:
    """Let go of a pin; one of another salt is not found."""
    await state_of(request).engine.unpin(pin_id, _salt(request))
    return json_response(CachePinDeleted(id=pin_id).model_dump())


async def _warm_all(engine: EngineClient, requests: Sequence[EngineRequest]) -> list[WarmOutput]:
    tasks = [asyncio.create_task(_warm(engine, request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_all(tasks)


async def _warm(engine: EngineClient, request: EngineRequest) -> WarmOutput:
    return await engine.warm(request)


def _salt(request: Request) -> bytes:
    return request.query_params.get("cache_salt", "").encode()


def _wire(pin: Pin) -> CachePin:
    return CachePin(id=pin.pin_id, pinned_tokens=pin.num_tokens, blocks=pin.num_blocks)
