"""Mixtral: Llama's decoder with a mixture of experts in place of each feed-forward block (arXiv 2401.04088)."""

from __future__ import annotations

from typing import ClassVar

from octavo_engine.layers.mixture import MixtureOfExperts
from octavo_engine.layers.mlp import FeedForward
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama, LlamaLayer


class MixtralLayer(LlamaLayer):
    """Attention and a mixture of experts, each behind a norm and beside a residual."""

    __slots__ = ()

    mlp_name: ClassVar = "block_sparse_moe."

    @staticmethod
    def make_mlp(config: ModelConfig, options: LayerOptions) -> FeedForward:
        """Make the mixture, with the experts that this process has."""
        return MixtureOfExperts(
            config.hidden_size,
            config.intermediate_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_token,
            own=config.own_experts,
            options=options,
        )


class Mixtral(Llama):
    """Checkpoints of the architecture MixtralForCausalLM; see `Llama`."""

    layer_class: type[LlamaLayer] = MixtralLayer
