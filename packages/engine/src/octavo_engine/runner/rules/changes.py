"""The changes that several rules make to logits: tokens banned, tokens allowed, numbers added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class Ban:
    """Single tokens that may not be drawn.

    Attributes:
        places: [num_tokens] int64, rows of the logits.
        token_ids: [num_tokens] int64.
    """

    places: NDArray[np.int64]
    token_ids: NDArray[np.int64]

    def apply(self, logits: Tensor) -> None:
        """Remove the tokens from logits [draws, vocab_size]."""
        logits[on_device(self.places, logits), on_device(self.token_ids, logits)] = _NEGATIVE_INFINITY


@dataclass(frozen=True, slots=True)
class Restriction:
    """All tokens but some may not be drawn.

    Attributes:
        places: [num_rows] int64, rows of the logits.
        allowed: [num_rows, vocab_size] bool.
    """

    places: NDArray[np.int64]
    allowed: Tensor

    def apply(self, logits: Tensor) -> None:
        """Remove the other tokens from logits [draws, vocab_size]."""
        places = on_device(self.places, logits)
        logits[places] = logits[places].masked_fill(~self.allowed, _NEGATIVE_INFINITY)


@dataclass(frozen=True, slots=True)
class Addition:
    """A number for each of some tokens; no pair of place and token comes twice.

    Attributes:
        places: [num_tokens] int64, rows of the logits.
        token_ids: [num_tokens] int64.
        values: [num_tokens] float32.
    """

    places: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]

    def apply(self, logits: Tensor) -> None:
        """Add the numbers to logits [draws, vocab_size]."""
        logits[on_device(self.places, logits), on_device(self.token_ids, logits)] += on_device(self.values, logits)


def on_device(array: NDArray[Any], like: Tensor) -> Tensor:
    """Return an array as a tensor where another one is, without waiting for what that device is doing."""
    tensor = torch.from_numpy(array)
    if like.device.type == "cuda":  # a copy from memory that is not pinned would wait
        return tensor.pin_memory().to(like.device, non_blocking=True)
    return tensor.to(like.device)
