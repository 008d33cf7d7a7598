"""Candidates: the likeliest next tokens of some rows of logits, and their log-probabilities as the rules leave them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.runner.largest import largest
from octavo_engine.runner.rules.base import LogitChange, apply_all

_BLOCK = 64  # columns that are looked at as one
_MIN_BLOCKS_PER_CANDIDATE = 4  # with fewer, whole rows are looked at


class Candidates(NamedTuple):
    """The likeliest next tokens of some rows.

    Attributes:
        token_ids: [rows, count] int64, best first.
        logprobs: [rows, count] fp32, natural logarithms; minus infinity where a rule barred the token. NaN comes first
            in a row whose logits held NaN or nothing finite.
        errors: why rows failed otherwise, by row.
    """

    token_ids: Tensor
    logprobs: Tensor
    errors: Mapping[int, str]


def likeliest(logits: Tensor, count: int, changes: Iterable[LogitChange] = ()) -> Candidates:
    """Return the largest log-probabilities of each row; a row's result depends on that row alone.

    As in Transformers, rules change log-probabilities, which are not made to sum to one again. The `count` largest of a
    row lie in the `count` blocks with the largest maxima, so a maximum per block and a look into few blocks replace the
    selection from whole rows, which takes longer than the softmax. Of equals the lowest token id comes first.

    Args:
        logits: [rows, vocab_size] fp32.
        count: at most vocab_size are returned.
        changes: of the rules, in order.
    """
    logprobs = logits.log_softmax(dim=-1)
    errors = apply_all(changes, logprobs)
    num_rows, vocab_size = logits.shape
    count = min(count, vocab_size)
    num_blocks = vocab_size // _BLOCK
    if num_blocks < _MIN_BLOCKS_PER_CANDIDATE * count:
        return Candidates(*largest(logprobs, count), errors)
    whole = logprobs[:, : num_blocks * _BLOCK].view(num_rows, num_blocks, _BLOCK)
    blocks = largest(whole.amax(dim=-1), count)[0].sort(dim=-1).values
    picked = whole.gather(1, blocks[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    token_ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    if rest := vocab_size - num_blocks * _BLOCK:
        tail = torch.arange(vocab_size - rest, vocab_size, device=logits.device)
        picked = torch.cat((picked, logprobs[:, -rest:]), dim=1)
        token_ids = torch.cat((token_ids, tail.expand(num_rows, -1)), dim=1)
    columns, best = largest(picked, count)  # token ids rise with the columns
    return Candidates(token_ids.gather(1, columns), best, errors)
