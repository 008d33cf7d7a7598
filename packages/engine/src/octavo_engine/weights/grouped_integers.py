"""GroupedIntegers: weights as whole numbers of a few bits, with a scale and perhaps a zero per group of inputs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from octavo_engine.weights.cut import Cut
from octavo_engine.weights.quantized import ALL, QuantizedTensor, regrouped

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class GroupedIntegers(QuantizedTensor):
    """A matrix of values `scale * (code - zero)`, computed in fp32, where they are exact for scales of 16 bits.

    bits: of a code; codes go from 0 to 2**bits - 1.
    group_size: inputs that share a scale; the last group may be smaller.
    scales: [num_groups, out_features], a floating dtype.
    zeros: [num_groups, out_features] int16, or None where `zero_point` is the zero of all.
    groups: [in_features] int64, the group of every input; None where inputs stand in the order of their groups.
    """

    bits: int
    group_size: int
    scales: Tensor
    zeros: Tensor | None
    zero_point: int
    groups: Tensor | None

    @abstractmethod
    def codes(self, rows: slice = ALL) -> Tensor:
        """Return the codes of some rows of the matrix: [in_features, num_rows] uint8."""

    @abstractmethod
    def cut_codes(self, cut: Cut) -> Mapping[str, Any]:
        """Return the fields that hold the codes, for some rows or columns."""

    def part(self, cut: Cut) -> Self:
        """Return some rows or columns; columns keep the scales of their groups, which may be made smaller."""
        changed: dict[str, Any] = {"shape": self.shape_of(cut), **self.cut_codes(cut)}
        kept: Any
        if cut.axis == 0:
            kept = ALL, cut.span
        elif self.groups is None:
            changed["group_size"], kept = regrouped(min(self.group_size, self.shape[1]), cut.start, cut.stop)
        else:
            kept, changed["groups"] = torch.unique(self.groups[cut.span], return_inverse=True)
        scales, zeros = self.scales[kept].contiguous(), None if self.zeros is None else self.zeros[kept].contiguous()
        return replace(self, scales=scales, zeros=zeros, **changed)

    def has_even_groups(self) -> bool:
        """Return whether all groups have group_size inputs, but for the last one in the order of inputs."""
        if self.groups is None:
            return True
        sizes = torch.arange(len(self.groups), device=self.groups.device) // self.group_size
        return torch.equal(self.groups.sort().values, sizes)

    def values(self, rows: slice = ALL) -> Tensor:
        """Return `scale * (code - zero)`."""
        codes = self.codes(rows)
        groups = self.groups
        if groups is None:
            groups = torch.arange(len(codes), device=codes.device) // self.group_size
        zeros = self.zero_point if self.zeros is None else self.zeros[:, rows][groups]
        return ((codes.to(torch.int16) - zeros).float() * self.scales[:, rows].float()[groups]).T.contiguous()


def fields_per_word(bits: int) -> int:
    """Return how many fields of a stream end where a word ends, the least number of them."""
    return _WORD_BITS // math.gcd(_WORD_BITS, bits)


def words_of_fields(fields: slice, bits: int) -> slice:
    """Return the words of a stream that hold some fields, the first of which begins with a word."""
    return slice(fields.start * bits // _WORD_BITS, -(-fields.stop * bits // _WORD_BITS))


def fields_of_words(words: Tensor, bits: int) -> Tensor:
    """Return the fields of a stream of bits, in which words follow each other along the first dimension.

    Field i has the bits i * bits and up of the stream, so that fields of 3 bits lie across words.

    Args:
        words: [num_words, n] int32; num_words * 32 is a multiple of `bits`.
        bits: of a field, at most 8.

    Returns:
        [num_words * 32 / bits, n] uint8.

    """
    mask = (1 << bits) - 1
    if _WORD_BITS % bits == 0:
        shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=words.device)
        return ((words[:, None] >> shifts[:, None]) & mask).to(torch.uint8).flatten(0, 1)
    starts = torch.arange(0, len(words) * _WORD_BITS, bits, device=words.device)
    index, offset = starts // _WORD_BITS, starts % _WORD_BITS
    low = (words[index] >> offset[:, None].int()) & mask  # what the sign has put above is masked, but for fields across
    following = words[(index + 1).clamp(max=len(words) - 1)]
    num_low = (_WORD_BITS - offset).clamp(max=bits)[:, None].int()
    low &= (1 << num_low) - 1
    high = (following << num_low) & mask
    return torch.where(num_low < bits, low | high, low).to(torch.uint8)
