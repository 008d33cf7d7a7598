"""The pydantic models of the routes that load and unload adapters (LoRA); the bodies are vLLM's."""

from typing import Literal

from pydantic import Field

from octavo_client.wire import _Answer, _Body

__all__ = ["Adapter", "AdapterUnloaded", "LoadAdapterRequest", "UnloadAdapterRequest"]


class LoadAdapterRequest(_Body):
    """The body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="The name that requests give as their model.")
    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="A folder that PEFT saved, inside the folder that the server allows; relative paths begin there.",
    )
    load_inplace: bool = Field(
        default=False,
        description="Whether it may take the place of an adapter of this name. Requests that run keep the old one.",
    )


class UnloadAdapterRequest(_Body):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="The name under which the adapter is served.")


class Adapter(_Answer):
    """The answer of POST /v1/load_lora_adapter: an adapter that is served."""

    id: str = Field(description="The name that requests give as their model.")
    object: Literal["adapter"] = "adapter"
    parent: str = Field(description="The name of the base model.")
    digest: str = Field(description="Hash of the adapter's files.")
    rank: int = Field(ge=0, description="The highest rank of its matrices.")
    bytes: int = Field(ge=0, description="Of its weights in the host's memory.")


class AdapterUnloaded(_Answer):
    """The answer of POST /v1/unload_lora_adapter."""

    id: str
    object: Literal["adapter.unloaded"] = "adapter.unloaded"
    unloaded: Literal[True] = True
