"""The filters of sampling as an op of their own: logits of tokens that may not be drawn become -inf."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def apply_filters(
    logits: Tensor,
    temperature: Tensor,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Set the logits of tokens that min_p, top_k and top_p take out to -inf, in place.

    What is kept is what `sample_tokens` draws from, ties included: a draw from the filtered logits at this temperature
    follows the same distribution.

    Args:
        logits: [num_rows, vocab_size] fp32; the stride of rows is free. Modified.
        temperature: [num_rows] fp32, at least 0; rows with 0 stay as they are, since they take the largest logit, and
            so do rows whose largest logit is not finite.
        top_k: [num_rows] int64, at least 0; 0 keeps all. None keeps all in every row.
        top_p: [num_rows] fp32, in 0 .. 1; 1 keeps all. None keeps all in every row.
        min_p: [num_rows] fp32, in 0 .. 1; 0 keeps all. None keeps all in every row.

    Returns:
        logits.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "apply_filters"
    device = _check.same_device(op, logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    _check.rank(op, "logits", logits, ("num_rows", "vocab_size"))
    _check.dtype(op, "logits", logits, torch.float32)
    _check.last_dim_contiguous(op, logits=logits)
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, tensor in values.items():
        if tensor is not None:
            _check.shape(op, name, tensor, (len(logits),))
            _check.dtype(op, name, tensor, torch.int64 if name == "top_k" else torch.float32)
    if logits.numel() and any(value is not None for value in (top_k, top_p, min_p)):
        implementation(op, device)(logits, temperature, top_k, top_p, min_p)
    return logits
