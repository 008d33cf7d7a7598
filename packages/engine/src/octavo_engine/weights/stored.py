"""StoredTensor: a quantised tensor as its file stores it, not expanded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo_engine.errors import CorruptModelFile
from octavo_engine.weights.block_scales import has_finite_scales
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
    where: what errors begin with: the file and the tensor's name in it.
    """

    rows: Bytes
    type: TensorType
    shape: tuple[int, ...]
    where: str = "a tensor"

    def values(self) -> Tensor:
        """Return the values the file means: [*shape] float32, newly allocated; raises as `check_scales`."""
        import torch

        self.check_scales()
        return torch.from_numpy(dequantize(self.rows, self.type, self.shape))

    def as_tensor(self) -> Tensor:
        """Return `rows` as a tensor that shares their memory."""
        import torch

        return torch.from_numpy(self.rows)

    def check_scales(self) -> None:
        """Return if all blocks have finite scales; types without blocks have none.

        Raises:
            CorruptModelFile: if a scale is NaN or infinite.
        """
        if not has_finite_scales(self.rows, self.type):
            raise CorruptModelFile(
                f"{self.where} of type {self.type.name}: expected finite scales of blocks, found NaN or infinity; "
                "download or convert the file again"
            )
