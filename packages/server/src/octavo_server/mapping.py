"""Turns request bodies into the engine's requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from octavo_engine.api import EngineClient
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Parent
from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tool_use import ToolUse
from octavo_engine.types import Pooling, Request, SamplingParams
from octavo_engine.warming import warm_request
from octavo_server.beams import beam_search_params, check_beam_fields
from octavo_server.branches import branch_of
from octavo_server.config import MAX_CHOICES
from octavo_server.protocol.cache import CachePinBody, CacheWarmBody
from octavo_server.protocol.chat import ChatBody, template_messages
from octavo_server.protocol.completions import CompletionBody, Prompt
from octavo_server.protocol.embeddings import EmbeddingBody
from octavo_server.protocol.generate import GenerateBody
from octavo_server.protocol.generation import GenerationBody
from octavo_server.protocol.rerank import RerankBody, ScoreBody

_INLINE_CHARS = 8192
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
_PLAIN = (
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "xtc_probability",
    "xtc_threshold",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "truncate_prompt_tokens",
)

T = TypeVar("T")
_Params = SamplingParams | BeamSearchParams


def sampling_params(
    body: GenerationBody, text: TextProcessor, *, max_n: int, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Return the sampling parameters of a body; what it leaves out comes from the model's own defaults.

    Raises:
        InvalidRequest: if a value is out of range; names it.
    """
    n = body.n or 1
    if n > max_n:
        raise InvalidRequest(f"n must be between 1 and {max_n}, got {n}", param="n")
    chosen = {name: text.default_sampling[name] for name in _DEFAULTS if name in text.default_sampling}
    for name in (*_DEFAULTS, *_PLAIN):
        if (value := getattr(body, name)) is not None:
            chosen[name] = value
    if isinstance(body, CompletionBody):
        if body.best_of is not None and body.best_of > max_n:
            raise InvalidRequest(f"best_of must be between 1 and {max_n}, got {body.best_of}", param="best_of")
        chosen |= {"best_of": body.best_of, "prompt_logprobs": body.num_prompt_logprobs}
    return SamplingParams(
        n=n,
        stop=body.stop_strings,
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=body.biases,
        structured_outputs=body.constraint,
        **chosen,
    )


async def completion_requests(
    body: CompletionBody, engine: EngineClient, *, request_id: str, max_n: int, adapter: str | None = None
) -> list[Request]:
    """Return one request per prompt, or the one that goes on from its parent; `adapter` is what the model's name means.

    With `max_tokens` 0 their limit is 1: no token of theirs should be shown.

    Raises:
        InvalidRequest: if a prompt or a parameter cannot be served; PromptTooLong if the context is too small.
    """
    text = engine.text
    params = _params(body, text, max_n=max_n, max_tokens=max(body.num_new_tokens, 1), logprobs=body.logprobs)
    if (branch := await branch_of(body, engine)) is not None:
        token_ids, parent = branch
        return [await _request(body, text, token_ids, params, request_id, parent, adapter=adapter)]
    prompts = body.prompts
    _check_num_choices(len(prompts) * max(body.n or 1, body.best_of or 1), "prompt")
    encoded = await _encode_all(text, prompts) if not body.suffix else await _infill_all(text, prompts, body.suffix)
    return [
        await _request(
            body, text, ids, params, request_id if len(encoded) == 1 else f"{request_id}-{place}", adapter=adapter
        )
        for place, ids in enumerate(encoded)
    ]


async def chat_request(
    body: ChatBody, text: TextProcessor, *, request_id: str, max_n: int, adapter: str | None = None
) -> Request:
    """Return the request of a conversation; `adapter` is what the model's name means.

    Raises:
        InvalidRequest: if a message or a parameter cannot be served; PromptTooLong if the context is too small.
    """
    params = _params(body, text, max_n=max_n, max_tokens=body.num_new_tokens, logprobs=body.num_logprobs)
    use, field = body.tool_use, body.constraint_field
    if use is not None and (constraint := _constraint_of(use, params, text)) is not None:
        params, field = replace(params, structured_outputs=constraint), "tools"
    if text.answers.parses(use):
        params = text.showing_marks(params)
    token_ids = await chat_prompt(body, text)
    with _called("prompt", "messages"):
        return await _request(body, text, token_ids, params, request_id, constraint_field=field, adapter=adapter)


