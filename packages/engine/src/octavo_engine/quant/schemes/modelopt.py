"""ModelOpt checkpoints: FP8 by tensor, channel or block, MXFP8 and NVFP4, one for all linears or one for each.

A linear [out_features, in_features] is stored as::

    FP8                        weight float8_e4m3fn, weight_scale one number
    FP8_PER_CHANNEL_PER_TOKEN  weight float8_e4m3fn, weight_scale [out_features]
    FP8_PB_WO                  weight float8_e4m3fn, weight_scale [row blocks, 1, column blocks, 1] of 128 x 128
    MXFP8                      weight float8_e4m3fn, weight_scale [out_features, in_features / 32] uint8, which mean
                               2**(byte - 127)
    NVFP4, W4A16_NVFP4         weight [out_features, in_features / 2] uint8, 4-bit floats, the first low; weight_scale
                               [out_features, in_features / group_size] float8_e4m3fn; weight_scale_2 one number

and means `scale * code`, in NVFP4 `(scale * scale_2) * code`. Activations are not rounded.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import torch

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.schemes.base import Scheme, StoredLinear, divided
from octavo_engine.quant.schemes.fp8 import float8
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import Float4, ScaledFloats

_ALGORITHMS = MappingProxyType(
    {
        "fp8": "fp8",
        "fp8_per_channel_per_token": "fp8",
        "fp8_pb_wo": "blocks",
        "mxfp8": "mxfp8",
        "nvfp4": "nvfp4",
        "w4a16_nvfp4": "nvfp4",
    }
)
_MIXED = "mixed_precision"
_BLOCK = (128, 128)
_MXFP8_GROUP = 32
_NVFP4_GROUP = 16


class _Layout(NamedTuple):
    kind: str
    group_size: int


class ModelOpt(Scheme):
    """Reads the linears of a ModelOpt checkpoint.

    Args:
        settings: the `quantization_config`, or a hf_quant_config.json.
    """

    parts = ("weight", "weight_scale", "weight_scale_2")
    ignored = ("input_scale", "k_scale", "v_scale", "k_bias", "v_bias", "output_scale")

    def __init__(self, settings: Settings) -> None:
        inner = settings.section("quantization") or settings
        inner.only(
            *("quant_method", "quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules", "quantized_layers"),
            *("ignore", "config_groups", "producer", "kv_cache_scheme", "has_zero_point", "pre_quant_scale"),
        )
        if inner.get("pre_quant_scale"):
            inner.unsupported("pre_quant_scale", True, "weights whose inputs are not scaled are")
        self._where = inner.where
        algorithm = inner.choice("quant_algo", (*_ALGORITHMS, _MIXED))
        self._layout = None if algorithm == _MIXED else _layout(inner)
        self._layouts = {name: _layout(layer) for name, layer in inner.sections("quantized_layers").items()}

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        layout = self._layouts.get(linear.name, self._layout)
        if layout is None:
            raise UnsupportedModel(
                f"{self._where}: quantized_layers: {linear.name!r} is none of them, but the checkpoint has codes of it"
            )
        if layout.kind == "nvfp4":
            return _nvfp4(linear, layout.group_size)
        if layout.kind == "mxfp8":
            return _mxfp8(linear)
        return float8(linear, "weight_scale", _BLOCK, one_per_block=layout.kind == "blocks")


def _layout(settings: Settings) -> _Layout:
    kind = _ALGORITHMS[settings.choice("quant_algo", tuple(_ALGORITHMS))]
    return _Layout(kind, settings.group_size("group_size") or _NVFP4_GROUP)


def _mxfp8(linear: StoredLinear) -> QuantizedTensor:
    codes = linear.matrix("weight", torch.float8_e4m3fn)
    rows, columns = codes.shape
    scales = linear.powers("weight_scale", (rows, divided(columns, _MXFP8_GROUP)))
    return ScaledFloats((rows, columns), codes, scales, (1, _MXFP8_GROUP))


def _nvfp4(linear: StoredLinear, group_size: int) -> QuantizedTensor:
    codes = linear.matrix("weight", torch.uint8)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    scales = linear.scales("weight_scale", torch.float8_e4m3fn, shape=(rows, divided(columns, group_size)))
    factor = linear.scales("weight_scale_2", torch.float32)
    if factor.numel() != 1:
        linear.corrupt("weight_scale_2", "one number", f"shape {list(factor.shape)}")
    return Float4((rows, columns), group_size, codes, scales, factor=factor.reshape(()))
