"""Hugging Face's names for the tensors of a GGUF file, and the row order of its rotary projections."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from octavo_engine.models.config import ModelConfig

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_IN_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
_EXPERT = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|down)\.(\d{1,5})\.weight")
_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that is configuration: it becomes `RopeConfig.freq_factors`, not a weight."""


def hf_name(gguf_name: str) -> str | None:
    """Return the Hugging Face name of a llama tensor, or None if it has none."""
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    expert = _EXPERT.fullmatch(gguf_name)  # as mixtures were stored before their experts were stacked
    if expert is not None:
        block = f"model.layers.{int(expert[1])}.block_sparse_moe.experts.{int(expert[3])}"
        return f"{block}.{_IN_EXPERT[expert[2]]}.weight"
    match = _LAYER.fullmatch(gguf_name)
    if match is None or match[2] not in _IN_LAYER:
        return None
    return f"model.layers.{int(match[1])}.{_IN_LAYER[match[2]]}.{match[3]}"


def rotary_heads(gguf_name: str, config: ModelConfig) -> int | None:
    """Return how many heads a tensor's rows belong to if they are in rotary order, else None."""
    match = _LAYER.fullmatch(gguf_name)
    if match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    return config.num_heads if match[2] == "attn_q" else config.num_kv_heads


def rotary_row_order(num_rows: int, num_heads: int) -> npt.NDArray[np.int64]:
    """Return the file's row for each row of the Hugging Face layout: [num_rows] int64.

    GGUF stores the two rows that rotate together next to each other, Hugging Face stores the first of all pairs and
    then the second, per head::

        GGUF  a0 b0 a1 b1 a2 b2 ...        HF  a0 a1 a2 ... b0 b1 b2 ...
    """
    pairs = num_rows // num_heads // 2
    return np.arange(num_rows).reshape(num_heads, pairs, 2).swapaxes(1, 2).reshape(-1)
