"""merge_states: join two partial attention results over disjoint sets of keys."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def merge_states(
    o_a: Tensor,
    lse_a: Tensor,
    o_b: Tensor,
    lse_b: Tensor,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what attention over the union of two disjoint key sets gives (online softmax, arXiv 1805.02867).

    A side with lse -inf saw no key: the other side is the result, whatever the empty side's output holds. When both are
    empty the output is 0 and lse -inf. Give attention sinks to one side only, since lse contains them.

    Args:
        o_a: [num_tokens, num_heads, head_dim], a floating dtype.
        lse_a: [num_tokens, num_heads] fp32, natural log.
        o_b: like o_a.
        lse_b: like lse_a.
        out: like o_a, or o_a or o_b itself; allocated when None.
        lse: like lse_a, or lse_a or lse_b itself; allocated when None.

    Returns:
        out and lse.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "merge_states"
    device = _check.same_device(op, o_a=o_a, lse_a=lse_a, o_b=o_b, lse_b=lse_b, out=out, lse=lse)
    _check.rank(op, "o_a", o_a, ("num_tokens", "num_heads", "head_dim"))
    _check.floating(op, o_a=o_a)
    out = torch.empty_like(o_a) if out is None else out
    lse = torch.empty_like(lse_a) if lse is None else lse
    for name, tensor in (("o_b", o_b), ("out", out)):
        _check.shape(op, name, tensor, o_a.shape)
        _check.dtype(op, name, tensor, o_a.dtype)
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        _check.shape(op, name, tensor, o_a.shape[:2])
        _check.dtype(op, name, tensor, torch.float32)
    if o_a.numel():
        implementation(op, device)(o_a, lse_a, o_b, lse_b, out, lse)
    return out, lse
