"""has_finite_scales: whether a packed weight's own scales are numbers, seen without reading its codes."""

import torch
from torch import Tensor

from octavo_kernels.packed_planes import PlaneLayout
from octavo_kernels.packed_weight import PANEL, PackedWeight, WeightFormat

_CHUNK_BLOCKS = 1 << 12  # copies stay in a core's cache

_SCALE_BYTES = {WeightFormat.Q4_0: 2, WeightFormat.Q4_1: 4, WeightFormat.Q8_0: 2}
_SCALE_BYTES |= {WeightFormat.MXFP4: 1, WeightFormat.NVFP4: 4, WeightFormat.Q8_K: 4}
"""Bytes of a block's own scales (and minimum) for each output, where they are not an f16 and a minimum of planes."""

_EXPONENTS = {
    WeightFormat.MXFP4: (torch.uint8, 0xFF),
    WeightFormat.NVFP4: (torch.uint8, 0x7F),
    WeightFormat.Q8_K: (torch.int32, 0x7F800000),
}
"""Bits that are all set in what is NaN or infinite, and the dtype they are read in; of other formats those of f16."""


def has_finite_scales(weight: PackedWeight) -> bool:
    """Return whether no scale or minimum of a block is NaN or infinite; True of dense formats, which have none.

    Scales of groups inside a block are whole numbers. NVFP4's NaN is packed as the 0 that GGUF's readers take it for,
    unless its sign is set.
    """
    if weight.format.dtype is not None:
        return True
    dtype, bits = _EXPONENTS.get(weight.format, (torch.int16, 0x7C00))
    chunks = _own_scales(weight).view(dtype).split(_CHUNK_BLOCKS)
    return all(int((chunk & bits).amax()) != bits for chunk in chunks)


def _own_scales(weight: PackedWeight) -> Tensor:
    """Return a view of what every block of 32 outputs begins with: [num_blocks, bytes] uint8."""
    layout = weight.format.layout
    num_bytes = PANEL * _SCALE_BYTES.get(weight.format, 2)
    if isinstance(layout, PlaneLayout):
        num_bytes = sum(layout.part_bytes[:2])
    num_blocks = weight.num_panels * (weight.in_features // weight.format.block_inputs)
    return weight.data.view(num_blocks, -1)[:, :num_bytes]
