"""StoredTensor: a quantised tensor as its file stores it, not expanded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.weights.blocks import Bytes
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.gguf import TensorType

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a GGUF file in one of its block types, or of whole numbers.

    rows: [shape[0], bytes per row] uint8, contiguous; it may be a view into the file's map, so nobody writes to it.
    type: how a row's bytes are packed. shape: of the values, the slowest dimension first.
    """

    rows: Bytes
    type: TensorType
    shape: tuple[int, ...]

    def values(self) -> Tensor:
        """Return the values the file means: [*shape] float32, newly allocated."""
        import torch

        return torch.from_numpy(dequantize(self.rows, self.type, self.shape))

    def as_tensor(self) -> Tensor:
        """Return `rows` as a tensor that shares their memory."""
        import torch

        return torch.from_numpy(self.rows)
