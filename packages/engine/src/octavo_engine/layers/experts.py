"""Experts: the feed-forward blocks of a mixture, each by itself in any format, or all as one for a GPU's kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import WeightSlot
from octavo_engine.quant.packed_on_device import PackedOnDevice
from octavo_engine.quant.unquantized import Unquantized
from octavo_kernels import Backend, choose, fused_moe

_GATE, _UP, _DOWN = "w1", "w3", "w2"  # as Mixtral's checkpoints name them


class Experts(Protocol):
    """Some of a mixture's experts."""

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Return the sum of weight * expert(x) over each token's experts, those that are not here left out.

        x [num_tokens, hidden_size], weights [num_tokens, top_k] fp32, ids [num_tokens, top_k] int64
        -> [num_tokens, hidden_size] in x's dtype. Addends come in the order of ids, in fp32.
        """
        ...

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        ...

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the tensors of the experts that are here go, `<prefix><expert>.w1.weight` and the like."""
        ...


def make_experts(hidden_size: int, intermediate_size: int, own: range, *, options: LayerOptions) -> Experts:
    """Return the experts `own` of a mixture: as one where a kernel for mixtures runs on weights of that form.

    The kernel takes dense weights: GGUF's blocks are expanded for it. On a CPU that has no kernel for mixtures each
    expert multiplies by itself, as `options` says matrices are multiplied.
    """
    if (
        isinstance(options.quant, Unquantized | PackedOnDevice)
        and choose("fused_moe", options.device) is Backend.TRITON
    ):
        return StackedExperts(hidden_size, intermediate_size, own, options=options)
    return SeparateExperts(hidden_size, intermediate_size, own, options=options)


class SeparateExperts:
    """Experts one after the other, each with the tokens that chose it.

    A token's bits do not depend on the others if those of a product's rows do not: rows are sorted, multiplied and
    brought back, and a token's addends come in the order of its ids.
    """

    __slots__ = ("_first", "_hidden_size", "blocks")

    def __init__(self, hidden_size: int, intermediate_size: int, own: range, *, options: LayerOptions) -> None:
        self._first = own.start
        self._hidden_size = hidden_size
        self.blocks = [
            GatedMLP(hidden_size, intermediate_size, bias=False, options=options, names=(_GATE, _UP, _DOWN))
            for _ in own
        ]

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Return the weighted sums; see `Experts`."""
        num_tokens, top_k = ids.shape
        num_here = len(self.blocks)
        own_ids = (ids - self._first).flatten()
        own_ids = torch.where((own_ids >= 0) & (own_ids < num_here), own_ids, num_here)  # those of others come last
        order = own_ids.argsort(stable=True)
        counts = own_ids.bincount(minlength=num_here + 1).tolist()
        rows = torch.split(x[order // top_k], counts)
        parts = [block(part) for block, part in zip(self.blocks, rows[:-1], strict=True) if len(part)]
        results = torch.cat([*parts, x.new_zeros((counts[-1], self._hidden_size))]).float()
        place_of = torch.empty_like(order)
        place_of[order] = torch.arange(len(order), device=order.device)
        place_of = place_of.view(num_tokens, top_k)
        total = results[place_of[:, 0]] * weights[:, 0, None]
        for place in range(1, top_k):
            total += results[place_of[:, place]] * weights[:, place, None]
        return total.to(x.dtype)

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        for block in self.blocks:
            block.finish()

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        for expert, block in enumerate(self.blocks, start=self._first):
            yield from block.slots(f"{prefix}{expert}.")


class StackedExperts:
    """Experts in one tensor, which `octavo_kernels.fused_moe` multiplies.

    gate_up: [num_experts here, 2 * intermediate_size, hidden_size], of each gate, then up.
    down: [num_experts here, hidden_size, intermediate_size].
    """

    __slots__ = ("_first", "_intermediate_size", "down", "gate_up")

    def __init__(self, hidden_size: int, intermediate_size: int, own: range, *, options: LayerOptions) -> None:
        self._first = own.start
        self._intermediate_size = intermediate_size
        dtype, device = options.dtype, options.device
        self.gate_up = torch.empty((len(own), 2 * intermediate_size, hidden_size), dtype=dtype, device=device)
        self.down = torch.empty((len(own), hidden_size, intermediate_size), dtype=dtype, device=device)

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Return the weighted sums; see `Experts`. An expert's own result is rounded to x's dtype."""
        return fused_moe(x, self.gate_up, self.down, weights, (ids - self._first).int())

    def finish(self) -> None:
        """Do nothing: the kernel reads plain rows."""

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        size = self._intermediate_size
        for index in range(len(self.down)):
            name = f"{prefix}{self._first + index}."
            yield WeightSlot.into(f"{name}{_GATE}.weight", self.gate_up[index, :size])
            yield WeightSlot.into(f"{name}{_UP}.weight", self.gate_up[index, size:])
            yield WeightSlot.into(f"{name}{_DOWN}.weight", self.down[index])
