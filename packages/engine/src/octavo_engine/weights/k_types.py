"""GGUF's K types, and the ternary types: blocks of 256 elements, whose groups of 16 or 32 have scales of 4 to 8 bits.

Scales and minimums of groups are whole numbers times the block's own, an f16 each::

    Q2_K  16 x (scale, min) of 4 bits | 64 bytes | d f16 | dmin f16        x = d * scale * q - dmin * min, groups of 16
    Q3_K  32 bytes of high bits | 64 bytes | 12 bytes of scales | d f16    x = d * (scale - 32) * (q - 4), groups of 16
    Q4_K  d f16 | dmin f16 | 12 bytes of scales, mins | 128 bytes          x = d * scale * q - dmin * min, groups of 32
    Q5_K  d f16 | dmin f16 | 12 bytes | 32 bytes of high bits | 128 bytes  the same
    Q6_K  128 bytes | 64 bytes of high bits | 16 x int8 | d f16            x = d * scale * (q - 32), groups of 16
    Q8_K  d f32 | 256 x int8 | 16 sums of int16, not needed                x = d * q
    TQ1_0 48 bytes of 5 ternary digits | 4 bytes of 4 | d f16              x = d * (digit - 1)
    TQ2_0 64 bytes of 2 bits | d f16                                       x = d * (q - 1)

Codes of 2 and 4 bits stand in runs of 32 bytes (Q6_K: 64), the lowest bits of a whole run first; high bits likewise.
"""

from __future__ import annotations

import numpy as np

from octavo_engine.weights.blocks import Bytes, Float32Array, fields, half_column, scaled


def unpack_q2_k(blocks: Bytes, out: Float32Array) -> None:
    scales = half_column(blocks, 80) * (blocks[:, :16] & np.uint8(15))
    minimums = half_column(blocks, 82) * (blocks[:, :16] >> np.uint8(4))
    scaled(fields(blocks[:, 16:80], 2, 32), scales, out)[...] -= minimums[..., None]


def unpack_q3_k(blocks: Bytes, out: Float32Array) -> None:
    low = fields(blocks[:, 96:104], 4, 8)
    high = fields(blocks[:, 104:108], 2, 4)
    scales = half_column(blocks, 108) * ((low | high << np.uint8(4)).astype(np.int8) - np.int8(32))
    codes = fields(blocks[:, 32:96], 2, 32) | fields(blocks[:, :32], 1, 32) << np.uint8(2)
    scaled(codes.astype(np.int8) - np.int8(4), scales, out)


def _scales_and_minimums(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return the 8 scales and the 8 minimums of 6 bits each that 12 bytes hold: [num_blocks, 8] both.

    Bytes 0 to 3 have the first four scales and bytes 4 to 7 the first four minimums in their low 6 bits; their high 2
    bits are those of the last four, whose low 4 bits are bytes 8 to 11, scales low.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six, four, two = np.uint8(63), np.uint8(15), np.uint8(48)
    scales = np.concatenate([first & six, (third & four) | (first >> np.uint8(2)) & two], axis=1)
    minimums = np.concatenate([second & six, (third >> np.uint8(4)) | (second >> np.uint8(2)) & two], axis=1)
    return scales, minimums


def _unpack_with_minimums(blocks: Bytes, codes: Bytes, out: Float32Array) -> None:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    groups = scaled(codes, half_column(blocks, 0) * scales, out)
    groups -= (half_column(blocks, 2) * minimums)[..., None]


def unpack_q4_k(blocks: Bytes, out: Float32Array) -> None:
    _unpack_with_minimums(blocks, fields(blocks[:, 16:], 4, 32), out)


def unpack_q5_k(blocks: Bytes, out: Float32Array) -> None:
    high = fields(blocks[:, 16:48], 1, 32)
    _unpack_with_minimums(blocks, fields(blocks[:, 48:], 4, 32) | high << np.uint8(4), out)


def unpack_q6_k(blocks: Bytes, out: Float32Array) -> None:
    codes = fields(blocks[:, :128], 4, 64) | fields(blocks[:, 128:192], 2, 32) << np.uint8(4)
    scales = half_column(blocks, 208) * blocks[:, 192:208].view(np.int8)
    scaled(codes.astype(np.int8) - np.int8(32), scales, out)


def unpack_q8_k(blocks: Bytes, out: Float32Array) -> None:
    scaled(blocks[:, 4:260].view(np.int8), np.ascontiguousarray(blocks[:, :4]).view("<f4"), out)


def unpack_tq1_0(blocks: Bytes, out: Float32Array) -> None:
    digits = [
        _ternary_digits(blocks[:, start:stop], num) for start, stop, num in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    scaled(np.concatenate(digits, axis=1).astype(np.int8) - np.int8(1), half_column(blocks, 52), out)


def _ternary_digits(packed: Bytes, num_digits: int) -> Bytes:
    """Return the leading digits, base 3, of bytes that stand for fractions of 256: all first ones, then all second."""
    powers = np.array([1, 3, 9, 27, 81][:num_digits], np.uint8)
    rest = packed[:, None, :] * powers[:, None]  # modulo 256: digits that came before are gone
    return ((rest.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(packed), -1)


def unpack_tq2_0(blocks: Bytes, out: Float32Array) -> None:
    scaled(fields(blocks[:, :64], 2, 32).astype(np.int8) - np.int8(1), half_column(blocks, 64), out)
