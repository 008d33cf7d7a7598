"""POST /v1/load_lora_adapter and POST /v1/unload_lora_adapter: for administrators."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from octavo_client.wire_adapters import Adapter, AdapterUnloaded
from octavo_engine.errors import InvalidAdapter, InvalidRequest
from octavo_server.access import admin_only
from octavo_server.adapters import allowed_path
from octavo_server.errors import ApiError
from octavo_server.generation import until_disconnect
from octavo_server.protocol.adapters import LoadAdapterBody, UnloadAdapterBody
from octavo_server.protocol.body import read_body
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter(dependencies=[Depends(admin_only)])


@router.post("/v1/load_lora_adapter")
async def load(request: Request) -> Response:
    """Serve an adapter under a name, or put it in the place of the one of this name."""
    state = state_of(request)
    body = await read_body(request, LoadAdapterBody)
    if body.lora_name in state.model_names:
        raise InvalidRequest(
            f"{body.lora_name!r} is the name of the model itself; use another", param="lora_name", code="adapter_exists"
        )
    path = allowed_path(body.lora_path, state.settings.lora_dir)
    work = state.engine.load_adapter(body.lora_name, path, in_place=body.load_inplace)
    try:
        info = await until_disconnect(request, work)
    except InvalidAdapter as error:  # whoever named the files may know what is wrong with them
        raise ApiError(400, str(error), param=error.param, code=error.code) from error
    answer = Adapter(
        id=info.name, parent=state.model_names[0], digest=info.digest, rank=info.rank, bytes=info.num_bytes
    )
    return json_response(answer.model_dump())


@router.post("/v1/unload_lora_adapter")
async def unload(request: Request) -> Response:
    """Serve an adapter no more; requests that run go on with it."""
    body = await read_body(request, UnloadAdapterBody)
    await state_of(request).engine.unload_adapter(body.lora_name)
    return json_response(AdapterUnloaded(id=body.lora_name).model_dump())
