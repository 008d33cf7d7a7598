"""DELETE /v1/requests/{id}: let go of an answer that was kept for forks; GET /v1/requests/{id}/timeline."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire import ReleasedRequest
from octavo_client.wire_timeline import (
    RequestTimeline,
    TimelineCached,
    TimelineChoice,
    TimelineChunk,
    TimelinePreemption,
    TimelineWait,
)
from octavo_engine import timeline
from octavo_server.errors import ApiError
from octavo_server.exchange import current_exchange
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


@router.get("/v1/requests/{request_id}/timeline")
async def show_timeline(request: Request, request_id: str) -> Response:
    """Tell what has happened to a request; 404 if it is unknown, ended too long ago, or is another key's."""
    found = await state_of(request).engine.timeline(request_id)
    if found is None or not _may_see(found.tenant):
        raise ApiError(
            404,
            f"nothing is known of a request {summarise(request_id)}; the last ones that ended are, as many as "
            "--max-num-timelines says",
            param="request_id",
            code="request_not_found",
        )
    return json_response(_wire(found).model_dump())


def _may_see(tenant: str | None) -> bool:
    exchange = current_exchange()
    if exchange is None or exchange.key is None or exchange.is_admin:
        return True
    return exchange.key.name == tenant


def _wire(found: timeline.RequestTimeline) -> RequestTimeline:
    return RequestTimeline(
        id=found.request_id,
        state=found.state,
        arrival=found.arrival,
        grammar_seconds=found.grammar_seconds,
        prompt_tokens=found.num_prompt_tokens,
        cached_tokens=TimelineCached(**found.cached._asdict()),
        waiting_before=found.num_waiting_before,
        waits=[
            TimelineWait(index=w.index, start=w.start, seconds=w.seconds, ended=w.ended, reasons=_seconds(w.reasons))
            for w in found.waits
        ],
        chunks=[
            TimelineChunk(index=c.index, start=c.start, seconds=c.seconds, tokens=c.num_tokens, resumes=c.resumes)
            for c in found.chunks
        ],
        preemptions=[TimelinePreemption(index=p.index, start=p.start, kind=p.kind) for p in found.preemptions],
        choices=[
            TimelineChoice(
                index=c.index,
                first_token=c.first_token,
                finished=c.finished,
                finish_reason=c.finish_reason,
                tokens=c.num_tokens,
            )
            for c in found.choices
        ],
        omitted=found.num_omitted,
    )


def _seconds(reasons: Mapping[timeline.WaitReason, float]) -> dict[str, float]:
    return {reason.value: seconds for reason, seconds in reasons.items()}
