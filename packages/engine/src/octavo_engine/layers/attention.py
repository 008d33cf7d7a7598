"""Attention: projections around the fused rotary write and paged attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.quant.base import Shard, WeightSlot
from octavo_engine.runner.model_input import KVLayer, ModelInput
from octavo_kernels import paged_attention, rope_kv_write, rope_kv_write_quant


class Attention:
    """Grouped-query attention over the paged KV of one layer, which the ModelInput brings.

    Args:
        config: the model's sizes.
        layer: index of the layer, of its KV too.
        cos_sin: [max_position, head_dim] fp32, the rotary table that all layers share.
        options: how the weights are made.

    Attributes:
        kv_scales: of keys and values in a cache of codes, if they are known beforehand; see `follow`.
    """

    __slots__ = (
        "_batch_invariant",
        "_cos_sin",
        "_head_dim",
        "_layer",
        "_scale",
        "_split",
        "_window",
        "kv_scales",
        "out",
        "qkv",
    )

    def __init__(self, config: ModelConfig, layer: int, cos_sin: Tensor, *, options: LayerOptions) -> None:
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(
            config.hidden_size,
            (
                Shard("q_proj", num_heads * head_dim),
                Shard("k_proj", num_kv_heads * head_dim),
                Shard("v_proj", num_kv_heads * head_dim),
            ),
            bias=config.attention_bias,
            options=options,
        )
        self.out = Linear(
            num_heads * head_dim, (Shard("o_proj", config.hidden_size),), bias=config.attention_bias, options=options
        )
        self._layer = layer
        self._cos_sin = cos_sin
        self._head_dim = head_dim
        self._split = [num_heads, num_kv_heads, num_kv_heads]
        self._scale = head_dim**-0.5
        self._window = config.sliding_window
        self._batch_invariant = options.batch_invariant
        self.kv_scales: tuple[Tensor, Tensor] | None = None

    def follow(self, k_scale: Tensor, v_scale: Tensor) -> None:
        """Round cached keys and values by scales known beforehand, [num_kv_heads] fp32, wherever the cache is codes.

        Those of the cache, which attention multiplies by, are then not written with each vector: `fill_scales` does it
        once.
        """
        device = self._cos_sin.device
        self.kv_scales = k_scale.to(device), v_scale.to(device)

    def __call__(self, x: Tensor, model_input: ModelInput) -> Tensor:
        """Return the block's output for x, both [num_tokens, hidden_size]; writes the layer's K and V of the tokens."""
        kv = model_input.kv_layers[self._layer]
        group = model_input.groups[kv.group]
        qkv = self.qkv(x).view(len(x), -1, self._head_dim)  # [num_tokens, num_heads + 2 num_kv_heads, head_dim]
        q, k, v = torch.split(qkv, self._split, dim=1)
        _write(q, k, v, model_input.positions, self._cos_sin, kv, group.slot_mapping, self.kv_scales)
        out = paged_attention(
            q,
            kv.k_cache,
            kv.v_cache,
            model_input.query_start_loc,
            model_input.seq_lens,
            group.block_table,
            max_query_len=model_input.max_query_len,
            scale=self._scale,
            window=self._window,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            batch_invariant=self._batch_invariant,
        )
        return self.out(out.view(len(x), -1))

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """Yield the linears, each with what the checkpoint's names of its shards begin with."""
        yield prefix, self.qkv
        yield prefix, self.out

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        self.qkv.finish()
        self.out.finish()

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        yield from self.qkv.slots(prefix)
        yield from self.out.slots(prefix)


def _write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv: KVLayer,
    slot_mapping: Tensor,
    known: tuple[Tensor, Tensor] | None,
) -> None:
    """Rotate q and k in place, and write k and v to a layer's cache, as codes where it has scales: its own or known."""
    if kv.k_scale is None or kv.v_scale is None:
        rope_kv_write(q, k, v, positions, cos_sin, kv.k_cache, kv.v_cache, slot_mapping)
    else:
        scales = known or (kv.k_scale, kv.v_scale)
        rope_kv_write_quant(q, k, v, positions, cos_sin, kv.k_cache, kv.v_cache, slot_mapping, *scales)
