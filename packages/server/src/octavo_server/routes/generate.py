"""POST /generate, /generate_stream and /, GET /info: the interface of text-generation-inference."""

from __future__ import annotations

import uuid
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_engine.types import Request as EngineRequest
from octavo_server.errors import ApiError
from octavo_server.generation import ChoiceDeltas, Generation, until_disconnect
from octavo_server.mapping import generate_request
from octavo_server.outlet import Outlet
from octavo_server.protocol.body import read_body
from octavo_server.protocol.generate import GenerateBody
from octavo_server.protocol.generation import MAX_STOP_STRINGS
from octavo_server.state import ServerState, state_of
from octavo_server.streaming import EventStream, json_response
from octavo_server.tgi import GeneratedText, event, prefill_of

router = APIRouter()


@router.post("/generate")
async def generate(request: Request) -> Response:
    """Go on from a text, in one answer."""
    state, body = state_of(request), await read_body(request, GenerateBody)
    return json_response(await until_disconnect(request, _whole(*await _begin(state, body, stream=False))))


@router.post("/generate_stream")
async def generate_stream(request: Request) -> Response:
    """Go on from a text, with an event for each token."""
    state, body = state_of(request), await read_body(request, GenerateBody)
    return _stream(state, *await _begin(state, body, stream=True))


@router.post("/")
async def generate_either_way(request: Request) -> Response:
    """Do as `stream` in the body says; a whole answer is a list of one, as TGI has it here."""
    state, body = state_of(request), await read_body(request, GenerateBody)
    if body.stream:
        return _stream(state, *await _begin(state, body, stream=True))
    return json_response([await until_disconnect(request, _whole(*await _begin(state, body, stream=False)))])


@router.get("/info")
async def info(request: Request) -> Response:
    """Describe the model and the limits under TGI's names."""
    state = state_of(request)
    own = state.engine.info
    return json_response(
        {
            "model_id": state.model_names[0],
            "model_sha": own.weights_digest or None,
            "model_dtype": f"torch.{own.dtype}",
            "model_device_type": own.device.partition(":")[0],
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": state.settings.max_num_requests,
            "max_best_of": state.max_n,
            "max_stop_sequences": MAX_STOP_STRINGS,
            "max_input_length": own.max_model_len - 1,
            "max_input_tokens": own.max_model_len - 1,
            "max_total_tokens": own.max_model_len,
            "max_batch_total_tokens": (own.num_blocks - 1) * own.block_size,
            "max_batch_size": own.max_num_seqs,
            "version": version("octavo-server"),
            "router": "octavo",
        }
    )


async def _begin(
    state: ServerState, body: GenerateBody, *, stream: bool
) -> tuple[GenerateBody, EngineRequest, Generation, list[GeneratedText]]:
    request_id = f"gen-{uuid.uuid4().hex}"
    text = state.engine.text
    request = await generate_request(body, text, request_id=request_id, stream=stream, max_n=state.max_n)
    state.engine.check_ready()
    generation = Generation(state.engine, state.metrics, [request], state.admission.enter(1))
    return body, request, generation, [GeneratedText(body, request, text.tokenizer) for _ in range(request.sampling.n)]


async def _whole(
    body: GenerateBody, request: EngineRequest, generation: Generation, texts: list[GeneratedText]
) -> dict[str, Any]:
    def take(batch: ChoiceDeltas) -> None:
        for index, delta in batch:
            texts[index].push(delta)

    await generation.run(take)
    best, *others = sorted(texts, key=lambda text: -text.logprob_sum)
    answer: dict[str, Any] = {"generated_text": best.text}
    if body.options.details:
        prefill = []
        if body.options.decoder_input_details:
            prefill = prefill_of(request.prompt_token_ids, generation.prompt_logprobs[0], best.tokenizer)
        answer["details"] = best.details(prefill)
        if others:
            answer["details"]["best_of_sequences"] = [
                {"generated_text": text.text} | text.details(prefill) for text in others
            ]
    return answer


def _stream(
    state: ServerState, body: GenerateBody, request: EngineRequest, generation: Generation, texts: list[GeneratedText]
) -> EventStream:
    produce = partial(_write, body, len(request.prompt_token_ids), generation, texts[0])
    return EventStream(produce, keep_alive=state.settings.keep_alive, error_event=_error_event)


async def _write(
    body: GenerateBody, num_prompt_tokens: int, generation: Generation, text: GeneratedText, outlet: Outlet
) -> None:
    def take(batch: ChoiceDeltas) -> None:
        for _, delta in batch:
            num_sent = len(text.tokens)
            text.push(delta)
            for place in range(num_sent, len(text.tokens)):
                ends = delta.finish_reason is not None and place + 1 == len(text.tokens)
                tops = {"top_tokens": text.top_tokens[place]} if text.top_tokens else {}
                shown: dict[str, Any] = {"generated_text": None, "details": None}
                if ends:
                    shown["generated_text"] = text.text
                if ends and body.options.details:
                    shown["details"] = text.ending() | {"input_length": num_prompt_tokens}
                outlet.write(event({"index": place + 1, "token": text.tokens[place]} | tops | shown))

    await generation.run(take)


def _error_event(error: ApiError) -> bytes:
    return event(error.tgi_body())
