"""QuantizedTensor: a linear's weight as a quantised checkpoint stores it, several tensors that mean one matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from octavo_engine.weights.cut import Cut

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

    @abstractmethod
    def part(self, cut: Cut) -> QuantizedTensor:
        """Return some rows or columns, whose values are those of the whole, bit for bit, with the scales they need.

        Columns are cut at multiples of `column_block`.
        """

    @property
    def column_block(self) -> int:
        """How many neighbouring columns are stored as one."""
        return 1

    def shape_of(self, cut: Cut) -> tuple[int, int]:
        """Return the shape of a part."""
        rows, columns = cut.of(self.shape)
        return rows, columns

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


def regrouped(group_size: int, start: int, stop: int) -> tuple[int, Tensor]:
    """Cut rows or columns that share scales by groups of neighbours, and do so inside of groups if need be.

    Args:
        group_size: of the whole.
        start: of the part.
        stop: of the part.

    Returns:
        The size of the part's groups, the largest that divides all of it, and the group of the whole that each is of.

    """
    size = math.gcd(group_size, start, stop)
    return size, torch.arange(start, stop, size) // group_size
