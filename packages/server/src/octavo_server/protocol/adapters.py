"""The bodies of POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from octavo_client.wire_adapters import LoadAdapterRequest, UnloadAdapterRequest
from octavo_server.protocol.body import BODY_CONFIG


class LoadAdapterBody(LoadAdapterRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG


class UnloadAdapterBody(UnloadAdapterRequest):
    """The wire's model; unknown fields are ignored, such as vLLM's `lora_int_id`."""

    model_config = BODY_CONFIG
