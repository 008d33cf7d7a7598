"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import Request as EngineRequest
from octavo_server.choices import Choice, Piece, pieces, whole
from octavo_server.generation import ChoiceDeltas, Generation, until_disconnect
from octavo_server.logprobs import TokenNames, completion_logprobs
from octavo_server.mapping import completion_requests
from octavo_server.outlet import Outlet
from octavo_server.prompt_logprobs import echo_logprobs, listed
from octavo_server.protocol.body import read_body
from octavo_server.protocol.completions import CompletionBody
from octavo_server.state import state_of
from octavo_server.streaming import ChunkWriter, EventStream, json_response

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Complete prompts, in one answer or as a stream of events."""
    state = state_of(request)
    body = await read_body(request, CompletionBody)
    body.check()
    model = state.resolve_model(body.model)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    text = state.engine.text
    requests = await completion_requests(
        body, state.engine, request_id=completion_id, max_n=state.max_n, adapter=state.adapter_of(model)
    )
    state.engine.check_ready()
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    generation = Generation(
        state.engine,
        state.metrics,
        requests,
        state.admission.enter(len(requests)),
        prompt_only=body.num_new_tokens == 0,
    )
    answer = _Answer(body, generation, requests, _echoes(body, requests, text), text.tokenizer)
    if body.stream:
        writer = ChunkWriter(head, body.stream_options, generation.usage)
        return EventStream(partial(answer.stream, writer), keep_alive=state.settings.keep_alive)
    choices = await until_disconnect(request, answer.whole())
    return json_response(head | {"choices": choices, "usage": generation.usage()})


class _Answer:
    """The choices of one completion, each with the prompt that it echoes (empty if it does not)."""

    def __init__(
        self,
        body: CompletionBody,
        generation: Generation,
        requests: list[EngineRequest],
        echoes: list[str],
        tokenizer: Tokenizer,
    ) -> None:
        self._body = body
        self._generation = generation
        self._requests = requests
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._n = n = requests[0].sampling.n
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._choices = [
            Choice(index, requests[index // n].sampling, tokenizer) for index in range(generation.num_choices)
        ]

    async def whole(self) -> list[dict[str, Any]]:
        return [self._whole_choice(piece) for piece in await whole(self._generation, self._choices)]

    async def stream(self, writer: ChunkWriter, outlet: Outlet) -> None:
        def take(batch: ChoiceDeltas) -> None:
            for piece in pieces(self._choices, batch):
                echo = self._echoes[piece.index]
                if piece.begins and (echo or self._body.return_token_ids):
                    outlet.write(writer.chunk(self._beginning(piece.index)))
                outlet.write(writer.chunk(self._choice(piece, start=len(echo))))

        await self._generation.run(take)
        outlet.write(writer.end())

    def _beginning(self, index: int) -> dict[str, Any]:
        """Return what stands in a stream before the text of a choice: the prompt."""
        echo = self._echoes[index]
        choice = self._choice(Piece(index, echo, None, None))
        return choice | {"logprobs": self._echo_logprobs(index)} | self._prompt_ids(index)

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        place, echo = piece.index // self._n, self._echoes[piece.index]
        choice = self._choice(piece, start=len(echo)) | self._prompt_ids(piece.index)
        choice["text"] = echo + choice["text"]
        if (prompt := self._echo_logprobs(piece.index)) is not None:
            choice["logprobs"] = {name: prompt[name] + values for name, values in choice["logprobs"].items()}
        if self._body.prompt_logprobs is not None:
            of_prompt = self._generation.prompt_logprobs[place]
            choice["prompt_logprobs"] = listed(of_prompt, self._tokenizer, self._body.prompt_logprobs)
        return choice

    def _choice(self, piece: Piece, start: int = 0) -> dict[str, Any]:
        """Return a piece on the wire; its choice's own text begins at `start`."""
        logprobs = None
        if piece.entries is not None:
            logprobs = completion_logprobs(piece.entries, self._names, start)
        choice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        return choice | {"token_ids": piece.token_ids} if self._body.return_token_ids else choice

    def _echo_logprobs(self, index: int) -> dict[str, Any] | None:
        """Return the log-probabilities of an echoed prompt; None if they are not wanted."""
        if not self._body.echo or self._body.logprobs is None:
            return None
        place = index // self._n
        token_ids, logprobs = self._requests[place].prompt_token_ids, self._generation.prompt_logprobs[place]
        return echo_logprobs(self._echoes[index], token_ids, logprobs, self._names, self._body.logprobs)

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": self._requests[index // self._n].prompt_token_ids}


def _echoes(body: CompletionBody, requests: list[EngineRequest], text: TextProcessor) -> list[str]:
    """Return each prompt as text; a truncated one as what is left of it."""
    if not body.echo:
        return [""] * len(requests)
    return [
        prompt
        if isinstance(prompt, str) and body.truncate_prompt_tokens is None
        else text.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=request.sampling.skip_special_tokens)
        for prompt, request in zip(body.prompts, requests, strict=True)
    ]
