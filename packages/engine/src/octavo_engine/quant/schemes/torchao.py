"""TorchAO checkpoints in safetensors files: int8, few bits in bytes, and FP8.

TorchAO flattens a tensor of its own into several, and says in the file's metadata what it was. A linear [out_features,
in_features] of the types `Int8Tensor`, `IntxUnpackedToInt8Tensor` and `Float8Tensor` is stored as::

    _weight_qdata         [out_features, in_features] int8 or float8_e4m3fn
    _weight_scale         [row blocks, column blocks], blocks of equal size
    _weight_zero_point    like the scale: whole numbers of any dtype; may be left out

and means `scale * (number - zero)`. Its other types are laid out for one kernel each. Activations are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.schemes.base import Scheme, StoredLinear
from octavo_engine.quant.schemes.compressed import SignedBytes
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import ScaledFloats

_INT8_ZERO = 128
_TYPES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_DATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


class TorchAO(Scheme):
    """Reads the linears of a TorchAO checkpoint.

    Args:
        settings: the `quantization_config`; what it says of linears, their own tensors say too.
    """

    parts = (_DATA, _SCALE, _ZERO)
    ignored = ()

    def __init__(self, settings: Settings) -> None:
        settings.only(
            *("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert"),
            *("include_input_output_embeddings", "untie_embedding_weights"),
        )

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        kind = linear.described("weight").get("_type")
        if kind not in _TYPES:
            raise UnsupportedModel(
                f"{linear.path}: {linear.name}.weight of TorchAO's type {kind!r} is not supported; "
                f"these are: {', '.join(_TYPES)}"
            )
        is_float = kind == "Float8Tensor"
        data = linear.matrix(_DATA, torch.float8_e4m3fn if is_float else torch.int8)
        scales = linear.scales(_SCALE)
        block = _block(linear, data, scales)
        if is_float:
            return ScaledFloats((data.shape[0], data.shape[1]), data, scales, block)
        return _integers(linear, data, scales, block)


def _block(linear: StoredLinear, data: Tensor, scales: Tensor) -> tuple[int, int]:
    """Return how many rows and columns share a scale."""
    if scales.dim() != 2 or any(size % blocks for size, blocks in zip(data.shape, scales.shape, strict=True)):
        linear.corrupt(_SCALE, f"two dimensions that divide {list(data.shape)}", list(scales.shape))
    return data.shape[0] // scales.shape[0], data.shape[1] // scales.shape[1]


def _integers(linear: StoredLinear, data: Tensor, scales: Tensor, block: tuple[int, int]) -> QuantizedTensor:
    out_features, in_features = data.shape
    if block[0] not in (1, out_features):
        linear.corrupt(_SCALE, "a scale for every row, or one for all", list(scales.shape))
    zeros = None
    if _ZERO in linear:
        stored = linear.tensor(_ZERO, shape=tuple(scales.shape)).double()
        if not bool((stored == stored.round()).all()) or bool((stored.abs() > _INT8_ZERO).any()):
            linear.corrupt(_ZERO, "whole numbers from -128 to 128", "others")
        zeros = (stored.to(torch.int16) + _INT8_ZERO).T.expand(-1, out_features).contiguous()
    return SignedBytes(
        shape=(out_features, in_features),
        bits=8,
        group_size=block[1],
        scales=scales.T.expand(-1, out_features).contiguous(),
        zeros=zeros,
        zero_point=_INT8_ZERO,
        groups=None,
        numbers=data,
    )
