"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import Request as EngineRequest
from octavo_server.chat_answers import ChatAnswer
from octavo_server.choices import Choice, Piece, pieces, whole
from octavo_server.generation import ChoiceDeltas, Generation, until_disconnect
from octavo_server.logprobs import TokenNames, chat_logprobs
from octavo_server.mapping import chat_request
from octavo_server.outlet import Outlet
from octavo_server.prompt_logprobs import listed
from octavo_server.protocol.body import read_body
from octavo_server.protocol.chat import ChatBody
from octavo_server.state import state_of
from octavo_server.streaming import ChunkWriter, EventStream, json_response

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, in one answer or as a stream of events."""
    state = state_of(request)
    body = await read_body(request, ChatBody)
    body.check()
    model = state.resolve_model(body.model)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    text = state.engine.text
    engine_request = await chat_request(
        body, text, request_id=completion_id, max_n=state.max_n, adapter=state.adapter_of(model)
    )
    state.engine.check_ready()
    head = {
        "id": completion_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    generation = Generation(state.engine, state.metrics, [engine_request], state.admission.enter(1))
    choices = [Choice(i, engine_request.sampling, text.tokenizer) for i in range(generation.num_choices)]
    answers = [_answer_of(body, engine_request, text) for _ in choices]
    names = TokenNames(text.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    if body.stream:
        writer = ChunkWriter(head, body.stream_options, generation.usage)
        prompt_ids = engine_request.prompt_token_ids if body.return_token_ids else None
        produce = partial(_stream, generation, choices, answers, writer, names, prompt_ids)
        return EventStream(produce, keep_alive=state.settings.keep_alive)
    ended = await until_disconnect(request, whole(generation, choices))
    shown = [_choice(piece, answers[piece.index], names) for piece in ended]
    extras: dict[str, Any] = {}
    if body.return_token_ids:
        extras["prompt_token_ids"] = engine_request.prompt_token_ids
        for choice, piece in zip(shown, ended, strict=True):
            choice["token_ids"] = piece.token_ids
    if body.prompt_logprobs is not None:
        extras["prompt_logprobs"] = listed(generation.prompt_logprobs[0], text.tokenizer, body.prompt_logprobs)
    return json_response(head | {"choices": shown, "usage": generation.usage()} | extras)


def _answer_of(body: ChatBody, request: EngineRequest, text: TextProcessor) -> ChatAnswer:
    use = body.tool_use
    parser = text.answer_parser(use, request.prompt_token_ids)
    return ChatAnswer(parser, names_call=use is not None and use.choice == "named")


async def _stream(
    generation: Generation,
    choices: list[Choice],
    answers: list[ChatAnswer],
    writer: ChunkWriter,
    names: TokenNames,
    prompt_token_ids: list[int] | None,
    outlet: Outlet,
) -> None:
    """Stream the choices; `prompt_token_ids` None means that token ids are not wanted."""

    def write(piece: Piece) -> None:
        if piece.begins:
            members = {} if prompt_token_ids is None or piece.index else {"prompt_token_ids": prompt_token_ids}
            outlet.write(writer.chunk(_chunk(piece.index, {"role": "assistant", "content": ""}), members))
        deltas, reason = answers[piece.index].deltas(piece)
        *before, last = deltas or [{}]
        logprobs = _logprobs(piece, names) if piece.text else None
        for delta in before:
            outlet.write(writer.chunk(_chunk(piece.index, delta)))
        if not last and reason is None and logprobs is None and prompt_token_ids is None:
            return  # the text is held back, for it may be the beginning of a mark
        chunk = _chunk(piece.index, last, logprobs, reason)
        outlet.write(writer.chunk(chunk if prompt_token_ids is None else chunk | {"token_ids": piece.token_ids}))

    def take(batch: ChoiceDeltas) -> None:
        for piece in pieces(choices, batch):
            write(piece)

    await generation.run(take)
    outlet.write(writer.end())


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _choice(piece: Piece, answer: ChatAnswer, names: TokenNames) -> dict[str, Any]:
    message, reason = answer.message(piece)
    return {"index": piece.index, "message": message, "logprobs": _logprobs(piece, names), "finish_reason": reason}


def _logprobs(piece: Piece, names: TokenNames) -> dict[str, Any] | None:
    return None if piece.entries is None else chat_logprobs(piece.entries, names)
