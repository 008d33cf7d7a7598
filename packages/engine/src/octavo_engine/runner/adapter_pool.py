"""AdapterPool: the adapters that lie beside a model's weights, one in each slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.adapters.info import AdapterTarget
from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.batch import AdapterSlot
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.linear_adapters import LinearAdapters, StepAdapters
from octavo_engine.layers.magnitudes import magnitude_factors
from octavo_engine.layers.saved_matrices import SavedMatrices
from octavo_engine.models.registry import Model
from octavo_engine.quant.choose import choose_method
from octavo_engine.runner.forward import Forward, Likeliest, OpByOp, make_forward
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput

_FACTORS_PER_SLOT = 4
"""Adapters whose factors are kept, so that they need not be made again when one comes back to a slot."""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How many adapters a model holds, of which rank at most, and the dtype of their matrices."""

    num_slots: int
    max_rank: int
    dtype: torch.dtype


def adapter_targets(model: Model) -> dict[str, AdapterTarget]:
    """Return the linears of a model that adapters may change, by their names in a checkpoint."""
    return {
        prefix + shard.name: AdapterTarget(linear.in_features, shard.num_rows, linear.has_bias)
        for prefix, linear in model.linears()
        for shard in linear.shards
    }


class AdapterPool:
    """Gives every linear of a model room for adapters, and fills it as sequences need them.

    Args:
        model: what runs a step.
        weights_of: returns the weights of a version.
        options: how much room.
        max_num_tokens: tokens that a step can compute.
        device: where the model is.
        linears: those that are given the room, and what their names begin with; a pool that they had is replaced. None
            stands for the model's.

    Attributes:
        step: which tokens of a step have which adapter.
        heads: of adapters that bring one along.
    """

    def __init__(
        self,
        model: Model,
        weights_of: Callable[[bytes], AdapterWeights],
        options: PoolOptions,
        *,
        max_num_tokens: int,
        device: torch.device,
        linears: Iterable[tuple[str, Linear]] | None = None,
    ) -> None:
        self._model = model
        self._weights_of = weights_of
        self._device = device
        self._versions: list[bytes | None] = [None] * options.num_slots
        self.step = StepAdapters(options.num_slots, max_num_tokens=max_num_tokens, device=device)
        self._inputs: InputBuilder | None = None
        self._factors: dict[bytes, list[Mapping[str, Tensor]]] = {}  # by version, the least recently used first
        self._linears: list[tuple[str, Linear, LinearAdapters]] = []
        for prefix, linear in model.linears() if linears is None else linears:
            adapters = LinearAdapters(
                linear.in_features,
                linear.shards,
                step=self.step,
                num_slots=options.num_slots,
                max_rank=options.max_rank,
                dtype=options.dtype,
                device=device,
            )
            linear.adapters = adapters
            self._linears.append((prefix, linear, adapters))
        self._embeddings: SavedMatrices[Embedding] = SavedMatrices(device)
        self.heads: SavedMatrices[LMHead] = SavedMatrices(device)
        ends = model.ends()
        if ends is not None:
            ends[0].saved, ends[1].saved = self._embeddings, self.heads
        self._op_by_op = AdaptedForward(OpByOp(model, model.greedy), self.step)
        self._with_saved = SavedForward(self._op_by_op, self._embeddings, self.heads)
        self._forward = self._op_by_op

    def record(self, inputs: InputBuilder) -> None:
        """Run steps in the fastest way from now on, on what an InputBuilder makes."""
        self._inputs = inputs
        with self.step.largest():
            forward = make_forward(self._model, inputs, self._device)
        self._forward = AdaptedForward(forward, self.step)

    def holds(self, wanted: AdapterSlot) -> bool:
        """Return whether a version lies in a slot."""
        return self._versions[wanted.slot] == wanted.version

    def ensure(self, wanted: AdapterSlot) -> None:
        """Have a version in a slot; nothing is done if it lies there."""
        if self.holds(wanted):
            return
        slot, version = wanted
        weights = self._weights_of(version)
        self._versions[slot] = None  # until all of it is there
        factors = self._factors_of(version, weights)
        had_factors = [adapters.has_factors for _, _, adapters in self._linears]
        for (prefix, linear, adapters), own in zip(self._linears, factors, strict=True):
            adapters.fill(slot, weights, prefix, linear.bias, own)
        self._put_ends(slot, weights)
        if self._inputs is not None and had_factors != [adapters.has_factors for _, _, adapters in self._linears]:
            self.record(self._inputs)
        self._versions[slot] = version

    def forget(self) -> None:
        """Take it that no slot holds anything."""
        self._versions = [None] * len(self._versions)
        self._factors.clear()

    def _put_ends(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter's own embedding and head in a slot, held without loss whatever form the model's are in."""
        self._embeddings.put(slot, None)  # whose memory may be what the next one needs
        self.heads.put(slot, None)
        if weights.embedding is None and weights.head is None:
            return
        ends = self._model.ends()
        assert ends is not None, "no reader lets them through"
        own, _ = ends
        method = choose_method(own.options.device, own.options.dtype, batch_invariant=own.options.batch_invariant)
        options = replace(own.options, quant=method)
        if weights.embedding is not None:
            embedding = Embedding(own.vocab_size, own.hidden_size, options=options)
            self._embeddings.put(slot, _filled(embedding, weights.embedding))
        if weights.head is not None:
            self.heads.put(slot, _filled(LMHead(own, tied=False, options=options), weights.head))

    def _factors_of(self, version: bytes, weights: AdapterWeights) -> Sequence[Mapping[str, Tensor]]:
        """Return each linear's factors by shard, made when an adapter with magnitudes first gets a slot."""
        if not weights.has_magnitudes:
            return [{}] * len(self._linears)
        factors = self._factors.pop(version, None)
        if factors is None:
            factors = [magnitude_factors(linear, weights, prefix) for prefix, linear, _ in self._linears]
        self._factors[version] = factors  # the one used last is the last one
        while len(self._factors) > _FACTORS_PER_SLOT * len(self._versions):
            del self._factors[next(iter(self._factors))]
        return factors

    def forward(self, slots: NDArray[np.int64]) -> Forward:
        """Return what runs a step whose tokens have these slots, -1 for the base model."""
        if self._embeddings.any_of(slots) or self.heads.any_of(slots):
            return self._with_saved.of(slots)
        has_biases = any(adapters.has_biases for _, _, adapters in self._linears)
        return (self._op_by_op if has_biases else self._forward).of(slots)


_End = TypeVar("_End", Embedding, LMHead)


def _filled(end: _End, weight: Tensor) -> _End:
    for slot in end.slots(""):
        slot.fill(weight)
    end.finish()
    return end


class AdaptedForward(Forward):
    """Runs steps in which some tokens have adapters.

    Args:
        forward: runs the model.
        step: what its linears look at.
    """

    def __init__(self, forward: Forward, step: StepAdapters) -> None:
        self._forward = forward
        self._step = step
        self._slots: NDArray[np.int64] | None = None

    def of(self, slots: NDArray[np.int64]) -> AdaptedForward:
        """Take the slots of the next step's tokens, [num_tokens]."""
        self._slots = slots
        return self

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Run a step."""
        assert self._slots is not None
        with self._step.of(self._slots):
            return self._forward(model_input)

    def greedy(self, model_input: ModelInput) -> Likeliest:
        """Run a step up to its arg-max."""
        assert self._slots is not None
        with self._step.of(self._slots):
            return self._forward.greedy(model_input)

    def threads(self) -> AbstractContextManager[None]:
        """Return what to open around a step."""
        return self._forward.threads()


class SavedForward(Forward):
    """Runs steps in which some tokens have adapters with an embedding or a head of their own.

    Args:
        forward: runs the model op by op.
        embeddings: what the model's embedding looks at.
        heads: what its head looks at.
    """

    def __init__(
        self, forward: AdaptedForward, embeddings: SavedMatrices[Embedding], heads: SavedMatrices[LMHead]
    ) -> None:
        self._forward = forward
        self._embeddings = embeddings
        self._heads = heads
        self._slots: NDArray[np.int64] | None = None

    def of(self, slots: NDArray[np.int64]) -> SavedForward:
        """Take the slots of the next step's tokens, [num_tokens]."""
        self._slots = slots
        self._forward.of(slots)
        return self

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Run a step."""
        assert self._slots is not None
        with self._embeddings.of(self._slots):
            return self._forward(model_input)

    def greedy(self, model_input: ModelInput) -> Likeliest:
        """Run a step up to its arg-max."""
        assert self._slots is not None
        with self._embeddings.of(self._slots), self._heads.of(self._slots):
            return self._forward.greedy(model_input)

    def threads(self) -> AbstractContextManager[None]:
        """Return what to open around a step."""
        return self._forward.threads()
