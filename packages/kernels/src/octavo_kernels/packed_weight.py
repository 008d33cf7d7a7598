"""PackedWeight: a linear's weight in the form that products read, whatever the device, and how its bytes lie.

Output features are cut into panels of 32; the last panel is filled up with weights of value 0 (scale 0, code 0). The
panels lie one after the other, and what one product reads of a panel is contiguous. All numbers are little-endian.

Dense formats: for each input k, the panel's 32 weights in the format's own type::

    panel   k=0: o0 o1 ... o31 | k=1: o0 o1 ... o31 | ...          32 x f32, or 32 x u16 for bf16 and f16

Block formats: for each group of 32 inputs, what the 32 outputs have of it (d: scale, m: minimum, both f16)::

    group   d of o0 .. o31 | m of o0 .. o31 (q4_1 only) | row 0 | row 1 | ...
    row     32 words of 32 bits, one per output

    q4_0, q4_1  4 rows; byte b of a word of row i:  code[8i + b] (low 4 bits), code[8i + 4 + b] (high 4 bits)
    q8_0        8 rows; byte b of a word of row i:  code[4i + b] + 128

so that a group takes 576 (q4_0), 640 (q4_1) or 1088 bytes (q8_0), and every panel begins at a multiple of 64 bytes.
The codes are those of a GGUF file, and so are the values::

    q4_0  d * (code - 8)        q4_1  d * code + m        q8_0  d * code        each operation rounded to fp32

The other block formats have planes or parts; `packed_planes` and `packed_parts` say how they lie.
"""

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from octavo_kernels import _check, packed_planes
from octavo_kernels.errors import ShapeError
from octavo_kernels.packed_parts import LAYOUTS, PartLayout
from octavo_kernels.packed_planes import PlaneLayout

PANEL = 32
"""Outputs in a panel."""

GROUP = 32
"""Inputs in a group of a block format."""

CODE_OFFSET = 128
"""What q8_0 codes are stored with, so that they are unsigned."""

_ALIGNMENT = 64


class WeightFormat(Enum):
    """How a weight's values are stored: dense (f32, bf16, f16), or as GGUF's blocks of 32, 64 or 256 (all others)."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q8_0 = "q8_0"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    Q8_K = "q8_k"
    TQ2_0 = "tq2_0"
    TQ1_0 = "tq1_0"
    IQ2_XXS = "iq2_xxs"
    IQ2_XS = "iq2_xs"
    IQ2_S = "iq2_s"
    IQ3_XXS = "iq3_xxs"
    IQ3_S = "iq3_s"
    IQ1_S = "iq1_s"
    IQ1_M = "iq1_m"

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a dense format's values; None for block formats."""
        return _DTYPES.get(self)

    @property
    def block_bytes(self) -> int | None:
        """Bytes that a GGUF file stores a block in; None for dense formats."""
        layout = self.layout
        return _BLOCK_BYTES.get(self) if layout is None else layout.stored_bytes

    @property
    def block_inputs(self) -> int:
        """Inputs of a block: 32, 64 or 256; 1 for dense formats."""
        if self.dtype is not None:
            return 1
        return GROUP if self.layout is None else self.layout.block_inputs

    @property
    def planes(self) -> PlaneLayout | None:
        """How a format with planes lies, all of which Triton multiplies; None for others."""
        return _PLANES.get(self)

    @property
    def parts(self) -> PartLayout | None:
        """How a format with parts lies, which the `cpu` backend and the reference multiply; None for others."""
        return _PARTS.get(self)

    @property
    def has_minimums(self) -> bool:
        """Whether a weight is a code times a scale plus a minimum; without, products can be screened."""
        return self is WeightFormat.Q4_1 or (self.planes is not None and self.planes.has_minimum)

    @property
    def layout(self) -> PlaneLayout | PartLayout | None:
        """How a format with planes or parts lies; None for dense formats and for q4_0, q4_1 and q8_0."""
        return self.planes or self.parts


