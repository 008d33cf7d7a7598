"""quantize_blocks: GGUF's IQ4_NL and NVFP4, which the gguf package can only read, in plain NumPy.

Each block has the scale, of some near the one that spans it, whose nearest codes leave the least sum of squared errors.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Bytes = npt.NDArray[np.uint8]

_BLOCKS_AT_ONCE = 1 << 14
_IQ4_NL = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
_IQ4_NL_REACHES = np.array([-127, -120, -113, -104, 113, 120, 127, 104], np.float32)
"""What the largest weight of a block is tried as."""
_FP4 = np.array(gguf.quants.NVFP4.kvalues, np.float32)  # e2m1 times 2
_FP4_MOST = 6.0
_E4M3_MOST = 0x7E
_NVFP4_SHIFTS = range(-2, 3)  # of a scale's code: steps of about an eighth
_NVFP4_GROUP = 16


def quantize_blocks(values: Floats, type_name: str) -> Bytes:
    """Quantise values to IQ4_NL or NVFP4.

    Args:
        values: [rows, inputs] fp32; blocks of 32 (NVFP4: 64) divide the inputs.
        type_name: the type, by gguf's name.

    Returns:
        [rows, bytes of a row].

    Raises:
        KeyError: for another type.

    """
    block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    quantize = _QUANTIZERS[type_name]
    blocks = values.reshape(-1, block_size)
    parts = [quantize(blocks[start : start + _BLOCKS_AT_ONCE]) for start in range(0, len(blocks), _BLOCKS_AT_ONCE)]
    return np.concatenate(parts).reshape(len(values), -1)


def _iq4_nl(blocks: Floats) -> Bytes:
    """[n, 32] -> [n, 18]: fp16 scale | codes of the first 16 in the low halves of bytes, of the others in the high."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best = np.zeros_like(largest)
    least = np.full(len(blocks), np.inf, np.float32)
    for reach in _IQ4_NL_REACHES:
        levels = _IQ4_NL[_nearest(blocks, largest / reach, _IQ4_NL)]
        scales = (levels * blocks).sum(axis=1, keepdims=True) / np.square(levels).sum(axis=1, keepdims=True)
        scales = scales.astype(np.float16).astype(np.float32)
        errors = _errors(blocks, scales, _IQ4_NL)
        best, least = np.where((errors < least)[:, None], scales, best), np.minimum(errors, least)
    codes = _nearest(blocks, best, _IQ4_NL)
    return np.concatenate([best.astype(np.float16).view(np.uint8), _in_halves(codes)], axis=1)


def _nvfp4(blocks: Floats) -> Bytes:
    """[n, 64] -> [n, 36]: e4m3 scales of four groups of 16 | the codes of each, in halves of 8 bytes."""
    groups = blocks.reshape(-1, _NVFP4_GROUP)
    spans = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(groups).max(axis=1) / _FP4_MOST).astype(np.int64)
    best = np.zeros(len(groups), np.uint8)
    least = np.full(len(groups), np.inf, np.float32)
    for shift in _NVFP4_SHIFTS:
        scales = np.clip(spans + shift, 0, _E4M3_MOST).astype(np.uint8)
        errors = _errors(groups, _e4m3(scales), _FP4)
        best, least = np.where(errors < least, scales, best), np.minimum(errors, least)
    codes = _nearest(groups, _e4m3(best), _FP4)
    return np.concatenate([best.reshape(-1, 4), _in_halves(codes).reshape(-1, 32)], axis=1)


def _e4m3(codes: Codes) -> Floats:
    """Return what scales' codes mean with the doubled levels: [n, 1]."""
    values: Floats = gguf.quants.NVFP4.ue4m3_to_fp32(codes).astype(np.float32)[:, None]
    return values


def _nearest(values: Floats, scales: Floats, levels: Floats) -> Codes:
    """Return the codes of the levels that are nearest to values / scales; with a scale of 0, of level 0 or nearly."""
    order = np.argsort(levels, kind="stable")
    borders = (levels[order][1:] + levels[order][:-1]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scales != 0, values / scales, 0)
    return order[np.searchsorted(borders, steps)].astype(np.uint8)


def _errors(values: Floats, scales: Floats, levels: Floats) -> Floats:
    errors: Floats = np.square(scales * levels[_nearest(values, scales, levels)] - values).sum(axis=1)
    return errors


def _in_halves(codes: Codes) -> Bytes:
    """Pack [n, 2 * k] codes in [n, k] bytes: the first k in the low halves."""
    low, high = np.split(codes, 2, axis=1)
    return low | high << 4


_QUANTIZERS: dict[str, Callable[[Floats], Bytes]] = {"IQ4_NL": _iq4_nl, "NVFP4": _nvfp4}
