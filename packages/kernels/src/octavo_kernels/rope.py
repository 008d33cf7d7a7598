"""The fused op between a layer's qkv projection and its attention: norm, rotary embedding, cache write."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels.cache_ops import check_write


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
    interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotate q and k in place by their positions, then write k and v into the cache (RoPE, arXiv 2104.09864, eq. 34).

    With norm weights, each head of q and k first gets an RMS norm over head_dim. The sums are fp32 (fp64 for fp64
    tensors) and each value is rounded once, at the end.

    Args:
        q: [num_tokens, num_heads, head_dim]; modified.
        k: [num_tokens, num_kv_heads, head_dim]; modified: it holds what the cache received.
        v: [num_tokens, num_kv_heads, head_dim].
        positions: [num_tokens] int64, each below max_position. Padding rows need one too (0 will do).
        cos_sin: [max_position, rot_dim] fp32; columns 0 to rot_dim/2 are cosines, the rest sines. rot_dim is even and
            at most head_dim; the dimensions behind it are not rotated.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], any strides but 1 in the last dimension; modified.
        v_cache: as k_cache; modified.
        slot_mapping: [num_tokens] int64; -1 writes nothing (the token's q and k are still rotated).
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rot_dim/2).
        q_norm_weight: [head_dim], or None for no norm of q.
        k_norm_weight: [head_dim], or None for no norm of k.
        eps: added to the mean square.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "rope_kv_write"
    device = _check.same_device(
        op, q=q, k=k, v=v, positions=positions, cos_sin=cos_sin, k_cache=k_cache, v_cache=v_cache,
        slot_mapping=slot_mapping, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
    )  # fmt: skip
    check_write(op, k, v, k_cache, v_cache, slot_mapping)
    num_tokens, _, head_dim = k.shape
    _check.shape(op, "q", q, (num_tokens, "num_heads", head_dim))
    _check.shape(op, "positions", positions, (num_tokens,))
    _check.dtype(op, "positions", positions, torch.int64)
    _check.floating(op, q=q)
    _check.dtype(op, "k", k, q.dtype)
    _check.last_dim_contiguous(op, q=q)
    _check.rank(op, "cos_sin", cos_sin, ("max_position", "rot_dim"))
    _check.dtype(op, "cos_sin", cos_sin, torch.float32)
    _check.last_dim_contiguous(op, cos_sin=cos_sin)
    rot_dim = cos_sin.shape[1]
    fits = rot_dim % 2 == 0 and rot_dim <= head_dim
    _check.option(op, "rot_dim", rot_dim, fits, f"an even number up to head_dim {head_dim} (columns of cos_sin)")
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            _check.shape(op, name, weight, (head_dim,))
            _check.floating(op, **{name: weight})
    if num_tokens:
        implementation(op, device)(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
            interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
        )  # fmt: skip
