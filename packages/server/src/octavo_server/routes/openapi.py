"""GET /openapi.json: what every route takes and answers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_server.streaming import json_response

router = APIRouter()


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Describe all routes as an OpenAPI document."""
    from octavo_server.openapi import document  # OpenAI's types, which few ask for, take long to load

    return json_response(document(request.app))