async def chat_prompt(body: ChatBody, text: TextProcessor) -> list[int]:
    """Lay a conversation out, with the functions that may be called; return its token ids.

    Raises:
        InvalidRequest: if a message or a function cannot be taken.
    """
    use = body.tool_use
    messages = body.template_messages
    continues = bool(body.continue_final_message)
    adds_prompt = not continues if body.add_generation_prompt is None else body.add_generation_prompt

    def encode() -> list[int]:
        return text.encode_chat(
            messages,
            add_generation_prompt=adds_prompt,
            continue_final_message=continues,
            template_kwargs=body.chat_template_kwargs,
            tools=None if use is None else use.definitions,
        )

    return await _off_loop_if_long(sum(len(str(message["content"])) for message in messages), encode)


def _constraint_of(use: ToolUse, params: _Params, text: TextProcessor) -> StructuredOutputsParams | None:
    """Return what `tool_choice` demands of an answer's text; a demanded call goes before any other format."""
    if use.choice == "auto" and params.structured_outputs is not None:
        raise InvalidRequest(
            "response_format and structured_outputs leave no room for calls; set tool_choice to none, required or a "
            "function, or leave the format out",
            param="tool_choice",
        )
    return use.constraint(text.answers.tools)


async def generate_request(
    body: GenerateBody, text: TextProcessor, *, request_id: str, stream: bool, max_n: int
) -> Request:
    """Return the request of a body in the form of text-generation-inference.

    Raises:
        InvalidRequest: if a parameter cannot be served; PromptTooLong if the context is too small.
    """
    options = body.options
    options.check(stream=stream, max_n=max_n)
    with _called("prompt", "inputs"), _called("structured_outputs", "parameters.grammar"):
        params = options.sampling(reports=stream or bool(options.details))
        (token_ids,) = await _encode_all(text, [body.inputs])

        def make() -> Request:
            return text.make_request(token_ids, params, request_id=request_id)

        return make() if params.structured_outputs is None else await asyncio.to_thread(make)


async def embedding_requests(
    body: EmbeddingBody, text: TextProcessor, *, request_id: str, adapter: str | None = None
) -> list[Request]:
    """Return one request per input; `adapter` is what the model's name means.

    Raises:
        InvalidRequest: if an input is empty, out of vocabulary or too long.
    """
    inputs = body.inputs
    _check_num_choices(len(inputs), "input")
    pooling: Pooling = body.pooling or "last"
    salt = (body.cache_salt or "").encode()
    with _called("prompt", "input"):
        return [
            text.make_request(
                ids,
                SamplingParams(),
                request_id=f"{request_id}-{place}",
                task="embed",
                pooling=pooling,
                salt=salt,
                adapter=adapter,
            )
            for place, ids in enumerate(await _encode_all(text, inputs))
        ]


async def scored_requests(
    body: RerankBody | ScoreBody,
    texts: Sequence[str],
    text: TextProcessor,
    *,
    request_id: str,
    adapter: str | None = None,
) -> list[Request]:
    """Return one request for each text whose embedding is compared; `adapter` is what the model's name means.

    Raises:
        InvalidRequest: if a text is too long.
    """
    sampling = SamplingParams(truncate_prompt_tokens=body.truncate_prompt_tokens)
    return [
        text.make_request(
            ids,
            sampling,
            request_id=f"{request_id}-{place}",
            task="embed",
            pooling=body.pooling or "last",
            priority=body.priority or 0,
            salt=(body.cache_salt or "").encode(),
            adapter=adapter,
        )
        for place, ids in enumerate(await _encode_all(text, texts))
    ]


