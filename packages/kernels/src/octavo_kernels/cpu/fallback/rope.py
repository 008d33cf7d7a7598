"""Rotary embedding with an optional norm per head, then the cache write, in few torch calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels.cpu.fallback.cache_ops import write_kv
from octavo_kernels.reference._codes import codes_of, scales_of


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
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block_ids = torch.div(slots, k_cache.shape[2], rounding_mode="floor")
    offsets = slots - block_ids * k_cache.shape[2]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        values = x[written].float()
        used = scale
        if scale.dim() == 3:
            used = scales_of(values, cache.dtype)
            scale[block_ids, :, offsets] = used
        cache[block_ids, :, offsets] = codes_of(values, used[..., None], cache.dtype)


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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos_sin.index_select(0, positions).to(wide).unsqueeze(1).chunk(2, dim=-1)
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        if weight is None:
            _rotate(x, x[..., : 2 * cos.shape[-1]].to(wide), cos, sin, interleaved)
        else:
            normed = F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps)
            x[..., 2 * cos.shape[-1] :] = normed[..., 2 * cos.shape[-1] :]
            _rotate(x, normed, cos, sin, interleaved)


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Write x's first rot_dim dimensions, rotated, into out; both may share memory."""
    half = cos.shape[-1]
    first, second = _halves(x, half, interleaved)
    out_first, out_second = _halves(out, half, interleaved)
    rotated_second = torch.addcmul(second * cos, first, sin)
    out_first.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    out_second.copy_(rotated_second)


def _halves(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]
