"""dequantize: GGUF's packed tensor types to float32, in numpy, equal to ggml's own arithmetic bit for bit.

A block holds 32 consecutive elements of a row. The 4-bit types pack element i with element i + 16 in one byte,
low bits first::

    Q4_0  d f16 | 16 bytes          x = d * (q - 8)
    Q4_1  d f16 | m f16 | 16 bytes  x = d * q + m        both products and sums rounded to float32
    Q8_0  d f16 | 32 x int8         x = d * q
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo_engine.weights.gguf import TensorType

Float32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_BLOCK = 32
_HALF = _BLOCK // 2
_CHUNK_BLOCKS = 4096  # 512 KiB of output: temporaries stay in a core's cache


def dequantize(raw: Bytes, tensor_type: TensorType, shape: tuple[int, ...]) -> Float32Array:
    """Return a tensor's values.

    Args:
        raw: The tensor's bytes, uint8, contiguous, of any shape; not modified.
        tensor_type: How the bytes are packed.
        shape: The tensor's shape, slowest dimension first.

    Returns:
        [*shape] float32, newly allocated (F32: a view of `raw`).
    """
    flat = raw.reshape(-1)
    if tensor_type is TensorType.F32:
        return flat.view("<f4").reshape(shape)
    if tensor_type is TensorType.F16:
        return flat.view("<f2").astype(np.float32).reshape(shape)
    if tensor_type is TensorType.BF16:
        return (flat.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    unpack = _UNPACK[tensor_type]
    blocks = flat.reshape(-1, tensor_type.block_bytes)
    out = np.empty((len(blocks), _BLOCK), np.float32)
    # A damaged file may hold infinite scales; numpy's warning about their products would help nobody.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            unpack(blocks[start : start + _CHUNK_BLOCKS], out[start : start + _CHUNK_BLOCKS])
    return out.reshape(shape)


def _half_column(blocks: Bytes, start: int) -> Float32Array:
    """Return the f16 at byte `start` of each block as [num_blocks, 1] float32."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, out: Float32Array) -> None:
    out[:, :_HALF] = packed & np.uint8(15)
    out[:, _HALF:] = packed >> np.uint8(4)


def _unpack_q4_0(blocks: Bytes, out: Float32Array) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= _half_column(blocks, 0)


def _unpack_q4_1(blocks: Bytes, out: Float32Array) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half_column(blocks, 0)
    out += _half_column(blocks, 2)


def _unpack_q8_0(blocks: Bytes, out: Float32Array) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half_column(blocks, 0)


_UNPACK: dict[TensorType, Callable[[npt.NDArray[Any], Float32Array], None]] = {
    TensorType.Q4_0: _unpack_q4_0,
    TensorType.Q4_1: _unpack_q4_1,
    TensorType.Q8_0: _unpack_q8_0,
}