async def warm_requests(
    body: CacheWarmBody | CachePinBody,
    text: TextProcessor,
    *,
    request_id: str,
    adapter: str | None = None,
    pin: bool = False,
) -> list[Request]:
    """Return one request per prompt, or one for messages, which are laid out without an assistant's turn.

    `adapter` is what the model's name means.

    Raises:
        InvalidRequest: if a prompt is empty, out of vocabulary or too long, or a message is wrong.
    """
    salt = (body.cache_salt or "").encode()
    if body.messages is None:
        prompts = body.prompts
        _check_num_choices(len(prompts), "prompt")
        encoded, field = await _encode_all(text, prompts), "prompt"
    else:
        messages = template_messages(body.messages)
        num_chars = sum(len(str(message["content"])) for message in messages)
        token_ids = await _off_loop_if_long(num_chars, lambda: text.encode_chat(messages, add_generation_prompt=False))
        encoded, field = [token_ids], "messages"
    ids = [request_id] if len(encoded) == 1 else [f"{request_id}-{place}" for place in range(len(encoded))]
    with _called("prompt", field):
        return [
            warm_request(text, token_ids, request_id=own, salt=salt, adapter=adapter, pin=pin)
            for own, token_ids in zip(ids, encoded, strict=True)
        ]


def _params(
    body: GenerationBody, text: TextProcessor, *, max_n: int, max_tokens: int | None, logprobs: int | None
) -> _Params:
    check_beam_fields(body)
    with _called("structured_outputs", body.constraint_field):
        if body.use_beam_search:
            return beam_search_params(body, text, max_n=max_n, max_tokens=max_tokens, logprobs=logprobs)
        return sampling_params(body, text, max_n=max_n, max_tokens=max_tokens, logprobs=logprobs)


async def _request(
    body: GenerationBody,
    text: TextProcessor,
    token_ids: list[int],
    params: _Params,
    request_id: str,
    parent: Parent | None = None,
    *,
    constraint_field: str | None = None,
    adapter: str | None = None,
) -> Request:
    def make() -> Request:
        return text.make_request(
            token_ids,
            params,
            request_id=request_id,
            priority=body.priority or 0,
            salt=(body.cache_salt or "").encode(),
            adapter=adapter,
            parent=parent,
            keep=bool(body.keep),
        )

    with _called("structured_outputs", constraint_field or body.constraint_field):
        # A grammar is compiled here, or the stop strings of a search, which may take a second; the event loop must not
        # wait for it.
        compiles = params.structured_outputs is not None or (isinstance(params, BeamSearchParams) and params.stop)
        return await asyncio.to_thread(make) if compiles else make()


def _check_num_choices(num_choices: int, param: str) -> None:
    if num_choices > MAX_CHOICES:
        raise InvalidRequest(
            f"a request may ask for {MAX_CHOICES} choices over all prompts, got {num_choices}; send several requests",
            param=param,
        )


@contextmanager
def _called(param: str, name: str) -> Generator[None, None, None]:
    """Let errors about a parameter of the engine name the field that holds it in this body."""
    try:
        yield
    except InvalidRequest as error:
        if error.param == param:
            error.param = name
        raise


async def _encode_all(text: TextProcessor, prompts: Sequence[Prompt]) -> list[list[int]]:
    num_chars = sum(len(prompt) for prompt in prompts)
    return await _off_loop_if_long(num_chars, lambda: [text.encode_prompt(prompt) for prompt in prompts])


async def _infill_all(text: TextProcessor, prompts: Sequence[Prompt], suffix: str) -> list[list[int]]:
    num_chars = sum(len(prompt) + len(suffix) for prompt in prompts)
    return await _off_loop_if_long(num_chars, lambda: [text.encode_infill(prompt, suffix) for prompt in prompts])


async def _off_loop_if_long(num_chars: int, encode: Callable[[], T]) -> T:
    """Encode in a thread if it takes long enough to hold up other requests; tokenizers release the GIL."""
    return encode() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(encode)
