"""Rotary embedding with an optional norm per head, then the cache write."""

import torch
from torch import Tensor

from octavo_kernels.reference._codes import codes_of, scales_of
from octavo_kernels.reference._precision import widen
from octavo_kernels.reference.cache_ops import write_kv
from octavo_kernels.reference.norm import normalised


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate q and k in place, then write k and v."""
    _turn(q, k, positions, cos_sin, interleaved, q_norm_weight, k_norm_weight, eps)
    write_kv(k, v, k_cache, v_cache, slot_mapping)


def rope_kv_write_quant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate q and k in place, then write the codes of k and v, and their scales where each slot has some."""
    _turn(q, k, positions, cos_sin, interleaved, q_norm_weight, k_norm_weight, eps)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            place = slot // cache.shape[2], slice(None), slot % cache.shape[2]
            values = x[token].float()
            if scale.dim() == 3:
                scale[place] = scales_of(values, cache.dtype)
            cache[place] = codes_of(values, (scale[place] if scale.dim() == 3 else scale)[:, None], cache.dtype)


def _turn(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate q and k in place."""
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        wide = widen(x) if weight is None else normalised(x, weight, eps, 0.0)
        x.copy_(_rotated(wide, cos.unsqueeze(1), sin.unsqueeze(1), interleaved))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x [num_tokens, num_heads, head_dim] with its first rot_dim dimensions rotated pair by pair."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pairs = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([joined, rest], dim=-1)
