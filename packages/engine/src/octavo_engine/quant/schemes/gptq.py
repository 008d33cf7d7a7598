"""GPTQ checkpoints (arXiv 2210.17323): of 2, 3, 4 and 8 bits, with groups in any order of inputs (`desc_act`).

A linear [out_features, in_features] is stored as::

    qweight  [in_features * bits / 32, out_features] int32    a stream of codes along the inputs, lowest bits first
    qzeros   [num_groups, out_features * bits / 32] int32     a stream of zeros along the outputs
    scales   [num_groups, out_features]
    g_idx    [in_features] int32                              the group of every input; may be left out

and means `scale * (code - zero)`. In the format `gptq` a zero is stored less 1 (modulo 2**bits), in `gptq_v2` as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
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

_BITS = (2, 3, 4, 8)
_WORD_BITS = 32
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
# What only says how the codes were found, or what wrote them.
_TELLS_NOTHING = (
    *(
        "quant_method",
        "format",
        "checkpoint_format",
        "is_marlin_format",
        "use_exllama",
        "use_cuda_fp16",
        "exllama_config",
    ),
    *("max_input_length", "disable_exllama", "model_name_or_path", "model_file_base_name", "model_seqlen", "lm_head"),
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "meta", "dataset", "tokenizer"),
    *("batch_size", "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "backend", "mse"),
    *("cache_block_outputs", "modules_in_block_to_quantize", "quantizer", "quant_linear_kernel", "parallel_packing"),
    *(
        "act_group_aware",
        "fail_safe",
        "hessian_chunk_size",
        "mock_quantization",
        "device",
        "offload_to_disk",
        "adapter",
    ),
    *("offload_to_disk_path", "hyb_act", "rotation", "method", "v2", "v2_alpha", "v2_memory_device", "gptaq_alpha"),
    *(
        "act_order",
        "failsafe",
        "vram_strategy",
        "gc_mode",
        "wait_for_submodule_finalizers",
        "auto_forward_data_parallel",
    ),
)


class _Layout(NamedTuple):
    """What the codes of a linear are: their bits and their groups (None: one group of all inputs)."""

    bits: int
    group_size: int | None


@dataclass(frozen=True, slots=True)
class GPTQTensor(GroupedIntegers):
    """A GPTQ linear: `words` is its qweight."""

    words: Tensor

    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the codes of some rows of the matrix."""
        return fields_of_words(self.words[:, rows], self.bits)

    @property
    def column_block(self) -> int:
        """Inputs whose codes fill words."""
        return fields_per_word(self.bits)

    def cut_codes(self, cut: Cut) -> dict[str, Tensor]:
        """Return the words of some rows or columns of the matrix."""
        words = self.words[:, cut.span] if cut.axis == 0 else self.words[words_of_fields(cut.span, self.bits)]
        return {"words": words.contiguous()}


class GPTQ(Scheme):
    """Reads the linears of a GPTQ checkpoint.

    Args:
        settings: the `quantization_config`, or a quantize_config.json.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")
    ignored = ()

    def __init__(self, settings: Settings) -> None:
        settings.only("bits", "group_size", "sym", "desc_act", "dynamic", "pack_dtype", *_TELLS_NOTHING)
        settings.choice("pack_dtype", ("int32",), "int32")
        if settings.get("rotation"):
            settings.unsupported("rotation", settings.get("rotation"), "weights that are not rotated are")
        format_key = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
        self._zero_offset = _ZERO_OFFSETS[settings.choice(format_key, tuple(_ZERO_OFFSETS), "gptq")]
        self._where = settings.where
        self._layout = _layout(settings)
        self._rules = [
            (
                compiled(pattern.removeprefix("+:").removeprefix("-:"), f"{settings.where}: dynamic"),
                None if pattern.startswith("-:") else _layout(rule, self._layout),
            )
            for pattern, rule in settings.sections("dynamic").items()
        ]

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        bits, group_size = self._layout_of(linear.name)
        words = linear.matrix("qweight", torch.int32)
        in_features, out_features = len(words) * _WORD_BITS // bits, words.shape[1]
        if len(words) % bits and _WORD_BITS % bits:
            linear.corrupt("qweight", f"a number of rows that {bits} divides, as codes have {bits} bits", len(words))
        num_groups = divided(in_features, group_size)
        scales = linear.scales("scales", shape=(num_groups, out_features))
        return GPTQTensor(
            shape=(out_features, in_features),
            bits=bits,
            group_size=group_size or in_features,
            scales=scales,
            zeros=self._zeros(linear, bits, num_groups, out_features),
            zero_point=0,
            groups=groups_of_inputs(linear, "g_idx", in_features, group_size, num_groups),
            words=words,
        )

    def _layout_of(self, name: str) -> _Layout:
        for pattern, layout in self._rules:
            if pattern.match(name):
                if layout is None:
                    raise UnsupportedModel(
                        f"{self._where}: dynamic: {pattern.pattern!r} leaves {name!r} as it is, but the checkpoint has "
                        "codes of it; take the rule out"
                    )
                return layout
        return self._layout

    def _zeros(self, linear: StoredLinear, bits: int, num_groups: int, out_features: int) -> Tensor:
        if out_features * bits % _WORD_BITS:
            linear.corrupt("qweight", f"outputs whose zeros of {bits} bits fill words", out_features)
        stored = linear.tensor("qzeros", torch.int32, shape=(num_groups, out_features * bits // _WORD_BITS))
        zeros = fields_of_words(stored.T, bits).T.to(torch.int16)
        return ((zeros + self._zero_offset) & ((1 << bits) - 1)).contiguous()


def _layout(settings: Settings, default: _Layout | None = None) -> _Layout:
    """Read bits and group size, of all linears or, with a default, of a rule."""
    bits = settings.choice("bits", _BITS, None if default is None else default.bits)
    settings.flag("sym")
    settings.flag("desc_act")
    if default is not None and settings.get("group_size") is None:
        return _Layout(bits, default.group_size)
    return _Layout(bits, settings.group_size("group_size"))
