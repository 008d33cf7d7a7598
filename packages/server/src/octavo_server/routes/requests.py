"""DELETE /v1/requests/{request_id}: let go of an answer that was kept for forks."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire import ReleasedRequest
from octavo_server.errors import ApiError
from octavo_server.protocol.violations import summarise
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.delete("/v1/requests/{request_id}")
async def release(request: Request, request_id: str) -> Response:
    """Free what only a kept answer holds; 404 if no such answer is kept, or no longer."""
    if not await state_of(request).engine.release(request_id):
        raise ApiError(404, f"no answer {summarise(request_id)} is kept", param="request_id", code="request_not_found")
    return json_response(ReleasedRequest(id=request_id).model_dump())
