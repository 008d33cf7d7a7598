"""FP8 checkpoints: `fp8`, by tensor, channel or DeepSeek's blocks of 128 x 128, and `fbgemm_fp8`.

A linear [out_features, in_features] is stored as::

    weight        [out_features, in_features] float8_e4m3fn
    weight_scale  or weight_scale_inv, by either name the factor of the codes (DeepSeek-V3, arXiv 2412.19437):
                  one number, [out_features] or [out_features, 1], or [row blocks, column blocks] of `weight_block_size`

and means `scale * code`. Scales of activations are passed over: activations are not rounded.
"""

from __future__ import annotations

import torch

from octavo_engine.quant.schemes.base import Scheme, StoredLinear, divided
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import ScaledFloats

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_SCALES = ("weight_scale", "weight_scale_inv")


class FP8(Scheme):
    """Reads the linears of a checkpoint of the methods `fp8` and `fbgemm_fp8`.

    Args:
        settings: the `quantization_config`.
    """

    parts = ("weight", *_SCALES)
    ignored = ("input_scale", "input_scale_ub", "activation_scale_inv", "activation_scale", "k_scale", "v_scale")

    def __init__(self, settings: Settings) -> None:
        settings.only(
            *("quant_method", "activation_scheme", "weight_block_size", "ignored_layers", "modules_to_not_convert"),
            *("fmt", "scale_fmt", "store_dtype", "activation_scale_ub", "dequantize", "kv_cache_scheme"),
        )
        settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.choice("activation_scheme", ("static", "dynamic"), "dynamic")
        settings.choice("scale_fmt", ("float", "ue8m0"), "float")
        self._block = settings.shape("weight_block_size")

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        part = next((name for name in _SCALES if name in linear), "weight_scale")
        return float8(linear, part, self._block, one_per_block=self._block is not None)


def float8(linear: StoredLinear, part: str, block: tuple[int, int] | None, *, one_per_block: bool) -> QuantizedTensor:
    """Return the weight of a linear in FP8.

    Args:
        linear: its tensors; the codes are `weight`.
        part: the name of its scales.
        block: rows and columns that share a scale, if the format has blocks.
        one_per_block: whether there must be a scale for every block, not one in all or one per output.
    """
    codes = linear.matrix("weight", torch.float8_e4m3fn)
    rows, columns = codes.shape
    scales = linear.scales(part, *_SCALE_DTYPES)
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    allowed = {(1, 1): (rows, columns), (rows, 1): (1, columns)}
    if one_per_block and block is not None:
        allowed = {(divided(rows, block[0]), divided(columns, block[1])): block}
    for blocks, size in allowed.items():
        if scales.numel() == blocks[0] * blocks[1]:
            return ScaledFloats((rows, columns), codes, scales.reshape(blocks), size)
    return linear.corrupt(part, "shape " + " or ".join(str(list(blocks)) for blocks in allowed), list(scales.shape))
