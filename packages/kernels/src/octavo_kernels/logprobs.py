"""Log-probabilities of tokens: of those that were chosen, and of the likeliest."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log softmax(logits) of one token per row, its rank, and the likeliest tokens.

    Args:
        logits: [rows, vocab_size] fp32; the stride of rows is free. Not modified.
        token_ids: [rows] int64, each in 0 .. vocab_size - 1.
        num_top: how many of the likeliest tokens to report, at most vocab_size. Each costs a GPU a pass over the row.

    Returns:
        logprobs: [rows] fp32, of token_ids.
        ranks: [rows] int64, one more than there are tokens with a larger logit.
        top_ids: [rows, num_top] int64, the likeliest first; of equally likely ones the lowest id.
        top_logprobs: [rows, num_top] fp32.
        Where a row's largest logit is not finite, they mean nothing.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "token_logprobs"
    device = _check.same_device(op, logits=logits, token_ids=token_ids)
    _check.rank(op, "logits", logits, ("rows", "vocab_size"))
    _check.dtype(op, "logits", logits, torch.float32)
    _check.last_dim_contiguous(op, logits=logits)
    _check.shape(op, "token_ids", token_ids, (len(logits),))
    _check.dtype(op, "token_ids", token_ids, torch.int64)
    vocab_size = logits.shape[1]
    _check.option(op, "num_top", num_top, 0 <= num_top <= vocab_size, f"0 to vocab_size {vocab_size}")
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=device)
    ranks = torch.empty(len(logits), dtype=torch.int64, device=device)
    top_ids = torch.empty((len(logits), num_top), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((len(logits), num_top), dtype=torch.float32, device=device)
    if logits.numel():
        implementation(op, device)(logits, token_ids, logprobs, ranks, top_ids, top_logprobs)
    return logprobs, ranks, top_ids, top_logprobs
