"""IntWeight: a linear's weight as codes of 4 or 8 bits with a scale per group of inputs, and what it is made of.

Codes lie in words of 32 bits, packed along the inputs, so that a row of words is one input of each code position for
all outputs. Inputs are cut into blocks of 16 * codes_per_word (128 inputs of 4 bits, 64 of 8 bits; the last block is
filled up), and word r of a block has input 16 * j + r of it in its j-th field, lowest bits first::

    words [num_blocks * 16, out_features]      4 bits: bits 4j .. 4j+3 of row 16b + r  =  input 128b + 16j + r
                                               8 bits: bits 8j .. 8j+7 of row 16b + r  =  input  64b + 16j + r

A shift of 16 rows of words gives 16 neighbouring inputs, what a tensor core takes at once, and no value moves between
threads. A value is, each operation rounded to fp32::

    scale * (code - zero)        zero from `zeros`, or `zero_point` for all        + minimum, where there are minimums

GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and GGUF's blocks of 32 all have this form, and keep their values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.errors import ShapeError
from octavo_kernels.packed_weight import (
    CODE_OFFSET,
    GROUP,
    PackedWeight,
    WeightFormat,
    block_minimums,
    block_scales,
    block_words,
)

ROWS = 16
"""Rows of words in a block."""

_WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring outputs each field of an AWQ word holds, lowest bits first."""


@dataclass(frozen=True, slots=True)
class IntWeight:
    """A weight [out_features, in_features] in codes, made by an `int_weight_from_...`; written by nobody afterwards.

    words: [num_blocks * 16, out_features] int32, contiguous, laid out as the module says.
    scales: [num_groups, out_features], a floating dtype, contiguous.
    zeros: [num_groups, out_features] int16, contiguous; None where `zero_point` is the zero of all.
    minimums: [num_groups, out_features] in the dtype of scales, contiguous, or None.
    bits: 4 or 8.
    group_size: inputs that share a scale: a power of two from 16 on, or in_features for one scale per output.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: if a tensor does not fit.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    minimums: Tensor | None
    in_features: int
    group_size: int
    bits: int = 4
    zero_point: int = 0

    def __post_init__(self) -> None:
        op = "IntWeight"
        _check.option(op, "bits", self.bits, self.bits in (4, 8), "4 or 8")
        _check.option(op, "in_features", self.in_features, self.in_features > 0, "at least 1")
        size = self.group_size
        known = size == self.in_features or (size >= ROWS and size & (size - 1) == 0)
        _check.option(op, "group_size", size, known, "a power of two from 16 on, or in_features")
        _check.dtype(op, "words", self.words, torch.int32)
        _check.shape(op, "words", self.words, (self.num_blocks * ROWS, "out_features"))
        shape = (self.num_groups, self.out_features)
        _check.floating(op, scales=self.scales)
        _check.shape(op, "scales", self.scales, shape)
        if self.zeros is not None:
            _check.dtype(op, "zeros", self.zeros, torch.int16)
            _check.shape(op, "zeros", self.zeros, shape)
        if self.minimums is not None:
            _check.dtype(op, "minimums", self.minimums, self.scales.dtype)
            _check.shape(op, "minimums", self.minimums, shape)
        tensors = {"words": self.words, "scales": self.scales, "zeros": self.zeros, "minimums": self.minimums}
        _check.same_device(op, **tensors)
        _check.contiguous(op, **{name: tensor for name, tensor in tensors.items() if tensor is not None})

    @property
    def out_features(self) -> int:
        """Rows of the weight, columns of a product by it."""
        return self.words.shape[1]

    @property
    def block_inputs(self) -> int:
        """Inputs in a block of 16 rows of words."""
        return ROWS * _WORD_BITS // self.bits

    @property
    def num_blocks(self) -> int:
        """Blocks of inputs, the last one filled up."""
        return -(-self.in_features // self.block_inputs)

    @property
    def num_groups(self) -> int:
        """Groups of inputs that share a scale, the last one perhaps smaller."""
        return -(-self.in_features // self.group_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        tensors = (self.words, self.scales, self.zeros, self.minimums)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def int_weight_from_codes(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    zeros: Tensor | None = None,
    minimums: Tensor | None = None,
    zero_point: int = 0,
) -> IntWeight:
    """Return a weight made of codes.

    Args:
        codes: [in_features, out_features], an integer dtype, each from 0 to 2**bits - 1.
        scales: [num_groups, out_features], a floating dtype.
        bits: 4 or 8.
        group_size: inputs that share a scale.
        zeros: [num_groups, out_features], an integer dtype, or None.
        minimums: [num_groups, out_features] in the dtype of scales, or None.
        zero_point: the zero of all groups where `zeros` is None.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "int_weight_from_codes"
    _check.rank(op, "codes", codes, ("in_features", "out_features"))
    _check.option(op, "bits", bits, bits in (4, 8), "4 or 8")
    per_word = _WORD_BITS // bits
    num_blocks = -(-len(codes) // (ROWS * per_word))
    filled = torch.zeros((num_blocks * ROWS * per_word, codes.shape[1]), dtype=torch.int64, device=codes.device)
    filled[: len(codes)] = codes
    fields = filled.view(num_blocks, per_word, ROWS, -1)
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (fields << shifts[:, None, None]).sum(dim=1).flatten(0, 1)
    return IntWeight(
        _as_int32(words),
        scales.contiguous(),
        None if zeros is None else zeros.to(torch.int16).contiguous(),
        None if minimums is None else minimums.contiguous(),
        len(codes),
        group_size,
        bits,
        zero_point,
    )


def int_weight_from_gptq(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    *,
    bits: int = 4,
    zero_offset: int = 1,
    order: Tensor | None = None,
) -> IntWeight:
    """Return a GPTQ checkpoint's weight (arXiv 2210.17323); its values stay what they are.

    Args:
        qweight: [in_features * bits / 32, out_features] int32, neighbouring inputs in a word, lowest bits first.
        qzeros: [num_groups, out_features * bits / 32] int32, neighbouring outputs in a word; None for symmetric codes,
            whose zero is 2**(bits - 1).
        scales: [num_groups, out_features], a floating dtype.
        bits: 4 or 8.
        zero_offset: what was taken off the zeros when they were stored: 1, or 0 for the format "gptq_v2".
        order: [in_features] int64, which stored input stands at each place of the weight that is returned; for
            checkpoints with `desc_act` it is `g_idx.argsort(stable=True)`, and the product wants `x[:, order]`.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "int_weight_from_gptq"
    _check.rank(op, "qweight", qweight, ("in_features * bits / 32", "out_features"))
    _check.dtype(op, "qweight", qweight, torch.int32)
    _check.option(op, "bits", bits, bits in (4, 8), "4 or 8")
    codes = _fields(qweight, bits).transpose(1, 2).flatten(0, 1)  # [word, output, field] -> [input, output]
    group_size = _group_size(op, scales, *codes.shape)
    zeros = None
    if qzeros is not None:
        _check.dtype(op, "qzeros", qzeros, torch.int32)
        _check.shape(op, "qzeros", qzeros, (len(scales), codes.shape[1] * bits // _WORD_BITS))
        zeros = _fields(qzeros, bits).flatten(1) + zero_offset
    if order is not None:
        _check.shape(op, "order", order, (len(codes),))
        codes = codes[order]
    return int_weight_from_codes(
        codes, scales, bits=bits, group_size=group_size, zeros=zeros, zero_point=1 << (bits - 1)
    )


def int_weight_from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> IntWeight:
    """Return an AWQ checkpoint's weight (arXiv 2306.00978); its values stay what they are.

    Args:
        qweight: [in_features, out_features / 8] int32, 8 neighbouring outputs in a word, in the order 0, 2, 4, 6, 1, 3,
            5, 7 from the lowest bits on.
        qzeros: [num_groups, out_features / 8] int32, in the same order.
        scales: [num_groups, out_features], a floating dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "int_weight_from_awq"
    _check.rank(op, "qweight", qweight, ("in_features", "out_features / 8"))
    _check.dtype(op, "qweight", qweight, torch.int32)
    _check.dtype(op, "qzeros", qzeros, torch.int32)
    group_size = _group_size(op, scales, len(qweight), qweight.shape[1] * 8)
    _check.shape(op, "qzeros", qzeros, (len(scales), qweight.shape[1]))
    places = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
    codes, zeros = (_fields(words, 4)[..., places].flatten(1) for words in (qweight, qzeros))
    return int_weight_from_codes(codes, scales, bits=4, group_size=group_size, zeros=zeros)


def int_weight_from_packed(weight: PackedWeight) -> IntWeight:
    """Return a packed weight of q4_0, q4_1 or q8_0 in the layout of products on GPUs; its values stay what they are.

    Raises:
        OptionError: if the weight is dense, or its format has planes or parts.

    """
    op = "int_weight_from_packed"
    served = weight.format.dtype is None and weight.format.layout is None
    _check.option(op, "weight.format", weight.format, served, "a format with blocks: q4_0, q4_1 or q8_0")
    is_q8 = weight.format is WeightFormat.Q8_0
    codes = block_words(weight).transpose(2, 3)  # [panel, group, output, row, byte]
    codes = codes.flatten(-2) if is_q8 else torch.stack([codes & 15, codes >> 4], dim=-2).flatten(-3)

    def by_group(panels: Tensor) -> Tensor:
        return panels.transpose(0, 1).flatten(1)[:, : weight.out_features].contiguous()

    minimums = block_minimums(weight)
    return int_weight_from_codes(
        codes.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:, : weight.out_features],
        by_group(block_scales(weight)),
        bits=8 if is_q8 else 4,
        group_size=GROUP,
        minimums=None if minimums is None else by_group(minimums),
        zero_point=CODE_OFFSET if is_q8 else 8 if weight.format is WeightFormat.Q4_0 else 0,
    )


