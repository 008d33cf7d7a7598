"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_server.embedding import embed_all
from octavo_server.generation import claim, until_disconnect
from octavo_server.mapping import embedding_requests
from octavo_server.protocol.body import read_body
from octavo_server.protocol.embeddings import EmbeddingBody
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request) -> Response:
    """Return one vector of unit length per input, as numbers or in base64 (float32, little-endian)."""
    state = state_of(request)
    body = await read_body(request, EmbeddingBody)
    body.check()
    model = state.resolve_model(body.model)
    requests = await embedding_requests(
        body, state.engine.text, request_id=f"embd-{uuid.uuid4().hex}", adapter=state.adapter_of(model)
    )
    state.engine.check_ready()
    claimed = claim(requests)
    with state.admission.enter(len(requests)):
        outputs = await until_disconnect(request, embed_all(state.engine, claimed))
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    in_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _in_base64(output.embedding) if in_base64 else output.embedding,
        }
        for index, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _in_base64(embedding: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
