"""MIXTRAL_DEFAULTS: what a Mixtral's config.json means by leaving a key out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

MIXTRAL_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "max_position_embeddings": 1 << 17,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
)
"""By key, where it is another value than a Llama's, or one that a Llama does not have."""
