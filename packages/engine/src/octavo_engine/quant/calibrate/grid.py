"""Grid: the values that groups of weights are rounded to; Codes: a matrix so rounded."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel

_LEAST_SCALE = 2.0**-24  # of fp16
_MOST_SCALE = 65504.0


class Grid(NamedTuple):
    """Values `scale * (code - zero)`, with codes from 0 to `most`.

    scales: [...] fp32, each a number of fp16. zeros: [...] fp32, whole numbers.
    """

    scales: Tensor
    zeros: Tensor
    most: int

    @classmethod
    def around(cls, weight: Tensor, bits: int, *, symmetric: bool) -> Self:
        """Return the grid that spans the weights of each group, and zero.

        A zero is at least 1: some readers of GPTQ's first format, which stores it less 1, make 2**bits of 0.

        Args:
            weight: [..., group_size] fp32; scales and zeros have the dimensions before the last.
            bits: of a code.
            symmetric: whether the zero is the middle.

        Raises:
            UnsupportedModel: if a scale would not be a number of fp16.
        """
        most = (1 << bits) - 1
        if symmetric:
            largest = weight.abs().amax(dim=-1)
            zero = (most + 1) // 2
            scales = _as_half(largest / (most - zero + 0.5))  # what is larger by half a step is rounded down
            return cls(scales, torch.full_like(scales, zero), most)
        low, high = weight.amin(dim=-1).clamp(max=0), weight.amax(dim=-1).clamp(min=0)
        low = torch.minimum(low, -high / (most - 1))
        scales = _as_half((high - low) / most)
        return cls(scales, (-low / scales).round().clamp(1, most), most)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the nearest codes of weights, which broadcast with the scales, as fp32."""
        return (weight / self.scales).round().add(self.zeros).clamp(0, self.most)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes mean."""
        return self.scales * (codes - self.zeros)


class Codes(NamedTuple):
    """A matrix [out_features, in_features] of values `scale * (code - zero)`, by groups of inputs.

    codes: [in_features, out_features] uint8.
    scales: [num_groups, out_features] fp16.
    zeros: [num_groups, out_features] int16.
    groups: [in_features] int64, the group of every input.
    bits: of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int

    def values(self) -> Tensor:
        """Return the values: [out_features, in_features] fp32."""
        codes = self.codes.float() - self.zeros.float()[self.groups]
        return (codes * self.scales.float()[self.groups]).T.contiguous()

    def rows(self, span: slice) -> Codes:
        """Return some rows of the matrix."""
        return self._replace(codes=self.codes[:, span], scales=self.scales[:, span], zeros=self.zeros[:, span])


def round_to_nearest(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> Codes:
    """Round each weight to the nearest value of its group's grid.

    Args:
        weight: [out_features, in_features] fp32; the last group may be smaller than the others.
        bits: of a code.
        group_size: neighbouring inputs that share a scale.
        symmetric: whether zeros are the middle of the codes.

    Raises:
        UnsupportedModel: if a scale would not be a number of fp16.
    """
    codes, scales, zeros = [], [], []
    for part in torch.split(weight, group_size, dim=1):
        grid = Grid.around(part, bits, symmetric=symmetric)
        shared = Grid(grid.scales[:, None], grid.zeros[:, None], grid.most)
        codes.append(shared.codes(part).to(torch.uint8))
        scales.append(grid.scales.half())
        zeros.append(grid.zeros.to(torch.int16))
    groups = torch.arange(weight.shape[1]) // group_size
    return Codes(torch.cat(codes, dim=1).T.contiguous(), torch.stack(scales), torch.stack(zeros), groups, bits)


def _as_half(scales: Tensor) -> Tensor:
    if not bool((scales <= _MOST_SCALE).all()):
        raise UnsupportedModel(
            f"a weight needs a scale of {float(scales.max()):g}, the layouts of GPTQ and AWQ hold up to "
            f"{_MOST_SCALE:g} (fp16); such a model cannot be quantised so"
        )
    return scales.half().float().clamp(min=_LEAST_SCALE)
