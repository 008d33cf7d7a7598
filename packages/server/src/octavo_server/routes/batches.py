"""POST and GET /v1/batches, and what can be done with one of them."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_engine.errors import InvalidRequest
from octavo_server.durable import durable_of, not_found, owner_of
from octavo_server.protocol.batches import BatchBody
from octavo_server.protocol.body import read_body
from octavo_server.protocol.violations import summarise
from octavo_server.state import state_of
from octavo_server.store.batches import KEEP, StoredBatch
from octavo_server.store.paging import Page, list_of
from octavo_server.streaming import json_response

router = APIRouter()

_TIMES = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@router.post("/v1/batches")
async def create_batch(request: Request) -> Response:
    """Let the requests in a file be answered into another file."""
    durable, owner = durable_of(request), owner_of(request)
    body = await read_body(request, BatchBody)
    body.check()
    window = body.window_seconds
    file = await durable.store.files.get(body.input_file_id, owner)
    if file is None or file.purpose != "batch":
        raise InvalidRequest(
            f"input_file_id must be a file of purpose batch, got {summarise(body.input_file_id)}", param="input_file_id"
        )
    batch = _batch(body, model=state_of(request).model_names[0], created_at=int(time.time()))
    expires_at = batch["expires_at"] = batch["created_at"] + window
    await durable.store.batches.add(batch, owner, expires_at)
    stored = await _stored(request, batch["id"])
    durable.batches.start(stored)
    return json_response(stored.shown())


@router.get("/v1/batches")
async def list_batches(request: Request) -> Response:
    """List the caller's batches."""
    page = Page.of(request.query_params, limit=20, max_limit=100)
    batches, has_more = await durable_of(request).store.batches.part(owner_of(request), page)
    return json_response(list_of([batch.shown() for batch in batches], has_more=has_more))


@router.get("/v1/batches/{batch_id}")
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """Say how far a batch is."""
    return json_response((await _stored(request, batch_id)).shown())


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Cancel a batch; what has been answered will be in its output."""
    batch = await durable_of(request).batches.cancel(await _stored(request, batch_id))
    return json_response(batch.shown())


async def _stored(request: Request, batch_id: str) -> StoredBatch:
    batch = await durable_of(request).store.batches.get(batch_id, owner_of(request))
    if batch is None:
        raise not_found("batch", batch_id)
    return batch


def _batch(body: BatchBody, *, model: str, created_at: int) -> dict[str, Any]:
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": body.endpoint,
        "model": model,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": created_at,
        **{f"{name}_at": None for name in _TIMES},
        "metadata": body.metadata,
        "usage": None,
        KEEP: None if body.output_expires_after is None else body.output_expires_after.seconds,
    }
