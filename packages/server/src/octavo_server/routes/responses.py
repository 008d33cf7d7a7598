"""POST /v1/responses, and what can be done with a response that is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_engine.errors import InvalidRequest
from octavo_server.admission import Ticket
from octavo_server.durable import durable_of, not_found, owner_of
from octavo_server.errors import ApiError
from octavo_server.generation import until_disconnect
from octavo_server.message_blocks import sse
from octavo_server.protocol.body import read_body
from octavo_server.protocol.responses import ResponsesBody
from octavo_server.protocol.violations import summarise
from octavo_server.response_request import count_tokens, read_items, response_request
from octavo_server.response_run import ResponseRun
from octavo_server.state import state_of
from octavo_server.store.paging import Page, list_of
from octavo_server.store.responses import StoredResponse
from octavo_server.streaming import EventStream, drawn_from, json_response

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Make a response: in one answer, as a stream of typed events, or in the background."""
    state, durable, owner = state_of(request), durable_of(request), owner_of(request)
    body = await read_body(request, ResponsesBody)
    body.check()
    model = state.resolve_model(body.model)
    responses = durable.store.responses
    earlier, own = await read_items(body, responses, owner)
    response_id = f"resp_{uuid.uuid4().hex}"
    chat, engine_request = await response_request(
        body, earlier + own, state.engine.text, request_id=response_id, adapter=state.adapter_of(model)
    )
    state.engine.check_ready()
    response = body.response(response_id, model=model, created_at=int(time.time()))
    run = ResponseRun(state, responses if body.stores else None, response, chat, engine_request)
    if body.background:
        durable.responses.check_room()
        asked = body.model_dump(mode="json", exclude_unset=True, by_alias=True)
        await responses.add(StoredResponse(response, owner, True, bool(body.stream), 0, asked), own)
        await durable.responses.start(run, owner, streams=bool(body.stream))
        return _stream(request, durable.responses.follow(response_id, -1)) if body.stream else json_response(response)
    ticket = state.admission.enter(1)
    if body.stores:
        await responses.add(StoredResponse(response, owner, False, False, 0, None), own)
    if body.stream:
        return _stream(request, _events(run, ticket))
    await until_disconnect(request, _whole(run, ticket))
    if run.error is not None:
        raise run.error
    return json_response(run.response)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    """Say how many tokens a response's request has as a prompt."""
    state = state_of(request)
    body = await read_body(request, ResponsesBody)
    state.resolve_model(body.model)
    earlier, own = await read_items(body, durable_of(request).store.responses, owner_of(request))
    num_tokens = await count_tokens(body, earlier + own, state.engine.text)
    return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})


@router.get("/v1/responses/{response_id}")
async def retrieve_response(request: Request, response_id: str) -> Response:
    """Return a stored response, or the events of one that is streamed in the background, from any of them on."""
    stored = await _stored(request, response_id)
    if request.query_params.get("stream") != "true":
        return json_response(stored.response)
    if not stored.streams:
        raise InvalidRequest(
            "only a response that was created with background and stream true can be streamed again; retrieve it"
            " without stream",
            param="stream",
        )
    after = request.query_params.get("starting_after", "-1")
    if not after.removeprefix("-").isdecimal() or len(after) > 9:
        raise InvalidRequest(
            f"starting_after must be an event's number, got {summarise(after)}", param="starting_after"
        )
    return _stream(request, durable_of(request).responses.follow(response_id, int(after)))


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> Response:
    """Delete a stored response; one at work is cancelled."""
    durable = durable_of(request)
    await _stored(request, response_id)
    await durable.responses.cancel(response_id)
    await durable.store.responses.delete(response_id, owner_of(request))
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    """Cancel a response in the background; one that has ended stays what it is."""
    stored = await _stored(request, response_id)
    if not stored.background:
        raise InvalidRequest(
            "only a response that was created with background true can be cancelled; close the connection of another",
            param="response_id",
        )
    await durable_of(request).responses.cancel(response_id)
    return json_response((await _stored(request, response_id)).response)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str) -> Response:
    """List what a response was made from, the turns before it too."""
    page = Page.of(request.query_params, limit=20, max_limit=100)
    await _stored(request, response_id)
    items = await durable_of(request).store.responses.inputs(response_id, owner_of(request))
    part, has_more = page.part(items)
    return json_response(list_of(part, has_more=has_more))


async def _stored(request: Request, response_id: str) -> StoredResponse:
    stored = await durable_of(request).store.responses.get(response_id, owner_of(request))
    if stored is None:
        raise not_found("response", response_id)
    return stored


def _stream(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    return EventStream(drawn_from(events), keep_alive=state_of(request).settings.keep_alive, error_event=_error_event)


async def _events(run: ResponseRun, ticket: Ticket) -> AsyncGenerator[bytes, None]:
    """Make a response for a client who waits for it; one who leaves has cancelled it."""
    try:
        for _, event in run.created():
            yield event
        async with aclosing(run.events(ticket)) as events:
            async for _, event in events:
                yield event
    finally:
        if not run.has_ended:
            await run.end("cancelled")


async def _whole(run: ResponseRun, ticket: Ticket) -> None:
    async with aclosing(_events(run, ticket)) as events:
        async for _ in events:
            pass


def _error_event(error: ApiError) -> bytes:
    members: dict[str, Any] = {"code": error.code, "message": error.message, "param": error.param}
    return sse("error", sequence_number=0, **members)
