"""compressed-tensors checkpoints: whole numbers in words or bytes, FP8, and 4-bit floats, by group, channel or block.

A linear [out_features, in_features] is stored as::

    pack-quantized         weight_packed      [out_features, in_features * bits / 32] int32, a stream of codes along the
                                              inputs, lowest bits first; a code is the number + 2**(bits - 1)
                           weight_shape       [2]: out_features, in_features
                           weight_zero_point  [out_features * bits / 32, num_groups] int32, likewise along the outputs;
                                              of a whole tensor [1] int8
                           weight_g_idx       [in_features] int32, the group of every input; seldom there
    int-, naive-quantized  weight             int8, numbers of fewer bits too (W4A8)
                           weight_zero_point  int8, like weight_scale
    float-quantized        weight             float8_e4m3fn
    mxfp8-quantized        weight             float8_e4m3fn; scales are uint8, 2**(byte - 127), per 32 inputs
    nvfp4-pack-quantized   weight_packed      [out_features, in_features / 2] uint8, 4-bit floats, the first low
                           weight_global_scale [1]: what the scales (float8, per 16 inputs) are divided by
    mxfp4-pack-quantized   weight_packed      likewise; scales are uint8, 2**(byte - 127), per 32 inputs
    all                    weight_scale       [1], [out_features, 1], [out_features, num_groups] or [row blocks,
                                              column blocks], by the `strategy`

and means `scale * (number - zero)`. How activations would be rounded is not looked at: they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.schemes.base import Scheme, StoredLinear, divided, groups_of_inputs
from octavo_engine.quant.schemes.rules import compiled
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.grouped_integers import GroupedIntegers, fields_of_words, fields_per_word, words_of_fields
from octavo_engine.weights.quantized import ALL, QuantizedTensor
from octavo_engine.weights.scaled_floats import Float4, ScaledFloats

_WORD_BITS = 32
_INT8_ZERO = 128
_FLOAT8, _FLOAT4 = ("float", 8), ("float", 4)
_INTEGERS = tuple(("int", bits) for bits in range(2, 9))
_NUMBERS = MappingProxyType(
    {
        "pack-quantized": _INTEGERS,
        "int-quantized": _INTEGERS,
        "naive-quantized": (*_INTEGERS, _FLOAT8),
        "float-quantized": (_FLOAT8,),
        "mxfp8-quantized": (_FLOAT8,),
        "nvfp4-pack-quantized": (_FLOAT4,),
        "mxfp4-pack-quantized": (_FLOAT4,),
        "mixed-precision": (),
    }
)
"""Which types of numbers, and of how many bits, each format holds."""

_SPARSE = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
# What only says how scales were found.
_ARGUMENTS_THAT_TELL_NOTHING = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder", "dynamic")


class _Arguments(NamedTuple):
    """What the weights of a group of linears are."""

    format: str
    is_float: bool
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PackedRows(GroupedIntegers):
    """A linear whose codes are a stream along the inputs: `words` is its weight_packed."""

    words: Tensor

    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the codes of some rows of the matrix."""
        return fields_of_words(self.words[rows].T, self.bits)[: self.shape[1]]

    @property
    def column_block(self) -> int:
        """Inputs whose codes fill words."""
        return fields_per_word(self.bits)

    def cut_codes(self, cut: Cut) -> dict[str, Tensor]:
        """Return the words of some rows or columns of the matrix."""
        words = self.words[cut.span] if cut.axis == 0 else self.words[:, words_of_fields(cut.span, self.bits)]
        return {"words": words.contiguous()}


