"""AWQ checkpoints (arXiv 2306.00978): 4 bits with zeros, in the layouts `gemm` and `gemv` of AutoAWQ.

A linear [out_features, in_features] is stored as::

    gemm   qweight [in_features, out_features / 8] int32    8 neighbouring outputs in a word, in the order
           qzeros  [num_groups, out_features / 8] int32     0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on
           scales  [num_groups, out_features]
    gemv   qweight [out_features, in_features / 8] int32    8 neighbouring inputs in a word, lowest bits first
           qzeros  [out_features, num_words] int32          8 neighbouring groups in a word, lowest bits first; some
           scales  [out_features, 8 * num_words]            groups more than there are, which fill up

and means `scale * (code - zero)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo_engine.quant.schemes.base import Scheme, StoredLinear, divided
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.grouped_integers import GroupedIntegers, fields_of_words, words_of_fields
from octavo_engine.weights.quantized import ALL, QuantizedTensor

_BITS = 4
_PER_WORD = 8
_FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word of `gemm` holds each of its 8 outputs."""

_IS_GEMV = {"gemm": False, "exllama": False, "ipex": False, "gemv": True}
# What only says how the codes were found, or how AutoAWQ would run them.
_TELLS_NOTHING = (
    *("quant_method", "modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config"),
    *("lm_head", "calib_data", "duo_scaling", "n_samples", "max_seq_len"),
)


@dataclass(frozen=True, slots=True)
class GemmTensor(GroupedIntegers):
    """A linear in the layout `gemm`: `words` is its qweight; `skipped` outputs of the first word are of other rows."""

    words: Tensor
    skipped: int = 0

    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the codes of some rows of the matrix; whole words are read for them."""
        start, stop, _ = rows.indices(self.shape[0])
        start, stop = start + self.skipped, stop + self.skipped
        first = start // _PER_WORD
        fields = _outputs(self.words[:, first : -(-stop // _PER_WORD)])
        return fields[:, start - first * _PER_WORD : stop - first * _PER_WORD]

    def cut_codes(self, cut: Cut) -> dict[str, Any]:
        """Return the words of some rows or columns of the matrix."""
        if cut.axis == 1:
            return {"words": self.words[cut.span].contiguous()}
        start, stop = cut.start + self.skipped, cut.stop + self.skipped
        words = self.words[:, start // _PER_WORD : -(-stop // _PER_WORD)]
        return {"words": words.contiguous(), "skipped": start % _PER_WORD}


@dataclass(frozen=True, slots=True)
class GemvTensor(GroupedIntegers):
    """A linear in the layout `gemv`: `words` is its qweight."""

    words: Tensor

    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the codes of some rows of the matrix."""
        return fields_of_words(self.words[rows].T, _BITS)

    @property
    def column_block(self) -> int:
        """Inputs in a word."""
        return _PER_WORD

    def cut_codes(self, cut: Cut) -> dict[str, Tensor]:
        """Return the words of some rows or columns of the matrix."""
        words = self.words[cut.span] if cut.axis == 0 else self.words[:, words_of_fields(cut.span, _BITS)]
        return {"words": words.contiguous()}


class AWQ(Scheme):
    """Reads the linears of an AWQ checkpoint.

    Args:
        settings: the `quantization_config`, or a quant_config.json.
    """

    parts = ("qweight", "qzeros", "scales")
    ignored = ()

    def __init__(self, settings: Settings) -> None:
        settings.only(
            *("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "backend"), *_TELLS_NOTHING
        )
        settings.choice(("bits", "w_bit"), (_BITS,))
        settings.choice("backend", ("autoawq",), "autoawq")
        if not settings.flag("zero_point", default=True):
            settings.unsupported("zero_point", False, "true is")
        self._group_size = settings.group_size("group_size", "q_group_size")
        self._is_gemv = _IS_GEMV[settings.choice("version", tuple(_IS_GEMV), "gemm")]

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        words = linear.matrix("qweight", torch.int32)
        return self._gemv(linear, words) if self._is_gemv else self._gemm(linear, words)

    def _gemm(self, linear: StoredLinear, words: Tensor) -> QuantizedTensor:
        in_features, out_features = len(words), words.shape[1] * _PER_WORD
        num_groups = divided(in_features, self._group_size)
        zeros = linear.tensor("qzeros", torch.int32, shape=(num_groups, words.shape[1]))
        return GemmTensor(
            shape=(out_features, in_features),
            bits=_BITS,
            group_size=self._group_size or in_features,
            scales=linear.scales("scales", shape=(num_groups, out_features)),
            zeros=_outputs(zeros).to(torch.int16),
            zero_point=0,
            groups=None,
            words=words,
        )

    def _gemv(self, linear: StoredLinear, words: Tensor) -> QuantizedTensor:
        out_features, in_features = len(words), words.shape[1] * _PER_WORD
        num_groups = divided(in_features, self._group_size)
        stored = linear.matrix("qzeros", torch.int32)
        if len(stored) != out_features or stored.shape[1] * _PER_WORD < num_groups:
            linear.corrupt(
                "qzeros", f"a shape [{out_features}, at least {-(-num_groups // _PER_WORD)}]", list(stored.shape)
            )
        scales = linear.scales("scales", shape=(out_features, stored.shape[1] * _PER_WORD))
        return GemvTensor(
            shape=(out_features, in_features),
            bits=_BITS,
            group_size=self._group_size or in_features,
            scales=scales[:, :num_groups].T.contiguous(),
            zeros=fields_of_words(stored.T, _BITS)[:num_groups].to(torch.int16),
            zero_point=0,
            groups=None,
            words=words,
        )


def _outputs(words: Tensor) -> Tensor:
    """Return the fields of words of `gemm` in the order of outputs: [n, num_words] -> [n, 8 * num_words] uint8."""
    shifts = torch.tensor(_FIELD_OF_OUTPUT, dtype=torch.int32, device=words.device) * _BITS
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)
