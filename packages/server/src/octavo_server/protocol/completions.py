"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.generation import MAX_INT32, MAX_LOGPROBS, GenerationBody
from octavo_server.protocol.schemas import PromptField
from octavo_server.protocol.violations import summarise

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]

_OF_CHATS = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class CompletionBody(GenerationBody):
    """OpenAI's fields of a text completion, and Octavo's extras."""

    prompt: PromptField = None
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(default=None, ge=1)

    def check(self) -> None:
        super().check()
        for name in _OF_CHATS:
            if getattr(self, name):
                raise InvalidRequest(f"{name} goes with chats, whose prompt a template makes", param=name)
        if self.suffix:
            for name in ("echo", "parent_id"):
                if getattr(self, name):
                    raise InvalidRequest(f"{name} does not go with suffix; leave one of them out", param=name)
        if self.ranks and self.stream and not self.use_beam_search:
            raise InvalidRequest(
                "the best of several samples are known at the end alone; set stream false, or leave best_of out",
                param="best_of",
            )
        if self.echo and self.logprobs is not None and self.use_beam_search:
            raise InvalidRequest("echo together with logprobs does not go with use_beam_search; leave one out",
                                 param="echo")  # fmt: skip

    @property
    def ranks(self) -> bool:
        """Whether more samples run than are returned."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives asked for at each token of the prompt; None if no log-probabilities of it are wanted."""
        of_echo = self.logprobs if self.echo else None
        wanted = [count for count in (self.prompt_logprobs, of_echo) if count is not None]
        return max(wanted, default=None)

    @property
    def num_new_tokens(self) -> int:
        """The most tokens to generate; OpenAI's default is 16."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts in any of OpenAI's four forms: a string, strings, token ids, or lists of token ids.

        Before a suffix there may be nothing.

        Raises:
            InvalidRequest: if it is none of these, or nothing.
        """
        if self.suffix and self.prompt in (None, ""):
            return [""]
        return parse_prompts(self.prompt, name="prompt")


def parse_prompts(value: Any, *, name: str) -> list[Prompt]:
    """Return a field of OpenAI's four prompt forms as a list of prompts; token ids are not checked further.

    Raises:
        InvalidRequest: names the field or its item that is wrong.
    """
    if value is None:
        raise InvalidRequest(f"{name} is required", param=name)
    if value in ("", []):
        raise InvalidRequest(f"{name} is empty; give at least one token", param=name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(
            f"{name} must be a string, strings, token ids or lists of token ids, got {summarise(value)}", param=name
        )
    if _is_token_ids(value):
        return [value]
    for place, item in enumerate(value):
        where = f"{name}[{place}]"
        if item in ("", []):
            raise InvalidRequest(f"{where} is empty; give at least one token", param=where)
        if not isinstance(item, str) and not _is_token_ids(item):
            raise InvalidRequest(f"{where} must be a string or a list of token ids, got {summarise(item)}", param=where)
    if len({type(item) for item in value}) > 1:
        raise InvalidRequest(f"{name} must hold strings or lists of token ids, not both", param=name)
    return value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
