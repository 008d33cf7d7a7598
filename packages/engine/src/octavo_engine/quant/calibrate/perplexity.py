"""perplexity: how well a model foretells a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from octavo_engine.models.registry import Model
from octavo_engine.quant.calibrate.batches import make_batches

_ROWS = 512  # whose logits are made at once


def perplexity(model: Model, sequences: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of a model on sequences of one length.

    It is the exponential of the mean negative log-likelihood (natural log) of every token but the first of its
    sequence, given those before it there.

    Args:
        model: filled and finished, on a CPU.
        sequences: token ids, at least 2 in each.

    """
    length = len(sequences[0])
    total, num_tokens = 0.0, 0
    with torch.inference_mode():
        for batch in make_batches(model, sequences):
            hidden = model(batch)
            is_target = batch.positions > 0
            given = hidden.reshape(-1, length, hidden.shape[-1])[:, :-1].flatten(0, 1)
            targets = batch.token_ids[is_target]
            for rows, wanted in zip(torch.split(given, _ROWS), torch.split(targets, _ROWS), strict=True):
                logprobs = model.logits(rows.contiguous()).double().log_softmax(dim=-1)
                total -= float(logprobs.gather(1, wanted[:, None]).sum())
            num_tokens += len(targets)
    return math.exp(total / num_tokens)
