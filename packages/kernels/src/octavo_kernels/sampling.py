"""Sampling: from logits to tokens, by temperature and by the filters that the field has agreed on."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._draw import DrawOptions


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    *,
    seeds: Tensor,
    sequence_index: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    source_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw tokens from rows of logits, each as a function of its own row and options.

    A draw takes the largest of score + Gumbel noise, which is a draw from the softmax of the scores; of equals the
    lowest token id. The scores are (logits - largest logit) / temperature, and the noise is that of `gumbel_noise` with
    the draw's seed, sequence index and position. Before it, in this order,

    - min_p keeps the tokens at least min_p times as probable as the likeliest (arXiv 2407.01082);
    - top_k keeps the k largest scores;
    - top_p keeps the shortest prefix, by falling probability, that holds at least top_p of what is left
      (arXiv 1904.09751).

    Every token whose score equals that of the last one kept is kept as well, so what is kept does not depend on the
    order of token ids.

    Args:
        logits: [rows, vocab_size] fp32, vocab_size at least 1; the stride of rows is free. Not modified.
        temperature: [draws] fp32, at least 0; 0 takes the largest logit.
        seeds: [draws] int64.
        sequence_index: [draws] int64.
        positions: [draws] int64, of the tokens that are drawn.
        top_k: [draws] int64, at least 0; 0 keeps all. None keeps all in every row.
        top_p: [draws] fp32, in 0 .. 1; 1 keeps all. None keeps all in every row.
        min_p: [draws] fp32, in 0 .. 1; 0 keeps all. None keeps all in every row.
        source_rows: [draws] int64, the row of logits that each draw goes by; None: draw i by row i.

    Returns:
        token_ids: [draws] int64.
        best: [draws] fp32, the largest logit, NaN if the row holds NaN. Where it is not finite, the id means nothing.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "sample_tokens"
    _check.rank(op, "logits", logits, ("rows", "vocab_size"))
    _check.dtype(op, "logits", logits, torch.float32)
    _check.last_dim_contiguous(op, logits=logits)
    _check.option(op, "vocab_size", logits.shape[1], logits.shape[1] > 0, "at least 1")
    options = DrawOptions(temperature, seeds, sequence_index, positions, top_k, top_p, min_p, source_rows)
    device = options.check(op, logits)
    token_ids = torch.empty(len(temperature), dtype=torch.int64, device=device)
    best = torch.empty(len(temperature), dtype=torch.float32, device=device)
    if len(temperature):
        implementation(op, device)(logits, options, token_ids, best)
    return token_ids, best
