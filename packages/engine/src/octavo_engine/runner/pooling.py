"""Pooler: embeddings of prompts out of hidden states, over any number of chunks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_rows import StepRows


class Pooler:
    """Takes the hidden state of the last token of a prompt, or the mean over its tokens, scaled to unit length.

    The running sums of prompts that are computed in chunks are fp64, and take one token after the other, so that how a
    prompt is cut does not show. Only the ModelRunner writes it.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def release(self, rows: Iterable[int]) -> None:
        """Forget the sums of some rows."""
        for row in rows:
            self._sums.pop(row, None)

    def pool(self, step: StepRows, rows: Rows, hidden: Tensor) -> dict[int, Tensor]:
        """Take in a step's hidden states [num_tokens, hidden_size].

        Returns:
            By place in the batch, the embedding [hidden_size] fp32 of each prompt that ends in this step.
        """
        pooled: dict[int, Tensor] = {}
        for place in np.flatnonzero(rows.embeds[step.rows]).tolist():
            row, start = int(step.rows[place]), int(step.token_starts[place])
            chunk = hidden[start : start + int(step.num_scheduled_tokens[place])]
            vector = self._mean(step, place, row, chunk) if rows.pools_mean[row] else chunk[-1]
            if step.samples[place]:
                pooled[place] = F.normalize(vector.double(), dim=0).float()
        return pooled

    def _mean(self, step: StepRows, place: int, row: int, chunk: Tensor) -> Tensor:
        """Add a chunk to the row's sum; the sum over the tokens so far points where their mean does."""
        before = self._sums.pop(row, None)
        if step.num_computed_tokens[place] == 0:
            before = None  # a sequence that starts, or starts again
        else:
            assert before is not None, f"row {row} pools the mean of a prompt whose first tokens it did not compute"
        addends = chunk.double() if before is None else torch.cat((before[None], chunk.double()))
        total = addends.cumsum(dim=0)[-1]
        if not step.samples[place]:
            self._sums[row] = total
        return total
