"""Requests that compute a prompt for the prefix cache alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import Request, SequenceUpdate, WarmOutput


def warm_request(
    text: TextProcessor,
    prompt_token_ids: Sequence[int],
    *,
    request_id: str,
    salt: bytes = b"",
    adapter: str | None = None,
    pin: bool = False,
) -> Request:
    """Make a request that computes a prompt and draws no token: an embedding whose vector nobody wants.

    Args:
        text: knows the model's limits.
        prompt_token_ids: the prompt.
        request_id: also the id of the pin.
        salt: of the requests that may hit it.
        adapter: likewise.
        pin: whether it stays in the cache.

    Raises:
        PromptTooLong: the prompt does not fit the context.
    """
    request = text.make_request(
        prompt_token_ids, SamplingParams(), request_id=request_id, task="embed", salt=salt, adapter=adapter
    )
    return replace(request, pin=pin)


def warm_output(request: Request, update: SequenceUpdate, block_size: int) -> WarmOutput:
    """Return what has come of such a request by its last update."""
    prompt = request.prompt_token_ids
    num_warm_tokens = len(prompt) // block_size * block_size
    return WarmOutput(prompt_token_ids=prompt, cached=update.cached, num_warm_tokens=num_warm_tokens)
