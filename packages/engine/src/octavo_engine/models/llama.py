"""Llama: the decoder of Llama 1 to 3, SmolLM2 and their kin (arXiv 2302.13971)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo_engine.layers.attention import Attention
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mixture import MixtureOfExperts
from octavo_engine.layers.mlp import FeedForward, GatedMLP
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.options import LayerOptions
from octavo_engine.layers.rotary import rope_table
from octavo_engine.models.config import ModelConfig
from octavo_engine.quant.base import WeightSlot
from octavo_engine.runner.model_input import ModelInput
from octavo_kvcache import KVCacheSpec


class LlamaLayer:
    """Attention and a feed-forward block, each behind a norm and beside a residual."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    mlp_name: ClassVar = "mlp."
    """What the names of the feed-forward block's tensors begin with, in the layer."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, *, options: LayerOptions) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options=options)
        self.attention = Attention(config, layer, cos_sin, options=options)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options=options)
        self.mlp = self.make_mlp(config, options)

    @staticmethod
    def make_mlp(config: ModelConfig, options: LayerOptions) -> FeedForward:
        """Make the feed-forward block."""
        return GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, options=options)

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """Yield the linears, each with what the checkpoint's names of its shards begin with."""
        yield from self.attention.linears(f"{prefix}self_attn.")
        yield from self.mlp.linears(f"{prefix}{self.mlp_name}")

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        self.attention.finish()
        self.mlp.finish()

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        yield from self.attention_norm.slots(f"{prefix}input_layernorm")
        yield from self.attention.slots(f"{prefix}self_attn.")
        yield from self.mlp_norm.slots(f"{prefix}post_attention_layernorm")
        yield from self.mlp.slots(f"{prefix}{self.mlp_name}")


class Llama:
    """Checkpoints of the architecture LlamaForCausalLM.

    Args:
        config: sizes and constants.
        options: how the weights are made; they are not initialised.
    """

    layer_class: type[LlamaLayer] = LlamaLayer
    _first_layer = 0

    def __init__(self, config: ModelConfig, options: LayerOptions) -> None:
        self.config = config
        cos_sin = rope_table(config.rope, config.head_dim, config.max_position_embeddings, options.device)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, options=options)
        self.layers = [self.layer_class(config, i, cos_sin, options=options) for i in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, options=options)
        self.head = LMHead(self.embedding, tied=config.tie_word_embeddings, options=options)
        self.num_parameters = sum(slot.num_parameters for slot in self.slots())

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states, after the final norm: [num_tokens, hidden_size]."""
        residual = self.embedding(model_input.token_ids)
        x = self.layers[0].attention_norm(residual)
        for layer, next_norm in zip(self.layers, self._next_norms(), strict=True):
            x = layer.mlp_norm.add(layer.attention(x, model_input), residual)
            x = next_norm.add(layer.mlp(x), residual)
        return x

    def _next_norms(self) -> Iterator[RMSNorm]:
        """Yield the norm that follows each layer's feed-forward block."""
        for layer in self.layers[1:]:
            yield layer.attention_norm
        yield self.norm

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the logits of hidden [rows, hidden_size]: [rows, vocab_size] fp32; see `Model.logits`."""
        return self.head(hidden, out)

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arg-max of the logits of hidden [rows, hidden_size], and its logit; see `Model.greedy`."""
        return self.head.greedy(hidden)

    def draw(self, hidden: Tensor, *, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Draw from the logits of hidden [rows, hidden_size]; see `Model.draw`."""
        return self.head.draw(hidden, out, **options)

    def kv_cache_specs(self, dtype: torch.dtype) -> list[KVCacheSpec]:
        """Say what each layer keeps per token.

        A sliding window is masked in attention; the blocks behind it are kept.
        """
        name = str(dtype).removeprefix("torch.")
        return [KVCacheSpec(self.config.num_kv_heads, self.config.head_dim, name) for _ in self.layers]

    def slots(self) -> Iterator[WeightSlot]:
        """Yield where each tensor of a checkpoint goes."""
        yield from self.embedding.slots("model.embed_tokens")
        for index, layer in enumerate(self.layers, self._first_layer):
            yield from layer.slots(f"model.layers.{index}.")
        yield from self.norm.slots("model.norm")
        yield from self.head.slots("lm_head")

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the linears of all layers; see `Model.linears`."""
        for index, layer in enumerate(self.layers, self._first_layer):
            yield from layer.linears(f"model.layers.{index}.")

    def ends(self) -> tuple[Embedding, LMHead]:
        """Return the first and the last matrix; see `Model.ends`."""
        return self.embedding, self.head

    def mixtures(self) -> Iterator[tuple[str, MixtureOfExperts]]:
        """Yield the mixtures of experts; see `Model.mixtures`."""
        for index, layer in enumerate(self.layers, self._first_layer):
            if isinstance(layer.mlp, MixtureOfExperts):
                yield f"model.layers.{index}.{layer.mlp_name}", layer.mlp

    def is_redundant(self, name: str) -> bool:
        """Return whether a checkpoint's tensor says nothing new: a tied head, a rotary table of old checkpoints."""
        return name.endswith("rotary_emb.inv_freq") or (self.head.tied and name == "lm_head.weight")

    def finish(self) -> None:
        """Prepare the filled weights for products; there are no slots to fill afterwards."""
        for layer in self.layers:
            layer.finish()
        self.embedding.finish()
        self.head.finish()
