"""Prompts as offline callers write them, and what the engine makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.processor import TextProcessor


class TextPrompt(TypedDict):
    """A prompt that is text; cached prefixes are shared only with prompts of the same `cache_salt`."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt that is token ids already; `cache_salt` as for a `TextPrompt`."""

    prompt_token_ids: Sequence[int]
    cache_salt: NotRequired[str]


Prompt = str | TextPrompt | TokensPrompt


class EncodedPrompt(NamedTuple):
    """The token ids of a prompt, its text if it came as one, and its salt."""

    text: str | None
    token_ids: list[int]
    salt: bytes = b""


def encode_all(text: TextProcessor, prompts: Prompt | Sequence[Prompt]) -> list[EncodedPrompt]:
    """Encode one prompt or several.

    Raises:
        InvalidRequest: a prompt is of another form, empty, or out of vocabulary.
    """
    each: Sequence[Any] = [prompts] if isinstance(prompts, str | Mapping) else prompts
    return [_encode(text, prompt) for prompt in each]


def encode_salt(cache_salt: str | None) -> bytes:
    """Return a salt as the cache takes it; None is no salt.

    Raises:
        InvalidRequest: it is empty, or no text.
    """
    if cache_salt is None:
        return b""
    if not isinstance(cache_salt, str) or not cache_salt:
        raise InvalidRequest(
            f"cache_salt must be a text of at least one character, got {cache_salt!r}; leave it out for none",
            param="cache_salt",
        )
    return cache_salt.encode()


def _encode(text: TextProcessor, prompt: Any) -> EncodedPrompt:
    if isinstance(prompt, str):
        return EncodedPrompt(prompt, text.encode_prompt(prompt))
    if not isinstance(prompt, Mapping) or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
        raise InvalidRequest(
            f'a prompt must be a text, {{"prompt": ...}} or {{"prompt_token_ids": [...]}}, got {_excerpt(prompt)}',
            param="prompt",
        )
    salt = encode_salt(prompt.get("cache_salt"))
    if "prompt" in prompt:
        return EncodedPrompt(prompt["prompt"], text.encode_prompt(prompt["prompt"]), salt)
    return EncodedPrompt(None, text.encode_prompt(prompt["prompt_token_ids"]), salt)


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
