"""dequantize: GGUF's tensor types to float32, in numpy, equal to ggml's own arithmetic bit for bit.

The first quantised types are here, K types in `k_types`, those with tables in `iq_types`. A block of the first ones
holds 32 consecutive elements of a row; types of 4 and 5 bits pack element i with element i + 16 in one byte, low bits
first, and a fifth bit of element i is bit i of a word::

    Q4_0  d f16 | 16 bytes                 x = d * (q - 8)
    Q4_1  d f16 | m f16 | 16 bytes         x = d * q + m     both products and sums rounded to float32
    Q5_0  d f16 | 4 bytes | 16 bytes       x = d * (q - 16)
    Q5_1  d f16 | m f16 | 4 | 16 bytes     x = d * q + m
    Q8_0  d f16 | 32 x int8                x = d * q
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from octavo_engine.weights import iq_types, k_types
from octavo_engine.weights.blocks import Bytes, Float32Array, Unpack, fields, half_column
from octavo_engine.weights.gguf import TensorType

_CHUNK_ELEMENTS = 1 << 17  # 512 KiB of output: temporaries stay in a core's cache
_PLAIN = MappingProxyType(
    {
        TensorType.F16: "<f2",
        TensorType.F64: "<f8",
        TensorType.I8: "<i1",
        TensorType.I16: "<i2",
        TensorType.I32: "<i4",
        TensorType.I64: "<i8",
    }
)


def dequantize(raw: Bytes, tensor_type: TensorType, shape: tuple[int, ...]) -> Float32Array:
    """Return a tensor's values.

    Args:
        raw: The tensor's bytes, uint8, contiguous, of any shape; not modified.
        tensor_type: How the bytes are packed.
        shape: The tensor's shape, slowest dimension first.

    Returns:
        [*shape] float32, newly allocated (F32: a view of `raw`). Whole numbers and F64 are rounded to it.
    """
    flat = raw.reshape(-1)
    if tensor_type is TensorType.F32:
        return flat.view("<f4").reshape(shape)
    if tensor_type is TensorType.BF16:
        return (flat.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    # A damaged file may hold infinite scales; numpy's warning about their products would help nobody.
    with np.errstate(invalid="ignore", over="ignore"):
        if tensor_type in _PLAIN:
            return flat.view(_PLAIN[tensor_type]).astype(np.float32).reshape(shape)
        unpack = _UNPACK[tensor_type]
        blocks = flat.reshape(-1, tensor_type.block_bytes)
        out = np.empty((len(blocks), tensor_type.block_elements), np.float32)
        step = _CHUNK_ELEMENTS // tensor_type.block_elements
        for start in range(0, len(blocks), step):
            unpack(blocks[start : start + step], out[start : start + step])
    return out.reshape(shape)


def _unpack_q4_0(blocks: Bytes, out: Float32Array) -> None:
    out[...] = fields(blocks[:, 2:], 4, 16)
    out -= np.float32(8)
    out *= half_column(blocks, 0)


def _unpack_q4_1(blocks: Bytes, out: Float32Array) -> None:
    out[...] = fields(blocks[:, 4:], 4, 16)
    out *= half_column(blocks, 0)
    out += half_column(blocks, 2)


def _five_bits(blocks: Bytes, start: int) -> Bytes:
    """Return codes whose high bits begin at byte `start`, the low ones after them."""
    high = np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=1, bitorder="little")
    return fields(blocks[:, start + 4 :], 4, 16) | high << np.uint8(4)


def _unpack_q5_0(blocks: Bytes, out: Float32Array) -> None:
    out[...] = _five_bits(blocks, 2)
    out -= np.float32(16)
    out *= half_column(blocks, 0)


def _unpack_q5_1(blocks: Bytes, out: Float32Array) -> None:
    out[...] = _five_bits(blocks, 4)
    out *= half_column(blocks, 0)
    out += half_column(blocks, 2)


def _unpack_q8_0(blocks: Bytes, out: Float32Array) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= half_column(blocks, 0)


_UNPACK: MappingProxyType[TensorType, Unpack] = MappingProxyType(
    {
        TensorType.Q4_0: _unpack_q4_0,
        TensorType.Q4_1: _unpack_q4_1,
        TensorType.Q5_0: _unpack_q5_0,
        TensorType.Q5_1: _unpack_q5_1,
        TensorType.Q8_0: _unpack_q8_0,
        TensorType.Q2_K: k_types.unpack_q2_k,
        TensorType.Q3_K: k_types.unpack_q3_k,
        TensorType.Q4_K: k_types.unpack_q4_k,
        TensorType.Q5_K: k_types.unpack_q5_k,
        TensorType.Q6_K: k_types.unpack_q6_k,
        TensorType.Q8_K: k_types.unpack_q8_k,
        TensorType.TQ1_0: k_types.unpack_tq1_0,
        TensorType.TQ2_0: k_types.unpack_tq2_0,
        TensorType.IQ1_S: iq_types.unpack_iq1_s,
        TensorType.IQ1_M: iq_types.unpack_iq1_m,
        TensorType.IQ2_XXS: iq_types.unpack_iq2_xxs,
        TensorType.IQ2_XS: iq_types.unpack_iq2_xs,
        TensorType.IQ2_S: iq_types.unpack_iq2_s,
        TensorType.IQ3_XXS: iq_types.unpack_iq3_xxs,
        TensorType.IQ3_S: iq_types.unpack_iq3_s,
        TensorType.IQ4_NL: iq_types.unpack_iq4_nl,
        TensorType.IQ4_XS: iq_types.unpack_iq4_xs,
        TensorType.MXFP4: iq_types.unpack_mxfp4,
        TensorType.NVFP4: iq_types.unpack_nvfp4,
    }
)
