"""GGUF's IQ types and 4-bit floats: codes are indices into tables, of levels (4 bits) or of a grid's points.

`grid` is a coordinate of a point of the type's grid (see `octavo_kernels.grids`), `level` one of 16. A block has 32
elements in the first two types, 64 in NVFP4, 256 in the others::

    IQ4_NL   d f16 | 16 bytes                                              x = d * level
    MXFP4    exponent u8 | 16 bytes                                        x = 2**(exponent - 128) * level
    NVFP4    4 x (e4m3 scale, no sign) | 4 x 8 bytes                       x = scale / 2 * level, groups of 16
    IQ4_XS   d f16 | 8 x 2 high bits u16 | 4 bytes of low bits | 128 bytes x = d * (scale - 32) * level, groups of 32
    IQ2_XXS  d f16 | 8 x (4 points u8, signs and scale u32)                x = d * (scale + 1/2) / 4 * sign * grid
    IQ2_XS   d f16 | 32 x (point of 9 bits, signs of 7) | 16 scales        the same, groups of 16
    IQ2_S    d f16 | 32 points u8 | 32 signs u8 | 8 bytes | 16 scales      the same, points with 2 high bits
    IQ3_XXS  d f16 | 64 points u8 | 8 x (signs and scale u32)              x = d * (scale + 1/2) / 2 * sign * grid
    IQ3_S    d f16 | 64 points u8 | 8 bytes | 32 signs u8 | 8 scales       x = d * (2 scale + 1) * sign * grid
    IQ1_S    d f16 | 32 points u8 | 8 x u16                                x = d * (2 scale + 1) * (grid +- 1/8)
    IQ1_M    32 points u8 | 16 bytes of high bits and signs | 4 x u16      the same, groups of 16, d in the last words
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from octavo_engine.weights.blocks import Bytes, Float32Array, fields, half_column, scaled, words

_IQ4_LEVELS = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
_FP4_LEVELS = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)  # twice the e2m1 values
_DELTA = np.float32(0.125)

# Seven bits say the signs of eight values: the eighth makes the number of minus signs even.
_EVEN_SIGNS = np.array([bits | (bits.bit_count() & 1) << 7 for bits in range(128)], np.uint8)


def unpack_iq4_nl(blocks: Bytes, out: Float32Array) -> None:
    scaled(_IQ4_LEVELS[fields(blocks[:, 2:], 4, 16)], half_column(blocks, 0), out)


def unpack_mxfp4(blocks: Bytes, out: Float32Array) -> None:
    exponent = blocks[:, :1].astype(np.uint32)
    # 2**(exponent - 128); the two smallest are subnormal numbers of float32.
    small = np.uint32(0x00200000) << np.minimum(exponent, np.uint32(1))
    bits = np.where(exponent < 2, small, (exponent - np.uint32(1)) << np.uint32(23))
    scaled(_FP4_LEVELS[fields(blocks[:, 1:], 4, 16)], bits.astype(np.uint32).view(np.float32), out)


def unpack_nvfp4(blocks: Bytes, out: Float32Array) -> None:
    scales = blocks[:, :4]
    exponent, mantissa = (scales >> np.uint8(3)) & np.uint8(15), (scales & np.uint8(7)).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent.astype(np.int32) - 8)
    halved = np.where(exponent == 0, np.ldexp(mantissa, -10), normal)
    halved[(scales == 0) | (scales == 0x7F)] = 0
    codes = fields(blocks[:, 4:], 4, 8)
    scaled(_FP4_LEVELS[codes], halved.astype(np.float32), out)


def unpack_iq4_xs(blocks: Bytes, out: Float32Array) -> None:
    low = fields(blocks[:, 4:8], 4, 1)
    high = fields(blocks[:, 2:4], 2, 1)
    scales = half_column(blocks, 0) * ((low | high << np.uint8(4)).astype(np.int8) - np.int8(32))
    scaled(_IQ4_LEVELS[fields(blocks[:, 8:], 4, 16)], scales, out)


@cache
def _grid(name: str) -> Float32Array:
    """Return the points of a grid of `octavo_kernels.grids`: [num_points, num_dims]; do not write to it."""
    from octavo_kernels import grids  # imports torch, which no header needs

    points: Float32Array = grids.grid_points(getattr(grids, name)).numpy().astype(np.float32)
    return points


def _signed_points(grid: str, indices: npt.NDArray[np.integer], signs: Bytes) -> Float32Array:
    """Return [num_blocks, 256] coordinates; each byte of signs is for 8 of them, set bits for minus."""
    points: Float32Array = _grid(grid)[indices].reshape(len(indices), -1)
    minus = fields(signs, 1, 1).astype(bool)
    np.negative(points, out=points, where=minus)
    return points


def _signs_of_words(packed: npt.NDArray[np.unsignedinteger]) -> tuple[Bytes, Float32Array]:
    """Return what [num_blocks, 8] words of 32 bits hold: 4 times 7 bits of signs, as 32 bytes, and 8 scales."""
    shifts = np.array((0, 7, 14, 21), np.uint32)
    sevens = (packed[..., None] >> shifts) & np.uint32(127)
    return _EVEN_SIGNS[sevens].reshape(len(packed), -1), (packed >> np.uint32(28)).astype(np.float32)


def unpack_iq2_xxs(blocks: Bytes, out: Float32Array) -> None:
    pairs = blocks[:, 2:].reshape(len(blocks), 8, 8)
    signs, scales = _signs_of_words(np.ascontiguousarray(pairs[..., 4:]).view("<u4")[..., 0])
    points = _signed_points("IQ2_XXS_GRID", pairs[..., :4].reshape(len(blocks), -1), signs)
    scaled(points, half_column(blocks, 0) * (scales + np.float32(0.5)) * np.float32(0.25), out)


def _quarter_scales(blocks: Bytes, start: int) -> Float32Array:
    """Return d * (scale + 1/2) / 4 of the 16 groups whose scales of 4 bits begin at byte `start`."""
    scales = fields(blocks[:, start : start + 8], 4, 1).astype(np.float32)
    return half_column(blocks, 0) * (scales + np.float32(0.5)) * np.float32(0.25)


def unpack_iq2_xs(blocks: Bytes, out: Float32Array) -> None:
    packed = words(blocks, 2, 66, "<u2")
    points = _signed_points("IQ2_XS_GRID", packed & np.uint16(511), _EVEN_SIGNS[packed >> np.uint16(9)])
    scaled(points, _quarter_scales(blocks, 66), out)


def unpack_iq2_s(blocks: Bytes, out: Float32Array) -> None:
    indices = blocks[:, 2:34] | fields(blocks[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8)
    scaled(_signed_points("IQ2_S_GRID", indices, blocks[:, 34:66]), _quarter_scales(blocks, 74), out)


def unpack_iq3_xxs(blocks: Bytes, out: Float32Array) -> None:
    signs, scales = _signs_of_words(words(blocks, 66, 98, "<u4"))
    points = _signed_points("IQ3_XXS_GRID", blocks[:, 2:66], signs)
    scaled(points, half_column(blocks, 0) * (scales + np.float32(0.5)) * np.float32(0.5), out)


def unpack_iq3_s(blocks: Bytes, out: Float32Array) -> None:
    indices = blocks[:, 2:66] | fields(blocks[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    scales = np.uint8(2) * fields(blocks[:, 106:110], 4, 1) + np.uint8(1)
    scaled(_signed_points("IQ3_S_GRID", indices, blocks[:, 74:106]), half_column(blocks, 0) * scales, out)


def unpack_iq1_s(blocks: Bytes, out: Float32Array) -> None:
    packed = words(blocks, 34, 50, "<u2")
    high = (packed[..., None] >> np.array((0, 3, 6, 9), np.uint16)) & np.uint16(7)
    indices = blocks[:, 2:34] | high.reshape(len(blocks), -1) << np.uint16(8)
    scales = (packed >> np.uint16(11)) & np.uint16(14) | np.uint16(1)
    delta = np.where(packed & np.uint16(0x8000), -_DELTA, _DELTA)
    points = _grid("IQ1_GRID")[indices].reshape(len(blocks), 8, -1) + delta[..., None]
    scaled(points, half_column(blocks, 0) * scales, out)


def unpack_iq1_m(blocks: Bytes, out: Float32Array) -> None:
    packed = words(blocks, 48, 56, "<u2")
    # The f16 lies in pieces of 4 bits at the top of four words, the lowest piece in the first.
    pieces = (packed & np.uint16(0xF000)) >> np.array((12, 8, 4, 0), np.uint16)
    d = np.bitwise_or.reduce(pieces, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    threes = (packed[..., None] >> np.array((0, 3, 6, 9), np.uint16)) & np.uint16(7)
    scales = np.uint16(2) * threes.reshape(len(blocks), -1) + np.uint16(1)
    high = fields(blocks[:, 32:48], 4, 1)
    indices = blocks[:, :32] | (high & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    delta = np.where(high & np.uint8(8), -_DELTA, _DELTA)
    points = _grid("IQ1_GRID")[indices] + delta[..., None]
    scaled(points, d * scales, out)