@dataclass(frozen=True, slots=True)
class SignedBytes(GroupedIntegers):
    """A linear whose numbers are bytes: `numbers` is its weight, [out_features, in_features] int8."""

    numbers: Tensor

    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the numbers of some rows of the matrix, plus 128."""
        return self.numbers[rows].T.view(torch.uint8) ^ _INT8_ZERO

    def cut_codes(self, cut: Cut) -> dict[str, Tensor]:
        """Return the numbers of some rows or columns of the matrix."""
        return {"numbers": cut.part(self.numbers)}


class CompressedTensors(Scheme):
    """Reads the linears of a compressed-tensors checkpoint.

    Args:
        settings: the `quantization_config`.
    """

    parts = (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        "weight_global_scale",
    )
    ignored = (
        *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
        *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale"),
    )

    def __init__(self, settings: Settings) -> None:
        settings.only(
            *("quant_method", "config_groups", "format", "sparsity_config", "transform_config", "quantization_status"),
            *("ignore", "kv_cache_scheme", "global_compression_ratio", "version", "packed_modules_mapping"),
            "run_compressed",
        )
        _refuse_sparse(settings, settings.get("format"))
        sparsity = settings.section("sparsity_config")
        if sparsity is not None and sparsity.get("format") not in (None, "dense"):
            _refuse_sparse(sparsity, sparsity.get("format"))
            sparsity.choice("format", ("dense",))
        if settings.get("transform_config"):
            settings.unsupported("transform_config", settings.get("transform_config"), "weights without transforms are")
        settings.choice("quantization_status", ("compressed",), "compressed")
        default = settings.choice("format", tuple(_NUMBERS), "mixed-precision")
        self._where = settings.where
        self._groups: list[tuple[tuple[str, ...], _Arguments]] = []
        for group in settings.sections("config_groups").values():
            group.only("targets", "weights", "input_activations", "output_activations", "format")
            if (weights := group.section("weights")) is not None:
                chosen = group.choice("format", tuple(_NUMBERS), default)
                self._groups.append((group.texts("targets"), _arguments(weights, chosen)))
        self._patterns = {
            target: compiled(target.removeprefix("re:"), f"{settings.where}: config_groups: targets")
            for targets, _ in self._groups
            for target in targets
            if target.startswith("re:")
        }

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        arguments = self._arguments_of(linear.name)
        match arguments.format:
            case "pack-quantized":
                return _packed(linear, arguments)
            case "nvfp4-pack-quantized" | "mxfp4-pack-quantized":
                return _float4(linear, arguments)
        if "weight_packed" in linear:
            linear.corrupt("weight_packed", f"'weight' in the format {arguments.format}", "packed codes")
        if arguments.is_float:
            return _floats(linear, linear.matrix("weight", torch.float8_e4m3fn), arguments)
        return _bytes(linear, linear.matrix("weight", torch.int8), arguments)

    def _arguments_of(self, name: str) -> _Arguments:
        for targets, arguments in self._groups:
            if any(self._patterns[t].match(name) if t in self._patterns else t == name for t in targets):
                return arguments
        for targets, arguments in self._groups:
            if "Linear" in targets:
                return arguments
        raise UnsupportedModel(
            f"{self._where}: config_groups: no target is {name!r}, but the checkpoint has codes of it"
        )


def _refuse_sparse(settings: Settings, found: object) -> None:
    if found in _SPARSE:
        settings.unsupported(
            "format", found, "it leaves zeros of sparse weights out, which no product here can use; dense formats are"
        )


def _arguments(weights: Settings, chosen: str) -> _Arguments:
    weights.only(
        *("num_bits", "type", "strategy", "group_size", "symmetric", "block_structure"), *_ARGUMENTS_THAT_TELL_NOTHING
    )
    if not _NUMBERS[chosen]:
        weights.unsupported("format", chosen, "each of config_groups has to name its own")
    kind, bits = weights.choice("type", ("int", "float"), "int"), weights.choice("num_bits", tuple(range(2, 9)), 8)
    if (kind, bits) not in _NUMBERS[chosen]:
        weights.unsupported("num_bits", bits, f"{chosen!r} does not hold such numbers of type {kind!r}")
    is_float = kind == "float"
    group_size = weights.group_size("group_size")
    strategy = weights.choice(
        "strategy",
        _STRATEGIES,
        "tensor" if weights.get("group_size") is None else "channel" if group_size is None else "group",
    )
    if (strategy in ("group", "tensor_group")) != (group_size is not None):
        weights.corrupt("group_size", f"a number for groups alone, as the strategy is {strategy!r}", group_size)
    symmetric = weights.flag("symmetric", default=True)
    if is_float and not symmetric:
        weights.unsupported("symmetric", False, "of floats, true is")
    block = weights.shape("block_structure")
    if (strategy == "block") != (block is not None):
        weights.corrupt("block_structure", f"[rows, columns] for blocks alone, as the strategy is {strategy!r}", block)
    return _Arguments(chosen, is_float, bits, strategy, group_size, symmetric, block)


def _packed(linear: StoredLinear, arguments: _Arguments) -> QuantizedTensor:
    bits = arguments.bits
    words = linear.matrix("weight_packed", torch.int32)
    shape = linear.tensor("weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
    out_features, in_features = shape
    if len(words) != out_features or -(-in_features * bits // _WORD_BITS) != words.shape[1] or in_features < 1:
        linear.corrupt("weight_packed", f"codes of {bits} bits of the shape {shape}", list(words.shape))
    scales, group_size = _scales(linear, out_features, in_features, arguments)
    zeros = None if arguments.symmetric else _packed_zeros(linear, out_features, len(scales), arguments)
    groups = groups_of_inputs(linear, "weight_g_idx", in_features, arguments.group_size, len(scales))
    return PackedRows((out_features, in_features), bits, group_size, scales, zeros, 1 << (bits - 1), groups, words)


def _packed_zeros(linear: StoredLinear, out_features: int, num_groups: int, arguments: _Arguments) -> Tensor:
    """Return as [num_groups, out_features] the codes that stand for 0."""
    bits = arguments.bits
    if arguments.strategy == "tensor":
        stored = linear.tensor("weight_zero_point", torch.int8)
        zeros = _by_group(linear, "weight_zero_point", stored, out_features, num_groups).to(torch.int16)
        return zeros + (1 << (bits - 1))
    num_words = -(-out_features * bits // _WORD_BITS)
    stored = linear.tensor("weight_zero_point", torch.int32, shape=(num_words, num_groups))
    return fields_of_words(stored, bits)[:out_features].T.to(torch.int16).contiguous()


def _bytes(linear: StoredLinear, numbers: Tensor, arguments: _Arguments) -> QuantizedTensor:
    out_features, in_features = numbers.shape
    scales, group_size = _scales(linear, out_features, in_features, arguments)
    zeros = None
    if not arguments.symmetric:
        stored = linear.tensor("weight_zero_point", torch.int8)
        zeros = _by_group(linear, "weight_zero_point", stored, out_features, len(scales)).to(torch.int16) + _INT8_ZERO
    groups = groups_of_inputs(linear, "weight_g_idx", in_features, arguments.group_size, len(scales))
    return SignedBytes((out_features, in_features), 8, group_size, scales, zeros, _INT8_ZERO, groups, numbers)


def _scales(linear: StoredLinear, out_features: int, in_features: int, arguments: _Arguments) -> tuple[Tensor, int]:
    """Return the scales of whole numbers as [num_groups, out_features], and the inputs in a group."""
    if arguments.strategy == "block":
        linear.corrupt("weight_scale", "scales by tensor, channel or group", "blocks of whole numbers")
    num_groups = divided(in_features, arguments.group_size)
    scales = _by_group(linear, "weight_scale", linear.scales("weight_scale"), out_features, num_groups)
    return scales, arguments.group_size or in_features


def _by_group(linear: StoredLinear, part: str, stored: Tensor, out_features: int, num_groups: int) -> Tensor:
    """Return what is stored by tensor, channel or group as [num_groups, out_features]."""
    if stored.numel() == 1 and num_groups == 1:
        return stored.reshape(1, 1).expand(1, out_features).contiguous()
    if stored.numel() != out_features * num_groups or stored.shape[0] != out_features:
        linear.corrupt(part, f"shape [{out_features}, {num_groups}]", list(stored.shape))
    return stored.reshape(out_features, num_groups).T.contiguous()


def _floats(linear: StoredLinear, codes: Tensor, arguments: _Arguments) -> QuantizedTensor:
    rows, columns = codes.shape
    if arguments.format == "mxfp8-quantized":
        blocks = (rows, divided(columns, arguments.group_size))
        scales = linear.powers("weight_scale", blocks)
        return ScaledFloats((rows, columns), codes, scales, (1, arguments.group_size or columns))
    by_strategy = {"tensor": (rows, columns), "channel": (1, columns), "block": arguments.block}
    block = by_strategy.get(arguments.strategy) or (1, arguments.group_size or columns)
    blocks = divided(rows, block[0]), divided(columns, block[1])
    scales = linear.scales("weight_scale")
    if scales.numel() != blocks[0] * blocks[1]:
        linear.corrupt("weight_scale", f"shape {list(blocks)}", list(scales.shape))
    return ScaledFloats((rows, columns), codes, scales.reshape(blocks), block)


def _float4(linear: StoredLinear, arguments: _Arguments) -> QuantizedTensor:
    codes = linear.matrix("weight_packed", torch.uint8)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    blocks = (rows, divided(columns, arguments.group_size))
    group_size = arguments.group_size or columns
    if arguments.format == "mxfp4-pack-quantized":
        return Float4((rows, columns), group_size, codes, linear.powers("weight_scale", blocks))
    scales = linear.scales("weight_scale", torch.float8_e4m3fn, shape=blocks)
    divisor = linear.scales("weight_global_scale", torch.float32)
    if divisor.numel() != 1 or float(divisor) == 0:
        linear.corrupt("weight_global_scale", "one number other than 0", divisor.tolist())
    return Float4((rows, columns), group_size, codes, scales, divisor=divisor.reshape(()))