def int_weight_values(weight: IntWeight) -> Tensor:
    """Return the values of a weight: [out_features, in_features] fp32, what products mean."""
    codes = _fields(weight.words, weight.bits).view(weight.num_blocks, ROWS, weight.out_features, -1)
    codes = codes.permute(0, 3, 1, 2).flatten(0, 2)[: weight.in_features]  # [block, field, row, output]
    groups = torch.arange(weight.in_features, device=codes.device) // weight.group_size
    zeros = weight.zero_point if weight.zeros is None else weight.zeros[groups].long()
    values = (codes - zeros).float() * weight.scales.float()[groups]
    if weight.minimums is not None:
        values += weight.minimums.float()[groups]
    return values.T.contiguous()


def _fields(words: Tensor, bits: int) -> Tensor:
    """Return the fields of words, lowest bits first: [..., 32 / bits] int64."""
    shifts = torch.arange(0, _WORD_BITS, bits, device=words.device)
    return (words.long()[..., None] >> shifts) & ((1 << bits) - 1)


def _as_int32(words: Tensor) -> Tensor:
    """Return the low 32 bits of int64, the highest of them as the sign."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def _group_size(op: str, scales: Tensor, in_features: int, out_features: int) -> int:
    _check.floating(op, scales=scales)
    _check.shape(op, "scales", scales, ("num_groups", out_features))
    if not len(scales) or in_features % len(scales):
        raise ShapeError(
            f"{op}: scales has {len(scales)} groups, expected a divisor of the {in_features} inputs; "
            "pass one row of scales per group"
        )
    return in_features // len(scales)
