"""Fields of GGUF's blocks: halves, groups of bits and their types, as numpy arrays with one row per block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

Unpack = Callable[[Bytes, Float32Array], None]
"""Fills the values [num_blocks, block_elements] from the blocks [num_blocks, block_bytes]."""


def half_column(blocks: Bytes, start: int) -> Float32Array:
    """Return the f16 at byte `start` of each block as [num_blocks, 1] float32."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def words(blocks: Bytes, start: int, stop: int, dtype: str) -> npt.NDArray[np.unsignedinteger]:
    """Return bytes start .. stop - 1 of each block as little-endian words."""
    found: npt.NDArray[np.unsignedinteger] = np.ascontiguousarray(blocks[:, start:stop]).view(dtype)
    return found


def fields(packed: Bytes, num_bits: int, run: int) -> Bytes:
    """Return fields of 1, 2 or 4 bits, lowest first: [num_blocks, num_bytes * 8 // num_bits].

    The bytes come in runs: the first fields of a run's bytes stand before their second fields, and so on.
    """
    runs = packed.reshape(len(packed), -1, 1, run)
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & np.uint8((1 << num_bits) - 1)).reshape(len(packed), -1)


def scaled(codes: npt.NDArray[np.number], scales: Float32Array, out: Float32Array) -> Float32Array:
    """Fill `out` with codes times the scale of their group: scales [num_blocks, num_groups]; return out by groups."""
    groups = out.reshape(*scales.shape, -1)
    groups[...] = codes.reshape(groups.shape)
    groups *= scales[..., None]
    return groups
