"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_server.choices import Choice, pieces, whole
from octavo_server.errors import ApiError
from octavo_server.generation import ChoiceDeltas, Generation, until_disconnect
from octavo_server.mapping import chat_prompt, chat_request
from octavo_server.message_blocks import Blocks, sse
from octavo_server.outlet import Outlet
from octavo_server.protocol.body import read_body
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.messages import CountBody, MessagesBody
from octavo_server.state import state_of
from octavo_server.streaming import EventStream, json_response

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    """Answer a conversation, in one answer or as a stream of named events."""
    state = state_of(request)
    chat = (await read_body(request, MessagesBody)).chat()
    model = state.resolve_model(chat.model)
    message_id = f"msg_{uuid.uuid4().hex}"
    text = state.engine.text
    engine_request = await chat_request(chat, text, request_id=message_id, max_n=1, adapter=state.adapter_of(model))
    state.engine.check_ready()
    generation = Generation(state.engine, state.metrics, [engine_request], state.admission.enter(1))
    choice = Choice(0, engine_request.sampling, text.tokenizer)
    blocks = Blocks(text.answer_parser(chat.tool_use, engine_request.prompt_token_ids))
    head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
    if chat.stream:
        produce = partial(_stream, head, generation, choice, blocks)
        return EventStream(produce, keep_alive=state.settings.keep_alive, error_event=_error_event)
    (piece,) = await until_disconnect(request, whole(generation, [choice]))
    list(blocks.push(piece))
    return json_response(_message(head, blocks, generation))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """Say how many tokens a conversation has as a prompt."""
    state = state_of(request)
    body = await read_body(request, CountBody)
    chat = ChatBody.model_validate(body.conversation())
    state.resolve_model(chat.model)
    return json_response({"input_tokens": len(await chat_prompt(chat, state.engine.text))})


async def _stream(head: dict[str, Any], generation: Generation, choice: Choice, blocks: Blocks, outlet: Outlet) -> None:
    def take(batch: ChoiceDeltas) -> None:
        for piece in pieces([choice], batch):
            for event in blocks.push(piece):
                outlet.write(event)

    outlet.write(sse("message_start", message=_message(head, blocks, generation)))
    await generation.run(take)
    delta = {"stop_reason": blocks.stop_reason, "stop_sequence": blocks.stop_sequence}
    outlet.write(sse("message_delta", delta=delta, usage=_usage(generation)) + sse("message_stop"))


def _message(head: dict[str, Any], blocks: Blocks, generation: Generation) -> dict[str, Any]:
    ended = {"stop_reason": blocks.stop_reason, "stop_sequence": blocks.stop_sequence}
    return head | {"content": blocks.content} | ended | {"usage": _usage(generation)}


def _usage(generation: Generation) -> dict[str, int]:
    """Return the tokens so far; those from the cache are counted apart, as Anthropic does."""
    usage = generation.usage()
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": usage["completion_tokens"],
    }


def _error_event(error: ApiError) -> bytes:
    return sse("error", **error.message_body())
