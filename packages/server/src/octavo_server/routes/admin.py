"""POST /sleep, /wake_up, /update_weights_from_disk and /reset_prefix_cache, GET /is_sleeping: for administrators."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from octavo_client.wire_admin import MemoryReport, PrefixCacheReset, SleepState
from octavo_engine import standby
from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_server.access import admin_only
from octavo_server.errors import ApiError
from octavo_server.generation import until_disconnect
from octavo_server.protocol.admin import UpdateWeightsBody, sleep_query, wake_query
from octavo_server.protocol.body import read_body
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter(dependencies=[Depends(admin_only)])

_UNREADABLE = {
    ModelNotFound: "model_not_found",
    CorruptModelFile: "corrupt_model_file",
    UnsupportedModel: "unsupported_model",
}


@router.post("/sleep")
async def sleep(request: Request) -> Response:
    """Let go of weights and KV cache; a caller who leaves while requests are waited for keeps the engine awake."""
    level, mode = sleep_query(request.query_params)
    return _answer(await until_disconnect(request, state_of(request).engine.sleep(level, mode)))


@router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    """Take weights and KV cache into memory again."""
    return _answer(await state_of(request).engine.wake_up(wake_query(request.query_params)))


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    """Say whether the engine sleeps."""
    level = state_of(request).engine.sleep_level
    return json_response(SleepState(is_sleeping=level > 0, level=level).model_dump())


@router.post("/update_weights_from_disk")
async def update_weights(request: Request) -> Response:
    """Serve the weights of other files."""
    body = await read_body(request, UpdateWeightsBody)
    engine = state_of(request).engine
    try:
        report = await until_disconnect(request, engine.update_weights_from_disk(body.model_path, body.mode))
    except tuple(_UNREADABLE) as error:  # whoever named the file may know what is wrong with it
        raise ApiError(400, str(error), param="model_path", code=_UNREADABLE[type(error)]) from error
    return _answer(report)


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forget all cached prefixes and drop all pins."""
    await state_of(request).engine.reset_prefix_cache()
    return json_response(PrefixCacheReset().model_dump())


def _answer(report: standby.MemoryReport) -> Response:
    return json_response(
        MemoryReport(
            sleep_level=report.sleep_level,
            weights_digest=report.weights_digest,
            bytes_before=report.bytes_before,
            bytes_after=report.bytes_after,
            freed_bytes=report.freed_bytes,
            seconds=report.seconds,
        ).model_dump()
    )