_DTYPES = MappingProxyType(
    {WeightFormat.F32: torch.float32, WeightFormat.BF16: torch.bfloat16, WeightFormat.F16: torch.float16}
)
_BLOCK_BYTES = MappingProxyType({WeightFormat.Q4_0: 18, WeightFormat.Q4_1: 20, WeightFormat.Q8_0: 34})
_PLANES = MappingProxyType(
    {
        WeightFormat.Q5_0: packed_planes.Q5_0,
        WeightFormat.Q5_1: packed_planes.Q5_1,
        WeightFormat.Q2_K: packed_planes.Q2_K,
        WeightFormat.Q3_K: packed_planes.Q3_K,
        WeightFormat.Q4_K: packed_planes.Q4_K,
        WeightFormat.Q5_K: packed_planes.Q5_K,
        WeightFormat.Q6_K: packed_planes.Q6_K,
        WeightFormat.IQ4_NL: packed_planes.IQ4_NL,
        WeightFormat.IQ4_XS: packed_planes.IQ4_XS,
    }
)
_PARTS = MappingProxyType({WeightFormat[layout.name]: layout for layout in LAYOUTS})
_GROUP_BYTES = MappingProxyType({WeightFormat.Q4_0: 576, WeightFormat.Q4_1: 640, WeightFormat.Q8_0: 1088})


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out_features, in_features], packed; made by `pack_weight`, written by nobody afterwards.

    data: [num_bytes] uint8, contiguous, beginning at a multiple of 64 bytes; laid out as the module says.

    Raises:
        ShapeError, DtypeError, OptionError: if data does not fit the format and the sizes.
    """

    data: Tensor
    format: WeightFormat
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        op = "PackedWeight"
        _check.dtype(op, "data", self.data, torch.uint8)
        _check.shape(op, "data", self.data, (packed_num_bytes(self.format, self.out_features, self.in_features),))
        _check.last_dim_contiguous(op, data=self.data)
        offset = self.data.data_ptr() % _ALIGNMENT
        _check.option(op, "data.data_ptr() % 64", offset, offset == 0, "0")

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.data.numel()

    @property
    def num_panels(self) -> int:
        """Panels of 32 outputs, the last one filled up with zeros."""
        return -(-self.out_features // PANEL)

    @property
    def num_groups(self) -> int:
        """Groups of 32 inputs; of block formats only."""
        assert self.format.dtype is None
        return self.in_features // GROUP


def packed_num_bytes(format: WeightFormat, out_features: int, in_features: int) -> int:  # noqa: A002  # the field's name
    """Return the bytes that a weight [out_features, in_features] takes when it is packed.

    Raises:
        OptionError: if a size is not above 0.
        ShapeError: if in_features is no multiple of the format's blocks of 32, 64 or 256.

    """
    op = "packed_num_bytes"
    _check.option(op, "out_features", out_features, out_features > 0, "at least 1")
    _check.option(op, "in_features", in_features, in_features > 0, "at least 1")
    panels = -(-out_features // PANEL)
    if format.dtype is not None:
        return panels * in_features * PANEL * format.dtype.itemsize
    if in_features % format.block_inputs:
        raise ShapeError(
            f"{op}: in_features is {in_features}, expected a multiple of {format.block_inputs} for {format.value}; "
            "store such a weight in a dense format"
        )
    if format.layout is not None:
        return panels * (in_features // format.block_inputs) * format.layout.block_bytes
    return panels * (in_features // GROUP) * _GROUP_BYTES[format]


def dense_panels(weight: PackedWeight) -> Tensor:
    """Return a view of a dense weight: [num_panels, in_features, 32] in its dtype."""
    assert weight.format.dtype is not None
    return weight.data.view(weight.format.dtype).view(weight.num_panels, weight.in_features, PANEL)


def block_scales(weight: PackedWeight) -> Tensor:
    """Return a view of the scales of q4_0, q4_1 or q8_0: [num_panels, num_groups, 32] fp16."""
    return _groups(weight)[:, :, : 2 * PANEL].view(torch.float16)


def block_minimums(weight: PackedWeight) -> Tensor | None:
    """Return a view of a q4_1 weight's minimums: [num_panels, num_groups, 32] fp16; None for other formats."""
    if weight.format is not WeightFormat.Q4_1:
        return None
    return _groups(weight)[:, :, 2 * PANEL : 4 * PANEL].view(torch.float16)


def block_words(weight: PackedWeight) -> Tensor:
    """Return a view of the codes of q4_0, q4_1 or q8_0: [num_panels, num_groups, rows, 32 outputs, 4 bytes] uint8."""
    rows = 8 if weight.format is WeightFormat.Q8_0 else 4
    codes = _groups(weight)[:, :, -rows * PANEL * 4 :]
    return split_last(codes, rows, PANEL, 4)


def plane_panels(weight: PackedWeight) -> Tensor:
    """Return a view of a weight with planes or parts: [num_panels, num_blocks, block_bytes] uint8."""
    assert weight.format.layout is not None
    return weight.data.view(weight.num_panels, -1, weight.format.layout.block_bytes)


def split_last(tensor: Tensor, *sizes: int) -> Tensor:
    """View the last dimension as several."""
    return tensor.view(*tensor.shape[:-1], *sizes)


def _groups(weight: PackedWeight) -> Tensor:
    return weight.data.view(weight.num_panels, weight.num_groups, _GROUP_BYTES[weight.format])
