"""LogitsBuffer: memory for the logits of a step, the same in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels import host_empty


class LogitsBuffer:
    """On a CPU, fresh memory for many rows of logits takes longer than drawing from them; other devices keep their own.

    Physical memory is taken for as many rows as have ever been asked for.

    Args:
        max_num_rows: the most rows there can be.
        vocab_size: columns.
        device: where the logits are.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_rows, vocab_size)
        self._on_host = device.type == "cpu"
        self._memory: Tensor | None = None

    def rows(self, num_rows: int) -> Tensor | None:
        """Return [num_rows, vocab_size] fp32, which hold until the next call; None if the device needs none."""
        if self._memory is None and self._on_host:
            self._memory = host_empty(self._shape, torch.float32)
        return None if self._memory is None else self._memory[:num_rows]
