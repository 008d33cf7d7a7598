"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_server.state import state_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all figures in the format that the Accept header asks for."""
    content, content_type = state_of(request).metrics.expose(request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type})
