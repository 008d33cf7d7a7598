"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire import DetokenizeResponse, TokenizeResponse
from octavo_engine.errors import InvalidRequest
from octavo_engine.text.processor import TextProcessor
from octavo_server.logprobs import token_label
from octavo_server.mapping import chat_prompt
from octavo_server.protocol.body import read_body
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.tokens import DetokenizeBody, TokenizeBody
from octavo_server.state import state_of
from octavo_server.streaming import json_response

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of messages in the model's chat template."""
    state = state_of(request)
    body = await read_body(request, TokenizeBody)
    body.check()
    state.resolve_model(body.model)
    text = state.engine.text
    token_ids = await _token_ids(body, text)
    labels = [token_label(text.tokenizer, token_id) for token_id in token_ids] if body.return_token_strs else None
    answer = TokenizeResponse(
        count=len(token_ids),
        max_model_len=state.engine.info.max_model_len,
        tokens=token_ids,
        token_strs=labels,
    )
    return json_response(answer.model_dump(exclude_none=True))


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Return the text of token ids, special tokens included."""
    state = state_of(request)
    body = await read_body(request, DetokenizeBody)
    state.resolve_model(body.model)
    text = state.engine.text
    for place, token_id in enumerate(body.tokens):
        if token_id >= text.vocab_size:
            raise InvalidRequest(
                f"tokens[{place}] is out of vocabulary: ids go from 0 to {text.vocab_size - 1}, got {token_id}",
                param=f"tokens[{place}]",
            )
    prompt = text.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response(DetokenizeResponse(prompt=prompt).model_dump())


async def _token_ids(body: TokenizeBody, text: TextProcessor) -> list[int]:
    if body.messages is None:
        adds = body.add_special_tokens is not False
        return list(text.tokenizer.encode(body.prompt or "", add_special_tokens=adds))
    if body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens goes with prompt: a chat template writes special tokens itself; leave it out",
            param="add_special_tokens",
        )
    names = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    return await chat_prompt(ChatBody.model_validate({name: getattr(body, name) for name in names}), text)
