"""The fused ops between a layer's qkv projection and its attention: norm, rotary embedding, cache write."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._codes import LARGEST_CODE
from octavo_kernels._dispatch import implementation
from octavo_kernels.cache_ops import check_write, check_write_shapes


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
    _check_rotation(op, q, k, positions, cos_sin, q_norm_weight, k_norm_weight)
    if len(q):
        implementation(op, device)(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
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
    interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Do what `rope_kv_write` does, into a cache of 8 bits.

    A code is its element, as q's dtype holds it, times 1 / scale; whole numbers are rounded half to even, and what the
    scale cannot hold gets the largest code. Scales are written or read, as their shape says:

    - [num_blocks, num_kv_heads, block_size]: a scale per cached vector, written with it: its largest element by
      magnitude over the largest code. Codes are 0 where the scale or its reciprocal is not finite.
    - [num_kv_heads] or [1]: a scale per head or one for all, known beforehand; read.

    `paged_attention` takes the former as they are; the latter as `scale.view(1, -1, 1).expand(num_blocks, num_kv_heads,
    block_size)`.

    Args:
        q: as all that is not described here as in `rope_kv_write`; modified, as there.
        k: modified; it holds what the codes were made of.
        v: like k.
        positions: one per token.
        cos_sin: where it has no columns, nothing is rotated.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim] int8 (codes from -127 to 127) or float8_e4m3fn (to
            448), any strides but 1 in the last dimension; modified.
        v_cache: as k_cache; modified.
        slot_mapping: -1 writes nothing, no scale either.
        k_scale: fp32, any strides; see above.
        v_scale: as k_scale.
        interleaved: whether pairs are neighbours.
        q_norm_weight: or None.
        k_norm_weight: or None.
        eps: added to the mean square.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "rope_kv_write_quant"
    device = _check.same_device(
        op, q=q, k=k, v=v, positions=positions, cos_sin=cos_sin, k_cache=k_cache, v_cache=v_cache,
        slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale, q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
    )  # fmt: skip
    check_write_shapes(op, k, v, k_cache, v_cache, slot_mapping)
    _check.floating(op, k=k, v=v)
    _check.dtype(op, "k_cache", k_cache, *LARGEST_CODE)
    _check.dtype(op, "v_cache", v_cache, k_cache.dtype)
    _check_rotation(op, q, k, positions, cos_sin, q_norm_weight, k_norm_weight)
    num_kv_heads = k.shape[1]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        _check.dtype(op, name, scale, torch.float32)
        if scale.shape not in ((1,), (num_kv_heads,)):
            _check.shape(op, name, scale, k_cache.shape[:3])
    alike = v_scale.dim() == k_scale.dim()
    _check.option(op, "v_scale.dim()", v_scale.dim(), alike, f"{k_scale.dim()}, as many as k_scale has")
    if len(q):
        implementation(op, device)(
            q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
            *(scale.expand(num_kv_heads) if scale.dim() == 1 else scale for scale in (k_scale, v_scale)),
            interleaved=interleaved, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
        )  # fmt: skip


def _check_rotation(
    op: str,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
) -> None:
    """Check what is not about the cache."""
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
