"""rope_kv_write and rope_kv_write_quant of the `cpu` backend: native code in fp32, torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.cache_ops import unserved_codes, unserved_write
from octavo_kernels.cpu.fallback import rope as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for

__all__ = ["rope_kv_write", "rope_kv_write_quant"]


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
    op = "rope_kv_write"
    native = library_for(op) is not None
    if native:
        weights = (q_norm_weight, k_norm_weight)
        reason = unserved_write(k, v, k_cache, v_cache, slot_mapping) or _unserved(positions, cos_sin, *weights)
        if reason is not None:
            note_fallback(op, reason)
            native = False
    if not native:
        in_torch.rope_kv_write(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
            interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
        )  # fmt: skip
        return
    _launch(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, None, None,
        interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
    )  # fmt: skip


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
    op = "rope_kv_write_quant"
    native = library_for(op) is not None
    if native:
        weights = (q_norm_weight, k_norm_weight)
        reason = unserved_codes(k, v, k_cache, slot_mapping) or _unserved(positions, cos_sin, *weights)
        if reason is not None:
            note_fallback(op, reason)
            native = False
    if not native:
        in_torch.rope_kv_write_quant(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale,
            interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
        )  # fmt: skip
        return
    _launch(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale,
        interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
    )  # fmt: skip


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    interleaved: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    args = abi.RopeKvWriteArgs(
        pointer(q), pointer(k), pointer(v), pointer(positions), pointer(cos_sin), pointer(k_cache), pointer(v_cache),
        pointer(slot_mapping), pointer(q_norm_weight), pointer(k_norm_weight), pointer(k_scale), pointer(v_scale),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *_scale_strides(k_scale), *_scale_strides(v_scale),
        num_heads, k.shape[1], head_dim, cos_sin.shape[1], k_cache.shape[2],
        abi.DTYPE_CODES[k_cache.dtype], interleaved, 0, k_scale is not None and k_scale.dim() == 1, eps, 0.0,
    )  # fmt: skip
    launch(
        abi.OpKind.ROPE_KV_WRITE, args, num_tokens, q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
        q_norm_weight, k_norm_weight, k_scale, v_scale,
    )  # fmt: skip


def _scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Return the distances of blocks, heads and slots; a known scale has heads alone, which may share one."""
    if scale is None:
        return 0, 0, 0
    return scale.stride() if scale.dim() == 3 else (0, scale.stride(0), 0)


def _unserved(positions: Tensor, cos_sin: Tensor, *weights: Tensor | None) -> str | None:
    """Say what about the rotation the native library does not serve; None where it does."""
    if any(weight is not None and weight.dtype != torch.float32 for weight in weights):
        return "a norm weight is not float32; convert it with .float()"
    tensors = (positions, cos_sin, *weights)
    if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
        return "positions, cos_sin or a norm weight is not contiguous; pass tensor.contiguous()"
    return None
