"""LinearAdapters: what adapters add to the product of a linear; StepAdapters: which tokens of a step have which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.quant.base import Shard
from octavo_kernels import LoraPart, RowGroups, group_rows, host_empty, lora_linear


class StepAdapters:
    """The slots of a step's tokens, which all linears of a model look at; the runner alone writes it, before a step.

    It takes the place of an argument, since what lies between the runner and a linear knows nothing of adapters. While
    it holds nothing, as in a step of the base model alone, linears compute as if there were no adapters. On a CPU its
    tensors never move, so that a recorded program may read them by address.

    Args:
        num_slots: adapters that a model holds at once.
        max_num_tokens: tokens that a step can compute.
        device: where the model is.

    Attributes:
        groups: the tokens by slot, or None.
        slots: [num_tokens] int64, the slot of each token and -1 for the base model, or None.
    """

    __slots__ = ("_buffer", "_device", "_grouped", "_held", "_num_slots", "groups", "slots")

    def __init__(self, num_slots: int, *, max_num_tokens: int, device: torch.device) -> None:
        self._num_slots = num_slots
        self._device = device
        self._buffer = torch.full((max_num_tokens,), -1)
        self._grouped = group_rows(self._buffer, num_slots)
        self._held = np.empty(0, np.int64)  # the slots that are grouped, on a CPU
        self.groups: RowGroups | None = None
        self.slots: Tensor | None = None

    @contextmanager
    def of(self, slots: NDArray[np.int64]) -> Iterator[None]:
        """Hold the slots of a step's tokens, [num_tokens], while it is computed."""
        if self._device.type == "cpu":
            if not np.array_equal(slots, self._held):  # which most steps share with the one before
                self._buffer[: len(slots)] = torch.from_numpy(slots)
                self._buffer[len(slots) :] = -1
                group_rows(self._buffer, self._num_slots, out=self._grouped)
                self._held = slots.copy()
            self.groups, self.slots = self._grouped, self._buffer[: len(slots)]
        else:
            self.slots = torch.from_numpy(slots).to(self._device)
            self.groups = group_rows(self.slots, self._num_slots)
        try:
            yield
        finally:
            self.groups = self.slots = None

    @contextmanager
    def largest(self) -> Iterator[None]:
        """Hold what fills the buffers, while a program is recorded that steps will run."""
        self.groups, self.slots = self._grouped, self._buffer
        try:
            yield
        finally:
            self.groups = self.slots = None


class LinearAdapters:
    """The matrices that adapters add to one linear, each shard's own. Only the AdapterPool writes them.

    Args:
        in_features: of the linear.
        shards: its parts, one after the other.
        step: which tokens have which adapter.
        num_slots: adapters that are held at once.
        max_rank: the highest rank.
        dtype: of the matrices.
        device: where the linear's weights are.
    """

    __slots__ = ("_bias", "_biased", "_names", "_num_rows", "_shards", "_step")

    def __init__(
        self,
        in_features: int,
        shards: Sequence[Shard],
        *,
        step: StepAdapters,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._step = step
        self._names = [shard.name for shard in shards]
        self._shards: list[LoraPart] = []
        start = 0
        for shard in shards:
            self._shards.append(
                LoraPart(
                    _zeros((num_slots, max_rank, in_features), dtype, device),
                    _make_b(num_slots, shard.num_rows, max_rank, dtype, device),
                    torch.zeros(num_slots, dtype=torch.int32, device=device),
                    torch.zeros(num_slots, device=device),
                    start,
                )
            )
            start += shard.num_rows
        self._num_rows = start
        self._biased: set[int] = set()  # slots whose bias is another than the base's
        self._bias: Tensor | None = None  # [num_slots, out_features] fp32, what is added to the base's

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add what each token's adapter makes of x [num_tokens, in_features] to out [num_tokens, out_features]."""
        groups = self._step.groups
        if groups is None:
            return
        lora_linear(x, self._shards, groups, out)
        if self._biased:
            self._add_bias(out)

    @property
    def has_biases(self) -> bool:
        """Whether some slot has biases, which are added by torch."""
        return bool(self._biased)

    @property
    def has_factors(self) -> bool:
        """Whether products are multiplied by factors, 1 for adapters without magnitudes."""
        return any(shard.factors is not None for shard in self._shards)

    def fill(
        self,
        slot: int,
        weights: AdapterWeights,
        prefix: str,
        base_bias: Tensor | None,
        factors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Put an adapter in a slot; the names of its shards begin with `prefix`.

        `factors` are those of shards with magnitudes. Memory for them is set aside when the first ones come, so that a
        program that was recorded before must be recorded again.
        """
        for index, name in enumerate(self._names):
            self._set_factors(index, slot, factors.get(name))
            shard = self._shards[index]
            module = weights.modules.get(prefix + name)
            shard.ranks[slot] = 0 if module is None else module.rank
            if module is not None:
                shard.scales[slot] = module.scale
                shard.a[slot, : module.rank] = module.a
                shard.b[slot, :, : module.rank] = module.b
        self._set_bias(slot, weights, prefix, base_bias, factors)

    def _set_factors(self, index: int, slot: int, factors: Tensor | None) -> None:
        shard = self._shards[index]
        if shard.factors is None:
            if factors is None:
                return
            shard = shard._replace(factors=torch.ones(len(shard.b), shard.b.shape[1], device=shard.b.device))
            self._shards[index] = shard
        assert shard.factors is not None
        shard.factors[slot] = 1.0 if factors is None else factors

    def _set_bias(
        self,
        slot: int,
        weights: AdapterWeights,
        prefix: str,
        base_bias: Tensor | None,
        factors: Mapping[str, Tensor],
    ) -> None:
        added = torch.zeros(self._num_rows)
        for name, shard in zip(self._names, self._shards, strict=True):
            own, extra = weights.biases.get(prefix + name), weights.extra_biases.get(prefix + name)
            if own is not None:
                assert base_bias is not None
                added[shard.columns] += own - base_bias[shard.columns].float().cpu()
            if extra is not None:
                added[shard.columns] += extra
            if base_bias is not None and name in factors:  # which multiply the base's bias among its product
                added[shard.columns] += (1.0 - factors[name]) * base_bias[shard.columns].float().cpu()
        if not added.any():
            self._biased.discard(slot)
            return
        if self._bias is None:
            first = self._shards[0]
            self._bias = torch.zeros(len(first.ranks), self._num_rows, device=first.a.device)
        self._bias[slot] = added
        self._biased.add(slot)

    def _add_bias(self, out: Tensor) -> None:
        """Add the biases of the slots that have one."""
        slots, bias = self._step.slots, self._bias
        assert slots is not None
        assert bias is not None
        biased = torch.tensor(sorted(self._biased), device=slots.device)
        tokens = torch.isin(slots, biased).nonzero()[:, 0]
        out[tokens] = (out[tokens].float() + bias[slots[tokens]]).to(out.dtype)


def _make_b(num_slots: int, num_rows: int, max_rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros [num_slots, num_rows, max_rank], on a CPU in the order of ranks, which native products read."""
    if device.type == "cpu":
        return _zeros((num_slots, max_rank, num_rows), dtype, device).transpose(1, 2)
    return _zeros((num_slots, num_rows, max_rank), dtype, device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros, on a CPU in large pages."""
    return host_empty(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
