"""Token masks: which tokens a row of logits may draw, one bit each, as grammars make them."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, *, rows: Tensor | None = None) -> Tensor:
    """Set the logits of tokens that may not be drawn to -inf, in place.

    Token t of a mask is bit t % 32 of its word t // 32, least significant first; 1 allows the token. Bits past the
    vocabulary mean nothing.

    Args:
        logits: [num_rows, vocab_size] fp32; the stride of rows is free. Modified.
        bitmask: [num_masks, num_words] int32, num_words at least vocab_size / 32 rounded up; the stride of masks is
            free.
        rows: [num_masks] int64, the different rows of logits that the masks are for, each in 0 .. num_rows - 1;
            None: mask i is for row i, and there are as many masks as rows.

    Returns:
        logits.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "apply_token_bitmask"
    device = _check.same_device(op, logits=logits, bitmask=bitmask, rows=rows)
    _check.rank(op, "logits", logits, ("num_rows", "vocab_size"))
    _check.dtype(op, "logits", logits, torch.float32)
    _check.rank(op, "bitmask", bitmask, ("num_masks", "num_words"))
    _check.dtype(op, "bitmask", bitmask, torch.int32)
    _check.last_dim_contiguous(op, logits=logits, bitmask=bitmask)
    num_masks, num_words = bitmask.shape
    needed = -(-logits.shape[1] // 32)
    _check.option(op, "num_words", num_words, num_words >= needed, f"at least {needed}, 32 tokens in each")
    if rows is None:
        _check.shape(op, "bitmask", bitmask, (logits.shape[0], "num_words"))
    else:
        _check.shape(op, "rows", rows, (num_masks,))
        _check.dtype(op, "rows", rows, torch.int64)
    if num_masks and logits.shape[1]:
        implementation(op, device)(logits, bitmask, rows)
    return logits
