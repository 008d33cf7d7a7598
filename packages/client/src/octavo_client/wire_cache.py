"""The pydantic models of the prefix cache's routes: prompts to warm or pin, and what has come of them."""

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from octavo_client.wire import TokenId, _Answer, _Body

__all__ = [
    "CachePin",
    "CachePinDeleted",
    "CachePinList",
    "CachePinRequest",
    "CacheWarmRequest",
    "CacheWarmResponse",
    "WarmedPrompt",
]


class _CacheRequest(_Body):
    """A prompt, or chat messages that the model's template lays out, for the prefix cache.

    Raises:
        pydantic.ValidationError: not exactly one of `prompt` and `messages` is given.
    """

    model: str | None = Field(default=None, description="The model whose cache is meant. Default: the only one.")
    messages: list[dict[str, JsonValue]] | None = Field(
        default=None,
        min_length=1,
        description="Chat messages in OpenAI's form, laid out as the beginning of a chat: without an assistant's turn.",
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="For requests of the same salt. Default: for those without one.",
    )

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        prompt = getattr(self, "prompt", None)
        if (prompt is None) == (self.messages is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"exactly one of prompt and messages was expected, {given} came; leave one out")
        return self


class CacheWarmRequest(_CacheRequest):
    """The body of POST /v1/cache/warm: compute prompts into the prefix cache, and generate nothing."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = Field(
        default=None, description="One prompt or several, as texts or token ids."
    )


class CachePinRequest(_CacheRequest):
    """The body of POST /v1/cache/pins: compute a prompt into the prefix cache, and keep it there."""

    prompt: str | list[TokenId] | None = Field(default=None, description="A prompt, as text or token ids.")


class WarmedPrompt(_Answer):
    """What has come of one prompt."""

    object: Literal["cache.warmed_prompt"] = "cache.warmed_prompt"
    index: int = Field(ge=0, description="Which of the prompts.")
    prompt_tokens: int = Field(ge=1, description="Its tokens.")
    cached_tokens: int = Field(ge=0, description="Those of them that were cached before.")
    warm_tokens: int = Field(
        ge=0, description="Those of full blocks, which prompts that go on from here need not compute."
    )


class CacheWarmResponse(_Answer):
    """The answer of POST /v1/cache/warm."""

    object: Literal["list"] = "list"
    data: list[WarmedPrompt] = Field(description="One for each prompt, in their order.")
    model: str = Field(description="The model in whose cache they are.")


class CachePin(_Answer):
    """A prefix that stays in the cache."""

    id: str = Field(description="What to unpin it by.")
    object: Literal["cache.pin"] = "cache.pin"
    pinned_tokens: int = Field(ge=1, description="Tokens of the prompt that are held: those of its full blocks.")
    blocks: int = Field(ge=1, description="Blocks that hold them.")


class CachePinList(_Answer):
    """The answer of GET /v1/cache/pins: the pins of one salt, or of none."""

    object: Literal["list"] = "list"
    data: list[CachePin] = Field(description="Oldest first.")


class CachePinDeleted(_Answer):
    """The answer of DELETE /v1/cache/pins/{id}."""

    id: str
    object: Literal["cache.pin.deleted"] = "cache.pin.deleted"
    deleted: Literal[True] = True
