"""rope_kv_write of the `cpu` backend: native code in fp32, torch elsewhere."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.cache_ops import unserved_write
from octavo_kernels.cpu.fallback import rope as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for

__all__ = ["rope_kv_write"]


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
    num_tokens, num_heads, head_dim = q.shape
    args = abi.RopeKvWriteArgs(
        pointer(q), pointer(k), pointer(v), pointer(positions), pointer(cos_sin), pointer(k_cache), pointer(v_cache),
        pointer(slot_mapping), pointer(q_norm_weight), pointer(k_norm_weight),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        num_heads, k.shape[1], head_dim, cos_sin.shape[1], k_cache.shape[2],
        abi.DTYPE_CODES[k_cache.dtype], interleaved, 0, eps, 0.0,
    )  # fmt: skip
    launch(
        abi.OpKind.ROPE_KV_WRITE, args, num_tokens, q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
        q_norm_weight, k_norm_weight,
    )  # fmt: skip


def _unserved(positions: Tensor, cos_sin: Tensor, *weights: Tensor | None) -> str | None:
    """Say what about the rotation the native library does not serve; None where it does."""
    if any(weight is not None and weight.dtype != torch.float32 for weight in weights):
        return "a norm weight is not float32; convert it with .float()"
    tensors = (positions, cos_sin, *weights)
    if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
        return "positions, cos_sin or a norm weight is not contiguous; pass tensor.contiguous()"
    return None
