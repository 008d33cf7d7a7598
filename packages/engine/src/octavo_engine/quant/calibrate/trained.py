"""TrainedCodes: codes and scales of a rounded matrix that a gradient may still move; Moments: of Adam's steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.quant.calibrate.grid import Codes, representable

_FIRST, _SECOND = 0.9, 0.95  # how much of the last steps' gradients, and of their squares, Adam remembers
_LEAST = 1e-12
_REACH = 0.3  # how far from its code a weight starts at most, in steps: at 0.5 it would be rounded to another


class Moments:
    """Adam's means of a parameter's gradients (arXiv 1412.6980)."""

    def __init__(self, like: Tensor) -> None:
        self._first, self._second = torch.zeros_like(like), torch.zeros_like(like)
        self._num_steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Take in a gradient; return what to go against, about 1 in size where gradients agree."""
        self._num_steps += 1
        self._first.lerp_(gradient, 1 - _FIRST)
        self._second.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        size = (self._second / (1 - _SECOND**self._num_steps)).sqrt_().add_(_LEAST)
        return (self._first / (1 - _FIRST**self._num_steps)).div_(size)


class TrainedCodes:
    """A matrix of codes, each with where between two codes its weight is: it becomes another when it passes half-way.

    Rounding has no gradient; the gradient by a rounded weight is taken for that by the weight (straight through,
    arXiv 1308.3432; rounding learnt so: 2309.05516). Zeros stay.

    Args:
        codes: the matrix; its groups are of one size, but for a smaller last one. Not modified.
        weight: [out_features, in_features] fp32, what was rounded: a weight starts on its side of its code.
        dtype: of products.

    Attributes:
        weight: [out_features, in_features], what the codes mean; the gradient is read from it.

    """

    def __init__(self, codes: Codes, weight: Tensor, dtype: torch.dtype) -> None:
        self._groups, self._bits = codes.groups, codes.bits
        self._order = self._back = None
        if bool((codes.groups.diff() < 0).any()):
            self._order = codes.groups.argsort(stable=True)
            self._back = self._order.argsort()
        num_groups, num_outputs = codes.scales.shape
        self._shape = num_outputs, num_groups, int(codes.groups.bincount().max())
        self._scales = codes.scales.T.float()[..., None].contiguous()  # [out_features, num_groups, 1]
        self._zeros = codes.zeros.T.float()[..., None].contiguous()
        self._stretch = torch.zeros_like(self._scales)  # scales are these times its exponential
        self._most = (1 << codes.bits) - 1
        found = self._grouped(codes.codes.T.float())
        places = self._grouped(weight).div_(self._scales).add_(self._zeros)
        self._places = torch.clamp(places, found - _REACH, found + _REACH)
        self._of_places: Moments | None = None  # until codes may change
        self._of_scales = Moments(self._stretch)
        self.weight = torch.empty(weight.shape, dtype=dtype, requires_grad=True)
        self._fill()

    def step(self, rate: float, scale_rate: float) -> None:
        """Go a step against the gradient of `weight`, and forget it.

        Args:
            rate: how far a weight goes, in steps between codes; 0 leaves all codes as they are.
            scale_rate: how far a scale goes, as a share of it.

        """
        assert self.weight.grad is not None
        gradient = self._grouped(self.weight.grad.float())
        self.weight.grad = None
        scales = self._scales * self._stretch.exp()
        by_scale = (gradient * (self._codes() - self._zeros)).sum(dim=-1, keepdim=True).mul_(scales)
        self._stretch.sub_(self._of_scales.direction(by_scale), alpha=scale_rate)
        if rate:
            self._of_places = self._of_places or Moments(self._places)
            moved = self._places.sub_(self._of_places.direction(gradient.mul_(scales)), alpha=rate)
            moved.clamp_(-_REACH, self._most + _REACH)
        self._fill()

    def codes(self) -> Codes:
        """Return the matrix as it is now."""
        codes = self._ungrouped(self._codes()).T.to(torch.uint8).contiguous()
        scales = representable(self._scales * self._stretch.exp()).half()
        return Codes(
            codes, scales[..., 0].T.contiguous(), self._zeros[..., 0].T.to(torch.int16), self._groups, self._bits
        )

    def _codes(self) -> Tensor:
        return self._places.round().clamp_(0, self._most)

    def _fill(self) -> None:
        values = self._codes().sub_(self._zeros).mul_(self._scales * self._stretch.exp())
        self.weight.data.copy_(self._ungrouped(values))

    def _grouped(self, values: Tensor) -> Tensor:
        """Bring inputs in the order of their groups: [out_features, num_groups, group_size], 0 where one is smaller."""
        num_outputs, num_groups, size = self._shape
        if self._order is not None:
            values = values[:, self._order]
        return F.pad(values, (0, num_groups * size - values.shape[1])).view(num_outputs, num_groups, size)

    def _ungrouped(self, values: Tensor) -> Tensor:
        values = values.flatten(1)[:, : len(self._groups)]
        return values if self._back is None else values[:, self._back]
