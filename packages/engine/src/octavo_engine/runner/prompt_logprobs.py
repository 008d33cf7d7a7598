"""PromptLogprobs: log-probabilities of prompts, out of hidden states, over any number of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.logprobs import describe
from octavo_engine.runner.step_rows import StepRows
from octavo_engine.types import TokenLogprobs


@dataclass(slots=True)
class _Prompt:
    """What one prompt wants, and what it has so far, from its second token on."""

    num_tokens: int
    num_top: int
    entries: list[TokenLogprobs] = field(default_factory=list)


class PromptLogprobs:
    """Reports each token of a prompt by the distribution that the tokens before it give.

    Logits are made of few tokens at a time: a long prompt needs no more memory than a step that decodes. Only the
    ModelRunner writes it.

    Args:
        token_ids: [max_num_rows, max_num_tokens + 1] int32, the known tokens of every row; not modified.
        logits_of: from hidden states [num_tokens, hidden_size] of a row to logits, which hold until the next call.
        max_num_logits: tokens whose logits are made at a time.
    """

    def __init__(
        self, token_ids: NDArray[np.int32], logits_of: Callable[[Tensor, int], Tensor], max_num_logits: int
    ) -> None:
        self._token_ids = token_ids
        self._logits_of = logits_of
        self._max_num_logits = max_num_logits
        self._prompts: dict[int, _Prompt] = {}

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def add(self, new: NewRow, vocab_size: int) -> None:
        """Take note of a row whose prompt has not been reported yet; forks and sequences that go on have theirs."""
        wanted = new.sampling.prompt_logprobs
        self._prompts.pop(new.row, None)
        if wanted is not None and new.fork_of is None and len(new.token_ids) == new.num_prompt_tokens:
            assert new.num_computed_tokens == 0, "the whole prompt is computed when its log-probabilities are wanted"
            self._prompts[new.row] = _Prompt(new.num_prompt_tokens, vocab_size if wanted == -1 else wanted)

    def release(self, rows: Iterable[int]) -> None:
        """Forget rows whose sequences have left."""
        for row in rows:
            self._prompts.pop(row, None)

    def collect(self, step: StepRows, hidden: Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Take in a step's hidden states [num_tokens, hidden_size].

        Returns:
            By place in the batch, the tokens from the second on of each prompt that ends in this step.
        """
        ended: dict[int, tuple[TokenLogprobs, ...]] = {}
        for place, row in enumerate(step.rows.tolist()):
            prompt = self._prompts.get(row)
            if prompt is None:
                continue
            start, first = int(step.token_starts[place]), int(step.num_computed_tokens[place])
            last = min(first + int(step.num_scheduled_tokens[place]), prompt.num_tokens - 1)
            following = self._token_ids[row, first + 1 : last + 1]
            self._report(prompt, row, hidden[start : start + last - first], following)
            if step.samples[place]:
                ended[place] = tuple(prompt.entries)
                del self._prompts[row]
        return ended

    def _report(self, prompt: _Prompt, row: int, hidden: Tensor, following: NDArray[np.int32]) -> None:
        """Report the tokens that follow some others of a row, given these others' hidden states."""
        token_ids = torch.from_numpy(following.astype(np.int64)).to(hidden.device)
        for begin in range(0, len(token_ids), self._max_num_logits):
            piece = slice(begin, begin + self._max_num_logits)
            logprobs = self._logits_of(hidden[piece], row).log_softmax(dim=-1)
            count = len(logprobs)
            prompt.entries += describe(logprobs, token_ids[piece], [prompt.num_top] * count, [()] * count)
