"""Pipe: how a step passes from one stage of a model to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_engine.parallel.group import Group


class Pipe:
    """A rank's place in the row of stages: it takes what the stage before it made, and passes on what its own makes.

    What is passed on is on its way until the next stage takes it, so that a stage goes on with another step meanwhile.

    Args:
        group: this rank's part of all stages, in their order.
        hidden_size: of the model.
        dtype: of activations.
        device: of the rank.
    """

    def __init__(self, group: Group, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device

    @property
    def is_first(self) -> bool:
        """Whether there is nothing to take."""
        return self._group.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether there is nobody to pass anything on to."""
        return self._group.rank == self._group.size - 1

    def take(self, num_tokens: int) -> Tensor | None:
        """Return what the stage before made of the next step, [num_tokens, hidden_size]; None in the first stage.

        Raises:
            WorkerLost: a rank has ended, or did not answer in time.
        """
        if self.is_first:
            return None
        x = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._device)
        self._group.receive(x, self._group.rank - 1)
        return x

    def pass_on(self, x: Tensor) -> None:
        """Send x [num_tokens, hidden_size] to the next stage, which takes it when it comes to that step.

        No more tensors are on their way than there are stages, as many as there are steps at once.

        Raises:
            WorkerLost: a rank has ended, or did not answer in time.
        """
        self._group.send(x.contiguous(), self._group.rank + 1, max_on_their_way=self._group.size)
