"""PlainDecoder: a Llama's forward pass over whole sequences in plain torch, which gradients lead back through."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.layers.rotary import rope_table
from octavo_engine.models.config import ModelConfig


class PlainDecoder:
    """The layers of `models.llama.Llama` for training, without a KV cache.

    Args:
        config: sizes and constants; no mixture of experts.
        weights: by the checkpoint's names, in the dtype of their products; it is read at each call, and gradients flow
            to those that want some. Norms and the embedding are fp32.

    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self._config = config
        self._weights = weights
        self._cos_sin = rope_table(config.rope, config.head_dim, config.max_position_embeddings)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the last hidden states, after the final norm: [rows, length, hidden_size] fp32.

        Args:
            token_ids: [rows, length] int64, sequences from position 0 on.

        """
        x = F.embedding(token_ids, self._weights["model.embed_tokens.weight"])
        mask = self._window_mask(token_ids.shape[1])
        for index in range(self._config.num_layers):
            layer = f"model.layers.{index}."
            x = x + self._attention(f"{layer}self_attn.", self._norm(f"{layer}input_layernorm", x), mask)
            x = x + self._mlp(f"{layer}mlp.", self._norm(f"{layer}post_attention_layernorm", x))
        return self._norm("model.norm", x)

    def head(self) -> Tensor:
        """Return the weight of the head: [vocab_size, hidden_size]."""
        tied = self._config.tie_word_embeddings
        return self._weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._config.rms_norm_eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    def _attention(self, prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            self._linear(f"{prefix}{name}_proj", x).view(rows, length, -1, self._config.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        shared = self._config.num_heads // self._config.num_kv_heads
        k, v = self._turned(k).repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        out = F.scaled_dot_product_attention(self._turned(q), k, v, attn_mask=mask, is_causal=mask is None)
        return self._linear(f"{prefix}o_proj", out.transpose(1, 2).reshape(rows, length, -1)).float()

    def _turned(self, x: Tensor) -> Tensor:
        """Rotate q or k [rows, heads, length, head_dim] by its positions."""
        cos, sin = self._cos_sin[: x.shape[2]].chunk(2, dim=-1)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._linear(f"{prefix}gate_proj", x), self._linear(f"{prefix}up_proj", x)
        return self._linear(f"{prefix}down_proj", F.silu(gate) * up).float()

    def _window_mask(self, length: int) -> Tensor | None:
        """Return which positions see which, if not simply all before: [length, length] bool."""
        window = self._config.sliding_window
        if window is None or window >= length:
            return None
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        return seen & ~seen.tril(-window)
