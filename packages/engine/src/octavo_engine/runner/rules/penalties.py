"""PenaltyRule: which tokens each running sequence has seen and drawn; Penalties: what that does to logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalties of some rows of a step's logits.

    Attributes:
        places: [num_penalised] int64, the rows of the logits.
        repetition, frequency, presence: [num_penalised, 1] fp32.
        output_counts: [num_penalised, vocab_size] int32, how often each token was drawn.
        prompt_seen: [num_penalised, vocab_size] bool, whether the prompt has the token.
    """

    places: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    output_counts: Tensor
    prompt_seen: Tensor

    def apply(self, logits: Tensor) -> None:
        """Change logits [draws, vocab_size] in place.

        Repetition (arXiv 1909.05858, section 4.1): a token of the prompt or the output has its logit divided by the
        penalty if positive, else multiplied. Then, for tokens of the output alone, frequency times the count and
        presence once are subtracted.
        """
        scores = logits[self.places]
        drawn = self.output_counts > 0
        repeated = torch.where(scores > 0, scores / self.repetition, scores * self.repetition)
        scores = torch.where(drawn | self.prompt_seen, repeated, scores)
        scores -= self.frequency * self.output_counts
        scores -= self.presence * drawn
        logits[self.places] = scores


class PenaltyRule:
    """The penalties of the running sequences and what they are counted from.

    The counts, [max_num_rows, vocab_size], are allocated with the first row that needs them.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_rows, vocab_size)
        self._device = device
        self._values = np.zeros((3, max_num_rows), np.float32)  # repetition, frequency, presence
        self._counts: Tensor | None = None
        self._prompt_seen: Tensor | None = None

    def add(self, new: NewRow) -> bool:
        """Fill a row, whatever it held before; True if it has penalties."""
        sampling = new.sampling
        values = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if values == (1.0, 0.0, 0.0):
            return False
        self._values[:, new.row] = values
        counts, prompt_seen = self._tables()
        token_ids = torch.tensor(new.token_ids, dtype=torch.int64, device=self._device)
        prompt, output = token_ids[: new.num_prompt_tokens], token_ids[new.num_prompt_tokens :]
        prompt_seen[new.row] = False
        prompt_seen[new.row, prompt] = True
        counts[new.row] = torch.bincount(output, minlength=self._shape[1])
        return True

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Penalties:  # noqa: ARG002
        """Collect the penalties of some rows."""
        counts, prompt_seen = self._tables()
        repetition, frequency, presence = torch.from_numpy(self._values[:, rows, None]).to(self._device)
        indices = torch.from_numpy(rows).to(self._device)
        return Penalties(
            places=torch.from_numpy(places).to(self._device),
            repetition=repetition,
            frequency=frequency,
            presence=presence,
            output_counts=counts[indices],
            prompt_seen=prompt_seen[indices],
        )

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Count one drawn token in each of some different rows."""
        counts, _ = self._tables()
        counts[torch.from_numpy(rows).to(self._device), torch.from_numpy(token_ids).to(self._device)] += 1

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        counts, prompt_seen = self._tables()
        self._values[:, row] = self._values[:, source]
        counts[row], prompt_seen[row] = counts[source], prompt_seen[source]

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._prompt_seen is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._prompt_seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        return self._counts, self._prompt_seen
