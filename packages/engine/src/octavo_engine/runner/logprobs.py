"""Log-probabilities as a request asks for them: WantedLogprobs of a draw, and how rows of them become TokenLogprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.largest import largest
from octavo_engine.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """What the rows that want log-probabilities want, one entry per such row.

    Attributes:
        places: [num_wanting] int64, where they stand among the rows of the draw.
        num_top: how many of the likeliest tokens to report.
        given: token ids to report besides.
        processed: [num_wanting] bool, whether they are of the distribution that is drawn from, not of the model's own.
        temperature: [num_wanting] float32 of that distribution; 0 is read as 1.
    """

    places: NDArray[np.int64]
    num_top: list[int]
    given: list[tuple[int, ...]]
    processed: NDArray[np.bool_]
    temperature: NDArray[np.float32]

    def raw(self, logits: Tensor, shared: NDArray[np.int64] | None) -> Tensor:
        """Return [num_wanting, vocab_size], of logits as the model gave them; `shared` as in `sample`."""
        return logits[self._sources(logits, shared)].log_softmax(dim=-1)

    def replace_processed(self, raw: Tensor, logits: Tensor, shared: NDArray[np.int64] | None) -> None:
        """Put those of the logits that are drawn from in the place of the raw ones, where they are wanted."""
        if self.processed.any():
            divisor = np.where(self.temperature > 0, self.temperature, np.float32(1))[self.processed, None]
            chosen = logits[self._sources(logits, shared)[torch.from_numpy(self.processed)]]
            raw[torch.from_numpy(self.processed)] = (chosen / torch.from_numpy(divisor).to(logits)).log_softmax(dim=-1)

    def entries(self, logprobs: Tensor, token_ids: Tensor, num_rows: int) -> list[TokenLogprobs | None]:
        """Return what is reported for each of the draw's rows, given the tokens [num_rows] that they drew."""
        result: list[TokenLogprobs | None] = [None] * num_rows
        chosen = token_ids[torch.from_numpy(self.places).to(token_ids.device)]
        for place, entry in zip(
            self.places.tolist(), describe(logprobs, chosen, self.num_top, self.given), strict=True
        ):
            result[place] = entry
        return result

    def _sources(self, logits: Tensor, shared: NDArray[np.int64] | None) -> Tensor:
        sources = self.places if shared is None else shared[self.places]
        return torch.from_numpy(sources).to(logits.device)


def describe(
    logprobs: Tensor, chosen_ids: Tensor, num_top: Sequence[int], given: Sequence[tuple[int, ...]]
) -> list[TokenLogprobs]:
    """Report rows of log-probabilities [rows, vocab_size]; of equally likely tokens the lowest id comes first.

    Args:
        logprobs: [rows, vocab_size].
        chosen_ids: [rows] int64, the token at each position.
        num_top: [rows], how many of the likeliest tokens to report.
        given: [rows], token ids to report besides.
    """
    chosen = logprobs.gather(1, chosen_ids[:, None])
    ranks = ((logprobs > chosen).sum(dim=-1) + 1).tolist()
    entries = []
    for row, (token_id, logprob, top) in enumerate(
        zip(chosen_ids.tolist(), chosen[:, 0].tolist(), _top(logprobs, num_top), strict=True)
    ):
        others = tuple(zip(given[row], logprobs[row, list(given[row])].tolist(), strict=True)) if given[row] else ()
        entries.append(TokenLogprobs(token_id, logprob, ranks[row], top, others))
    return entries


def _top(logprobs: Tensor, num_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return the likeliest tokens of each row; a row that wants the whole vocabulary is no burden to the others."""
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(num_top)
    for count in set(num_top) - {0}:
        rows = [row for row, wanted in enumerate(num_top) if wanted == count]
        token_ids, values = largest(logprobs if len(rows) == len(num_top) else logprobs[rows], count)
        for row, *columns in zip(rows, token_ids.tolist(), values.tolist(), strict=True):
            tops[row] = tuple(zip(*columns, strict=True))
    return tops
