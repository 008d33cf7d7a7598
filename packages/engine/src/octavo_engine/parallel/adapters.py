"""Adapters of a model that is split over ranks: each has those parts of the matrices that its own weights multiply.

Of linears that are cut by rows a rank has all of A and its rows of B; of those that are cut by columns its columns of A
and all of B, so that the sum over ranks that the base's product needs adds up the adapters' products too. Rank 0 reads
the files and deals out the parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from octavo_engine.adapters.weights import AdapterWeights, LowRank
from octavo_engine.batch import AdapterSlot
from octavo_engine.models.registry import Model
from octavo_engine.parallel.channel import Channel, Command, Message
from octavo_engine.parallel.leader import LeadingModel
from octavo_engine.parallel.plan import ShardPlan
from octavo_engine.parallel.team import Team
from octavo_engine.runner.adapter_pool import AdapterPool, PoolOptions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def part_of(weights: AdapterWeights, plan: ShardPlan) -> AdapterWeights:
    """Return what a rank needs of an adapter.

    A bias of products that the ranks add up is left to rank 0.
    """
    modules = {}
    for name, module in weights.modules.items():
        cut = plan(f"{name}.weight")
        if cut is None:
            modules[name] = module
        elif cut.axis == 1:
            modules[name] = module._replace(a=module.a[:, cut.span])
        else:
            magnitude = None if module.magnitude is None else module.magnitude[cut.span]
            modules[name] = module._replace(b=module.b[cut.span], magnitude=magnitude)
    return AdapterWeights(
        digest=weights.digest,
        modules=modules,
        biases=_parts_of(weights.biases, plan),
        extra_biases=_parts_of(weights.extra_biases, plan),
    )


def _parts_of(biases: Mapping[str, Tensor], plan: ShardPlan) -> dict[str, Tensor]:
    parts = {}
    for name, bias in biases.items():
        cut = plan(f"{name}.weight")
        if cut is None:
            parts[name] = bias
        elif cut.axis == 0:
            parts[name] = bias[cut.span]
        elif plan.rank == 0:
            parts[name] = bias
    return parts


def encode(weights: AdapterWeights) -> bytes:
    """Return an adapter as bytes, in the safetensors format."""
    from safetensors.torch import save

    tensors = {f"a.{name}": module.a for name, module in weights.modules.items()}
    tensors |= {f"b.{name}": module.b for name, module in weights.modules.items()}
    magnitudes = {name: module.magnitude for name, module in weights.modules.items()}
    tensors |= {f"magnitude.{name}": magnitude for name, magnitude in magnitudes.items() if magnitude is not None}
    tensors |= {f"bias.{name}": bias for name, bias in weights.biases.items()}
    tensors |= {f"extra.{name}": bias for name, bias in weights.extra_biases.items()}
    scales = json.dumps({name: module.scale for name, module in weights.modules.items()}).encode()
    packed = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    return b"".join([weights.digest, len(scales).to_bytes(8, "little"), scales, packed])


def decode(data: bytes) -> AdapterWeights:
    """Return the adapter that `encode` wrote."""
    from safetensors.torch import load

    size = int.from_bytes(data[32:40], "little")
    scales = json.loads(data[40 : 40 + size])
    kinds: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}, "magnitude": {}, "bias": {}, "extra": {}}
    for key, tensor in load(data[40 + size :]).items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = tensor
    modules = {
        name: LowRank(kinds["a"][name], kinds["b"][name], scale, kinds["magnitude"].get(name))
        for name, scale in scales.items()
    }
    return AdapterWeights(data[:32], modules, kinds["bias"], kinds["extra"])


class LeadingAdapterPool(AdapterPool):
    """Rank 0's adapters; what it puts in a slot the other ranks put there too.

    Args:
        model: of which rank 0 has a part.
        weights_of: returns the weights of a version, for the whole model.
        options: how much room every rank has.
        max_num_tokens: tokens that a step can compute.
        device: where rank 0's part is.
        team: the other ranks.
    """

    def __init__(
        self,
        model: Model,
        weights_of: Callable[[bytes], AdapterWeights],
        options: PoolOptions,
        *,
        max_num_tokens: int,
        device: torch.device,
        team: Team,
    ) -> None:
        assert isinstance(model, LeadingModel)
        self._plans = model.shard.plans
        self._team = team
        self._num_restarts = team.num_restarts
        self._whole_of = weights_of
        self._sizes = options.num_slots, options.max_rank, _DTYPES.index(options.dtype), max_num_tokens
        super().__init__(
            model,
            lambda version: part_of(weights_of(version), self._plans[0]),
            options,
            max_num_tokens=max_num_tokens,
            device=device,
            linears=model.shard.model.linears(),
        )
        model.adapters = self.step

    def ensure(self, wanted: AdapterSlot) -> None:
        """Have a version in a slot of every rank; nothing is done if it lies there.

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        if self._num_restarts != self._team.num_restarts:  # new ranks, which hold nothing
            self.forget()
            self._num_restarts = self._team.num_restarts
        slot, version = wanted
        if self.holds(wanted):
            return
        whole = self._whole_of(version)
        parts = [encode(part_of(whole, plan)) for plan in self._plans[1:]]
        with self._team.together(Message(Command.ADAPTER, (slot, len(parts[0]), *self._sizes))):
            self._team.deal(parts)
            super().ensure(wanted)


class FollowingAdapters:
    """The adapters of every rank but the first; there is no room for any before rank 0 deals out the first one.

    Args:
        model: the rank's part.
        channel: where rank 0 speaks.
        device: where the part is.
    """

    def __init__(self, model: Model, channel: Channel, device: torch.device) -> None:
        self._model = model
        self._channel = channel
        self._device = device
        self._pool: AdapterPool | None = None
        self._dealt: dict[bytes, AdapterWeights] = {}  # what is being put in a slot
        self._slots: Any = None  # [num_tokens] int64 NumPy, of the next step's tokens

    def fill(self, message: Message) -> None:
        """Take this rank's part of an adapter and put it in its slot."""
        slot, num_bytes, num_slots, max_rank, dtype, max_num_tokens = message.numbers
        weights = decode(self._channel.take(num_bytes))
        if self._pool is None:
            self._pool = AdapterPool(
                self._model,
                self._dealt.__getitem__,
                PoolOptions(num_slots, max_rank, _DTYPES[dtype]),
                max_num_tokens=max_num_tokens,
                device=self._device,
            )
        self._dealt[weights.digest] = weights
        self._pool.ensure(AdapterSlot(slot, weights.digest))
        self._dealt.clear()

    def hold(self, message: Message) -> None:
        """Take the slots of the next step's tokens."""
        assert message.payload is not None
        self._slots = message.payload.numpy()

    @contextmanager
    def step(self) -> Generator[None]:
        """Hold the slots that came last while a step is computed, once."""
        slots, self._slots = self._slots, None
        if slots is None:
            yield
            return
        assert self._pool is not None, "rank 0 deals out adapters first"
        with self._pool.step.of(slots):
            yield
