"""Grid: the values that groups of weights are rounded to; Codes: a matrix so rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel

_LEAST_SCALE = 2.0**-24  # of fp16
_MOST_SCALE = 65504.0
_SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.8, 0.7)  # of 4 bits' errors this leaves about 4 % too many
_SHIFTS = (-1, 0, 1)


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
            scales = representable(largest / (most - zero + 0.5))  # what is larger by half a step is rounded down
            return cls(scales, torch.full_like(scales, zero), most)
        low, high = weight.amin(dim=-1).clamp(max=0), weight.amax(dim=-1).clamp(min=0)
        low = torch.minimum(low, -high / (most - 1))
        scales = representable((high - low) / most)
        return cls(scales, (-low / scales).round().clamp(1, most), most)

    @classmethod
    def fitting(cls, weight: Tensor, bits: int, *, symmetric: bool, importance: Tensor) -> Self:
        """Return a grid near that of `around` whose values are nearer to the weights, each error weighed.

        What spans the weights is seldom the best: a few large ones make the steps of all others wide, and as a zero is
        a whole number, weights that lie on a grid with another one are all moved by up to half a step the same way,
        and where inputs have a mean, their errors add up. Narrower grids and zeros one lower or higher are
        tried, each with the scale that fits its codes best (by least squares), and its codes found anew.

        Args:
            weight: [..., group_size] fp32; scales and zeros have the dimensions before the last.
            bits: of a code.
            symmetric: whether the zero is the middle.
            importance: what the square of an error counts, 0 or more; broadcasts with the weights.

        Raises:
            UnsupportedModel: if a scale would not be a number of fp16.
        """
        span = cls.around(weight, bits, symmetric=symmetric)
        best, least = span, span.error(weight, importance)
        for shift in (0,) if symmetric else _SHIFTS:
            zeros = (span.zeros + shift).clamp(1, span.most)
            for shrink in _SHRINKS:
                grid = cls(span.scales * shrink, zeros, span.most)._fitted(weight, importance)
                error = grid.error(weight, importance)
                better = error < least
                least = torch.where(better, error, least)
                scales = torch.where(better, grid.scales, best.scales)
                best = cls(scales, torch.where(better, zeros, best.zeros), span.most)
        return best

    def others(self, shrinks: Sequence[float], shifts: Sequence[int]) -> Self:
        """Return grids near this one, side by side: scales and zeros of [num_grids, ...]."""
        scales = representable(torch.stack([self.scales * shrink for shrink in shrinks]).repeat(len(shifts), 1))
        zeros = torch.stack([(self.zeros + shift).clamp(1, self.most) for shift in shifts])
        return self._replace(scales=scales, zeros=zeros.repeat_interleave(len(shrinks), dim=0))

    def error(self, weight: Tensor, importance: Tensor) -> Tensor:
        """Return the sum of each group's squared errors, weighed: [...]."""
        return ((self._steps(weight) * self.scales[..., None] - weight).square_() * importance).sum(dim=-1)

    def _fitted(self, weight: Tensor, importance: Tensor) -> Self:
        """Return it with the scales that suit the codes of groups of weights best."""
        steps = self._steps(weight)
        weighed = steps * importance
        scales = (weighed * weight).sum(dim=-1) / (weighed * steps).sum(dim=-1)  # no number where all codes are zero
        scales = torch.where(scales > 0, scales, self.scales).clamp(max=_MOST_SCALE)
        return self._replace(scales=representable(scales))

    def _steps(self, weight: Tensor) -> Tensor:
        """Return codes of groups of weights, less their zeros."""
        zeros = self.zeros[..., None]
        return self._replace(scales=self.scales[..., None], zeros=zeros).codes(weight) - zeros

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


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool, importance: Tensor | None = None
) -> Codes:
    """Round each weight to the nearest value of its group's grid.

    Args:
        weight: [out_features, in_features] fp32; the last group may be smaller than the others.
        bits: of a code.
        group_size: neighbouring inputs that share a scale.
        symmetric: whether zeros are the middle of the codes.
        importance: [in_features] fp32, by which grids are fitted to their weights; None has grids that span them.

    Raises:
        UnsupportedModel: if a scale would not be a number of fp16.
    """
    codes, scales, zeros = [], [], []
    for start in range(0, weight.shape[1], group_size):
        inputs = slice(start, start + group_size)
        part = weight[:, inputs]
        if importance is None:
            grid = Grid.around(part, bits, symmetric=symmetric)
        else:
            grid = Grid.fitting(part, bits, symmetric=symmetric, importance=importance[inputs])
        shared = Grid(grid.scales[:, None], grid.zeros[:, None], grid.most)
        codes.append(shared.codes(part).to(torch.uint8))
        scales.append(grid.scales.half())
        zeros.append(grid.zeros.to(torch.int16))
    groups = torch.arange(weight.shape[1]) // group_size
    return Codes(torch.cat(codes, dim=1).T.contiguous(), torch.stack(scales), torch.stack(zeros), groups, bits)


def representable(scales: Tensor) -> Tensor:
    """Return scales as the nearest numbers of fp16, above 0; raises UnsupportedModel if one is too large."""
    if not bool((scales <= _MOST_SCALE).all()):
        raise UnsupportedModel(
            f"a weight needs a scale of {float(scales.max()):g}, the layouts of GPTQ and AWQ hold up to "
            f"{_MOST_SCALE:g} (fp16); such a model cannot be quantised so"
        )
    return scales.half().float().clamp(min=_LEAST_SCALE)
