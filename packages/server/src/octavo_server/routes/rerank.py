"""POST /v1/rerank and /v1/score, by the embeddings of a model that is no cross-encoder; other paths are aliases."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire_rerank import (
    DocumentText,
    RerankResponse,
    RerankResult,
    RerankUsage,
    ScoreData,
    ScoreResponse,
    ScoreUsage,
)
from octavo_server.embedding import cosine, embed_all
from octavo_server.generation import claim, until_disconnect
from octavo_server.mapping import scored_requests
from octavo_server.protocol.body import read_body
from octavo_server.protocol.rerank import RerankBody, ScoreBody
from octavo_server.state import ServerState, state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.post("/v1/rerank")
@router.post("/v2/rerank")
@router.post("/rerank")
async def rerank(request: Request) -> Response:
    """Return documents in the order of how well they fit a query."""
    state = state_of(request)
    body = await read_body(request, RerankBody)
    body.check()
    model, answer_id = state.resolve_model(body.model), f"rerank-{uuid.uuid4().hex}"
    texts = body.texts
    pairs = [(body.query, text) for text in texts]
    scored = await _score(request, state, body, pairs, answer_id, state.adapter_of(model))
    best = sorted(range(len(texts)), key=lambda place: (-scored.scores[place], place))[: body.top_n or None]
    shows = body.return_documents is not False
    results = [
        RerankResult(
            index=place,
            relevance_score=scored.scores[place],
            document=DocumentText(text=texts[place]) if shows else None,
        )
        for place in best
    ]
    usage = RerankUsage(prompt_tokens=scored.num_tokens, total_tokens=scored.num_tokens)
    answer = RerankResponse(id=answer_id, model=model, usage=usage, results=results)
    return json_response(answer.model_dump(exclude_none=True))


@router.post("/v1/score")
@router.post("/score")
async def score(request: Request) -> Response:
    """Return how alike the texts of pairs are."""
    state = state_of(request)
    body = await read_body(request, ScoreBody)
    body.check()
    model, answer_id = state.resolve_model(body.model), f"score-{uuid.uuid4().hex}"
    left, right = body.sides
    pairs = list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))
    scored = await _score(request, state, body, pairs, answer_id, state.adapter_of(model))
    data = [ScoreData(index=index, score=value) for index, value in enumerate(scored.scores)]
    usage = ScoreUsage(prompt_tokens=scored.num_tokens, total_tokens=scored.num_tokens)
    answer = ScoreResponse(id=answer_id, created=int(time.time()), model=model, data=data, usage=usage)
    return json_response(answer.model_dump())


class _Scores(NamedTuple):
    """One score for each pair, and the tokens of all texts."""

    scores: list[float]
    num_tokens: int


async def _score(
    request: Request,
    state: ServerState,
    body: RerankBody | ScoreBody,
    pairs: Sequence[tuple[str, str]],
    request_id: str,
    adapter: str | None,
) -> _Scores:
    """Embed the texts of pairs, each text once, and compare them."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    requests = await scored_requests(body, texts, state.engine.text, request_id=request_id, adapter=adapter)
    state.engine.check_ready()
    claimed = claim(requests)
    with state.admission.enter(len(requests)):
        outputs = await until_disconnect(request, embed_all(state.engine, claimed))
    vectors = {text: output.embedding for text, output in zip(texts, outputs, strict=True)}
    return _Scores(
        [cosine(vectors[one], vectors[other]) for one, other in pairs],
        sum(len(output.prompt_token_ids) for output in outputs),
    )
