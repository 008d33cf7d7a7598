"""The pydantic models of the routes that put an engine to sleep, wake it, and give it other weights."""

from typing import Literal, TypeAlias

from pydantic import Field

from octavo_client.wire import _Answer, _Body

__all__ = [
    "MemoryReport",
    "PrefixCacheReset",
    "SleepLevel",
    "SleepMode",
    "SleepState",
    "SleepTag",
    "UpdateWeightsRequest",
]

SleepLevel: TypeAlias = Literal[1, 2]
"""1: the same model is served again, so files that changed meanwhile are refused. 2: the weights are given up."""

SleepMode: TypeAlias = Literal["wait", "abort"]
"""What becomes of requests that run: they are waited for, or ended."""

SleepTag: TypeAlias = Literal["weights", "kv_cache"]
"""A part of what leaves memory."""


class SleepState(_Answer):
    """The answer of GET /is_sleeping."""

    is_sleeping: bool = Field(description="Whether requests are refused until the engine is woken.")
    level: int = Field(ge=0, le=2, description="How deep it sleeps; 0 is awake.")


class MemoryReport(_Answer):
    """The answer of POST /sleep, /wake_up and /update_weights_from_disk: what it did to the memory in use."""

    object: Literal["engine.memory"] = "engine.memory"
    sleep_level: int = Field(ge=0, le=2, description="How deep the engine sleeps now; 0 is awake.")
    weights_digest: str = Field(description="Hash of the model's files that are served, or were before the sleep.")
    bytes_before: int | None = Field(
        default=None,
        description="Memory in use before, as the system counts it: resident pages, or what a GPU's driver gave out.",
    )
    bytes_after: int | None = Field(default=None, description="The same afterwards.")
    freed_bytes: int | None = Field(
        default=None, description="The difference; negative if memory was taken. Null where the system does not tell."
    )
    seconds: float = Field(ge=0, description="What it took.")


class UpdateWeightsRequest(_Body):
    """The body of POST /update_weights_from_disk."""

    model_path: str = Field(
        min_length=1, max_length=4096, description="A GGUF file, a folder in Hugging Face layout, or a hub id."
    )
    mode: SleepMode | None = Field(
        default=None, description="What becomes of requests that run. Default: while there are any, 409."
    )


class PrefixCacheReset(_Answer):
    """The answer of POST /reset_prefix_cache."""

    object: Literal["prefix_cache.reset"] = "prefix_cache.reset"
    reset: Literal[True] = True
