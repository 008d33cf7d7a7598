"""Layouts: the tensors and settings in which GPTQ's and AWQ's checkpoints store a matrix of codes.

They are those that `quant/schemes/gptq.py` and `awq.py` read, where the shapes are drawn.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.calibrate.grid import Codes
from octavo_engine.quant.calibrate.options import QuantizeOptions

_WORD_BITS = 32
_AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring outputs each field of a word holds, from the lowest bits on."""


class Layout(Protocol):
    """How a method's checkpoints store codes."""

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear [out_features, in_features] that the layout cannot hold; raises UnsupportedModel."""
        ...

    def tensors(self, codes: Codes) -> dict[str, Tensor]:
        """Return the tensors of a linear by the last part of their names."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the `quantization_config`."""
        ...


def layout_of(options: QuantizeOptions) -> Layout:
    """Return the layout in which a method's codes are written."""
    return AWQLayout(options) if options.method == "awq" else GPTQLayout(options)


class GPTQLayout(Layout):
    """The first format of GPTQ, whose zeros are stored less 1."""

    def __init__(self, options: QuantizeOptions) -> None:
        self._options = options

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse sizes whose codes do not fill words."""
        bits = self._options.bits
        for size, what in ((shape[0], "outputs"), (shape[1], "inputs")):
            if size * bits % _WORD_BITS:
                raise UnsupportedModel(
                    f"{name}: {size} {what} of {bits} bits do not fill words of {_WORD_BITS} bits, as GPTQ's layout "
                    "needs; use other bits, or another model"
                )

    def tensors(self, codes: Codes) -> dict[str, Tensor]:
        """Return qweight, qzeros, scales and g_idx."""
        stored_zeros = (codes.zeros - 1) & ((1 << codes.bits) - 1)
        return {
            "qweight": words_of_fields(codes.codes, codes.bits),
            "qzeros": words_of_fields(stored_zeros.T, codes.bits).T.contiguous(),
            "scales": codes.scales.contiguous(),
            "g_idx": codes.groups.to(torch.int32),
        }

    def settings(self) -> dict[str, Any]:
        """Return what AutoGPTQ and its successors write."""
        options = self._options
        return {
            "quant_method": "gptq",
            "bits": options.bits,
            "group_size": -1 if options.group_size is None else options.group_size,
            "sym": options.symmetric,
            "desc_act": options.act_order,
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": options.damping,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "meta": {
                "quantizer": ["octavo"],
                "method": options.method,
                "num_sequences": options.num_sequences,
                "sequence_length": options.sequence_length,
                "descent_rounds": options.descent_rounds,
                "tune_steps": options.tune_steps,
            },
        }


class AWQLayout(Layout):
    """AutoAWQ's `gemm`: fields of 4 bits along the outputs, in words whose fields are shuffled."""

    def __init__(self, options: QuantizeOptions) -> None:
        self._options = options

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse outputs that do not fill words, and a smaller last group, which this layout does not have."""
        if shape[0] % len(_AWQ_ORDER):
            raise UnsupportedModel(
                f"{name}: {shape[0]} outputs do not fill words of 8, as AWQ's layout needs; use gptq"
            )
        size = self._options.group_size
        if size is not None and shape[1] % size:
            raise UnsupportedModel(f"{name}: group_size {size} does not divide {shape[1]} inputs; use one that does")

    def tensors(self, codes: Codes) -> dict[str, Tensor]:
        """Return qweight, qzeros and scales."""
        return {
            "qweight": _shuffled(codes.codes),
            "qzeros": _shuffled(codes.zeros),
            "scales": codes.scales.contiguous(),
        }

    def settings(self) -> dict[str, Any]:
        """Return what AutoAWQ writes."""
        size = self._options.group_size
        return {
            "quant_method": "awq",
            "bits": self._options.bits,
            "group_size": -1 if size is None else size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }


def words_of_fields(fields: Tensor, bits: int) -> Tensor:
    """Return a stream of bits made of fields along the first dimension; `fields_of_words` takes it apart.

    Args:
        fields: [n, columns] of whole numbers below 2**bits; n * bits is a multiple of 32.
        bits: of a field, at most 8.

    Returns:
        [n * bits / 32, columns] int32.

    """
    num_fields, columns = fields.shape
    words = torch.zeros(num_fields * bits // _WORD_BITS + 1, columns, dtype=torch.int64)
    starts = torch.arange(num_fields) * bits
    index, offset = starts // _WORD_BITS, starts % _WORD_BITS
    shifted = fields.long() << offset[:, None]
    words.index_add_(0, index, shifted & (2**_WORD_BITS - 1))  # fields have bits of their own: a sum is an or
    words.index_add_(0, index + 1, shifted >> _WORD_BITS)
    return _as_int32(words[:-1])


def _shuffled(fields: Tensor) -> Tensor:
    """Pack 8 neighbouring columns in a word: [n, columns] -> [n, columns / 8] int32."""
    groups = fields.long().reshape(len(fields), -1, len(_AWQ_ORDER))[..., list(_AWQ_ORDER)]
    shifts = torch.arange(0, _WORD_BITS, _AWQ_BITS)
    return _as_int32((groups << shifts).sum(dim=-1))


def _as_int32(words: Tensor) -> Tensor:
    """Return words from 0 to 2**32 - 1 as the int32 of the same bits."""
    return torch.where(words >= 1 << (_WORD_BITS - 1), words - (1 << _WORD_BITS), words).to(torch.int32)
