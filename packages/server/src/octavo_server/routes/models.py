"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_server.state import ServerState, state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the names under which models are served, those of adapters behind them."""
    state = state_of(request)
    names = (*state.model_names, *(info.name for info in state.engine.adapters()))
    return json_response({"object": "list", "data": [_card(state, name) for name in names]})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Describe one model; its name may hold slashes."""
    state = state_of(request)
    return json_response(_card(state, state.resolve_model(model_id)))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    """Describe a model; an adapter has a parent, its base."""
    card = {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "octavo",
        "max_model_len": state.engine.info.max_model_len,
    }
    return card if name in state.model_names else card | {"parent": state.model_names[0]}
