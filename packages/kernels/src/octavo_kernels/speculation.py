"""Rejection sampling of drafted tokens: what a cheap model guessed, judged by the logits of the model that counts."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    query_start_loc: Tensor,
    temperature: Tensor,
    *,
    max_num_drafts: int,
    seeds: Tensor,
    sequence_index: Tensor,
    positions: Tensor,
    draft_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of each sequence's drafted tokens, and draw one token more (arXiv 2211.17192, algorithm 1).

    A draft x is accepted with probability min(1, p(x) / q(x)), p being the softmax of target_logits / temperature, q
    that of draft_logits / temperature. After the first that is not, a token is drawn from max(p - q, 0), scaled to 1;
    after all are, from p. The tokens are then distributed as if each had been drawn from p. With temperature 0 a draft
    is accepted if it is the largest target logit, of equals the lowest token id, and so is the token behind.

    What p must not hold is removed from target_logits beforehand, by `apply_filters` for example.

    Row j of a sequence uses the noise of position positions + j: `gumbel_noise` for the token that is drawn, so that
    without drafts it is that of `sample_tokens`, and for the acceptance the first 24 bits of the block 2**32 - 1 of
    `philox`. Drafts must not have been drawn with the same noise: take another seed for them.

    Args:
        target_logits: [num_rows, vocab_size] fp32, the rows of sequence s being query_start_loc[s] to
            query_start_loc[s + 1] - 1: one per drafted token, and one more. The stride of rows is free.
        draft_token_ids: [num_rows] int64, the draft that each row judges; a sequence's last is not read.
        query_start_loc: [num_seqs + 1] int32.
        temperature: [num_seqs] fp32, at least 0.
        max_num_drafts: of a sequence, at least 0. More are not judged.
        seeds: [num_seqs] int64.
        sequence_index: [num_seqs] int64.
        positions: [num_seqs] int64, of the token that a sequence's first row is for.
        draft_logits: [num_rows, vocab_size] fp32, which the drafts were drawn from at the same temperature, with what
            they could not hold at -inf; a sequence's last row is not read. None: the drafts were not drawn, and q is 1
            for each (n-grams, for example).

    Returns:
        token_ids: [num_seqs, max_num_drafts + 1] int64, the accepted drafts, the token drawn after them, then -1.
        num_accepted: [num_seqs] int32, how many drafts were accepted. A sequence has one token more than that, and
            none if it has no rows.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "rejection_sample"
    int64 = {
        "draft_token_ids": draft_token_ids,
        "seeds": seeds,
        "sequence_index": sequence_index,
        "positions": positions,
    }
    fp32 = {"target_logits": target_logits, "draft_logits": draft_logits, "temperature": temperature}
    device = _check.same_device(op, **fp32, **int64, query_start_loc=query_start_loc)
    _check.rank(op, "target_logits", target_logits, ("num_rows", "vocab_size"))
    _check.rank(op, "temperature", temperature, ("num_seqs",))
    num_seqs = len(temperature)
    _check.dtype(op, "query_start_loc", query_start_loc, torch.int32)
    for dtype, tensors in ((torch.float32, fp32), (torch.int64, int64)):
        for name, tensor in tensors.items():
            if tensor is not None:
                _check.dtype(op, name, tensor, dtype)
    _check.shape(op, "draft_token_ids", draft_token_ids, (len(target_logits),))
    _check.shape(op, "query_start_loc", query_start_loc, (num_seqs + 1,))
    for name in ("seeds", "sequence_index", "positions"):
        _check.shape(op, name, int64[name], (num_seqs,))
    _check.last_dim_contiguous(op, target_logits=target_logits)
    if draft_logits is not None:
        _check.shape(op, "draft_logits", draft_logits, target_logits.shape)
        _check.last_dim_contiguous(op, draft_logits=draft_logits)
    _check.option(op, "max_num_drafts", max_num_drafts, max_num_drafts >= 0, "at least 0")
    _check.option(op, "vocab_size", target_logits.shape[1], target_logits.shape[1] > 0, "at least 1")
    token_ids = torch.empty((num_seqs, max_num_drafts + 1), dtype=torch.int64, device=device)
    num_accepted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    if num_seqs:
        implementation(op, device)(
            target_logits, draft_token_ids, query_start_loc, temperature, seeds, sequence_index, positions,
            draft_logits, token_ids, num_accepted,
        )  # fmt: skip
    return token_ids, num_accepted
