"""QuantizedTensor: a linear's weight as a quantised checkpoint stores it, several tensors that mean one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class QuantizedTensor(ABC):
    """A matrix [out_features, in_features] that stays in the codes of its format, with their scales.

    A subclass is a dataclass of the tensors that a file has of one linear; nobody writes to them. They may be views
    into the file's map, until `on` copies them.
    """

    shape: tuple[int, int]

    @abstractmethod
    def values(self, rows: slice = ALL) -> Tensor:
        """Return what the file means by some of the rows: [num_rows, in_features] fp32, newly allocated."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it is made of."""
        found = (getattr(self, item.name) for item in fields(self))
        return [value for value in found if isinstance(value, Tensor)]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def on(self, device: torch.device) -> Self:
        """Return a copy in a device's memory, apart from the file."""
        moved: dict[str, Any] = {
            item.name: value.to(device, copy=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)
