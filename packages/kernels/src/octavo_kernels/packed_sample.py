"""packed_sample: from hidden states to tokens, where nobody wants to see the logits."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._draw import DrawOptions
from octavo_kernels.matmul import check_norms
from octavo_kernels.packed_weight import PackedWeight


def packed_sample(
    x: Tensor,
    weight: PackedWeight,
    temperature: Tensor,
    *,
    seeds: Tensor,
    sequence_index: Tensor,
    positions: Tensor,
    norms: Tensor | None = None,
    source_rows: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw tokens as `sample_tokens` does without filters from `packed_linear` of x and the weight, the same ones.

    With `norms`, native code screens the products of several rows by inputs rounded to 8 bits, as `packed_argmax` does,
    and computes in full only those that may be the largest of their row, alone or with their noise.

    Args:
        x: [rows, in_features] fp32; the stride of rows is free.
        weight: packed by `pack_weight`.
        temperature: [draws] fp32, at least 0; 0 takes the largest product.
        seeds: [draws] int64.
        sequence_index: [draws] int64.
        positions: [draws] int64, of the tokens that are drawn.
        norms: [out_features] fp32, `weight_norms` of the weight; None: every product is computed in full.
        source_rows: [draws] int64, the row of x that each draw goes by; None: draw i by row i.
        logits: [rows, out_features] fp32, memory that is overwritten, the stride of rows is free; allocated when None.

    Returns:
        token_ids: [draws] int64.
        best: [draws] fp32, the largest logit, NaN if the row holds NaN. Where it is not finite, the id means nothing.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "packed_sample"
    device = _check.same_device(op, x=x, weight=weight.data, norms=norms, logits=logits)
    _check.shape(op, "x", x, ("rows", weight.in_features))
    check_norms(op, norms, weight)
    if logits is None:
        logits = torch.empty((len(x), weight.out_features), dtype=torch.float32, device=device)
    _check.shape(op, "logits", logits, (len(x), weight.out_features))
    for name, matrix in (("x", x), ("logits", logits)):
        _check.dtype(op, name, matrix, torch.float32)
        _check.last_dim_contiguous(op, **{name: matrix})
    options = DrawOptions(temperature, seeds, sequence_index, positions, None, None, None, source_rows)
    options.check(op, logits)
    token_ids = torch.empty(len(temperature), dtype=torch.int64, device=device)
    best = torch.empty(len(temperature), dtype=torch.float32, device=device)
    if len(temperature):
        implementation(op, device)(x, weight, norms, options, logits, token_ids, best)
    return token_ids, best
