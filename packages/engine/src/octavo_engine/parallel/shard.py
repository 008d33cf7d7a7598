"""Shard: a rank's part of a model, loaded from its part of the files, and what it computes of each command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.models.registry import Model
from octavo_engine.parallel.group import Group
from octavo_engine.parallel.layers import join_layers
from octavo_engine.parallel.plan import ShardPlan, vocabulary_part
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.source import Source
from octavo_engine.weights.stored import StoredTensor

LoadModel = Callable[..., Model]
"""`load_model` with all but the source and the progress chosen."""


class PartOfSource:
    """A WeightSource: what one rank keeps of a source's weights; `num_bytes` counts what has come of the files."""

    def __init__(self, source: Source, plan: ShardPlan) -> None:
        self.name = source.name
        self.config = plan.config
        self.num_weights = source.num_weights - plan.num_left_out
        self.num_bytes = 0
        self._source = source
        self._plan = plan

    def weights(self) -> Iterator[tuple[str, Tensor | StoredTensor]]:
        """Yield each weight's part once; biases that another rank adds are zeros."""
        for name, weight in self._source.weights(self._plan):
            if self._plan.leaves_out(name):
                continue
            assert not isinstance(weight, QuantizedTensor), "these are not cut, and refused before"
            self.num_bytes += weight.rows.nbytes if isinstance(weight, StoredTensor) else weight.nbytes
            if self._plan.rank and self._plan.is_added_once(name):
                assert isinstance(weight, Tensor), "biases are not quantised"
                yield name, torch.zeros_like(weight)
            else:
                yield name, weight


class Shard:
    """One rank's part of a model. Its methods are collective: all ranks call them together.

    Args:
        source: the whole model's files.
        group: the ranks, whose tensors are on the model's device.
        load: makes a model of a source.
        progress: called with the number of weights read and their total.
        expert_parallel: whether a rank has whole experts instead of a part of each.

    Attributes:
        model: the part.
        num_bytes: of the weights that were read, as the files store them.
    """

    def __init__(
        self, source: Source, group: Group, load: LoadModel, progress: Any = None, *, expert_parallel: bool = False
    ) -> None:
        plan = ShardPlan(source.config, group.rank, group.size, expert_parallel=expert_parallel)
        part = PartOfSource(source, plan)
        self.model = load(part, progress=progress)
        self.num_bytes = part.num_bytes
        join_layers(self.model, plan.first_token_id, group)
        self._group = group
        self._first_token_id = plan.first_token_id
        self._parts = [vocabulary_part(source.config.vocab_size, rank, group.size) for rank in range(group.size)]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor | None:
        """Return the logits of rank 0's hidden [rows, hidden_size] at rank 0: [rows, vocab_size] fp32.

        Args:
            hidden: overwritten on the other ranks.
            out: memory for the result, which is then there.
        """
        self._group.broadcast(hidden)
        own = self.model.logits(hidden)
        widest = len(self._parts[0])
        parts = self._group.gather(F.pad(own, (0, widest - own.shape[1])))
        if not parts:
            return None
        return torch.cat([p[:, : len(ids)] for p, ids in zip(parts, self._parts, strict=True)], dim=1, out=out)

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the arg-max of the logits of rank 0's hidden and its logit at rank 0; see `Model.greedy`."""
        self._group.broadcast(hidden)
        token_ids, best = self.model.greedy(hidden)
        own = torch.stack([best.double(), (token_ids + self._first_token_id).double()])  # ids below 2^53 are exact
        parts = self._group.gather(own)
        if not parts:
            return None
        bests, ids = torch.stack(parts).unbind(1)  # [size, rows] each
        largest = bests.amax(0)  # NaN where any is
        lowest = torch.where(bests == largest, ids, torch.inf).amin(0)
        return lowest.nan_to_num(posinf=0).long(), largest.float()
