"""has_finite_scales: whether blocks of a GGUF file have scales that are NaN or infinite, which no writer makes.

A float is neither when a bit of its exponent is clear (E8M0 and E4M3, which have no infinities: any bit). So the bits
that are all set in what is neither say for each type what to look for, in words of the file that hold nothing but
scales; the scales of groups inside a block are whole numbers.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from octavo_engine.weights.blocks import Bytes
from octavo_engine.weights.gguf import TensorType

_CHUNK_BLOCKS = 1 << 14  # copies stay in a core's cache


class _Scales(NamedTuple):
    """A run of bytes in each block, which is read as one word, and the numbers in it.

    `num_bytes` is 1, 2, 4 or 8, and divides `start` and the bytes of a block. A number with all bits of `bits` set is
    no scale.
    """

    start: int
    num_bytes: int
    dtype: str
    bits: int


def _halves(start: int, count: int = 1) -> _Scales:
    return _Scales(start, 2 * count, "<u2", 0x7C00)


_SCALES = MappingProxyType(
    {
        TensorType.Q4_0: _halves(0),
        TensorType.Q4_1: _halves(0, 2),
        TensorType.Q5_0: _halves(0),
        TensorType.Q5_1: _halves(0, 2),
        TensorType.Q8_0: _halves(0),
        TensorType.Q2_K: _halves(80, 2),
        TensorType.Q3_K: _halves(108),
        TensorType.Q4_K: _halves(0, 2),
        TensorType.Q5_K: _halves(0, 2),
        TensorType.Q6_K: _halves(208),
        TensorType.Q8_K: _Scales(0, 4, "<u4", 0x7F800000),
        TensorType.TQ1_0: _halves(52),
        TensorType.TQ2_0: _halves(64),
        TensorType.IQ1_S: _halves(0),
        TensorType.IQ1_M: _Scales(48, 8, "<u8", 0x7000C00000000000),  # an f16 in pieces of 4 bits: see `iq_types`
        TensorType.IQ2_XXS: _halves(0),
        TensorType.IQ2_XS: _halves(0),
        TensorType.IQ2_S: _halves(0),
        TensorType.IQ3_XXS: _halves(0),
        TensorType.IQ3_S: _halves(0),
        TensorType.IQ4_NL: _halves(0),
        TensorType.IQ4_XS: _halves(0),
        TensorType.MXFP4: _Scales(0, 1, "u1", 0xFF),
        TensorType.NVFP4: _Scales(0, 4, "u1", 0x7F),  # the sign is not read
    }
)


def has_finite_scales(rows: Bytes, tensor_type: TensorType) -> bool:
    """Return whether no scale of a block is NaN or infinite; types without blocks have none. A scale of 0 is finite.

    Args:
        rows: the blocks as they are stored, contiguous, of any shape; only the bytes of scales are looked at.
        tensor_type: their type.
    """
    scales = _SCALES.get(tensor_type)
    if scales is None:
        return True
    step = tensor_type.block_bytes // scales.num_bytes
    words = rows.reshape(-1).view(f"<u{scales.num_bytes}")[scales.start // scales.num_bytes :: step]
    for start in range(0, len(words), _CHUNK_BLOCKS):
        numbers = np.ascontiguousarray(words[start : start + _CHUNK_BLOCKS]).view(scales.dtype)
        bits = numbers.dtype.type(scales.bits)
        if bool(((numbers & bits) == bits).any()):
            return False
    return True
