"""Shard: a rank's part of a model, loaded from its part of the files, and what it computes of each command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama
from octavo_engine.models.llama_stage import LlamaStage
from octavo_engine.models.registry import Model, ModelClass, model_class
from octavo_engine.parallel.dual_batch import DualBatch, at_once
from octavo_engine.parallel.group import Group
from octavo_engine.parallel.layers import join_layers
from octavo_engine.parallel.pipe import Pipe
from octavo_engine.parallel.plan import ShardPlan, vocabulary_part
from octavo_engine.parallel.stages import Stage
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.weights.cut import read_whole
from octavo_engine.weights.load import Weight
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.source import Source
from octavo_engine.weights.stored import StoredTensor

LoadModel = Callable[..., Model]
"""`load_model` with all but the source and the progress chosen."""


class PartOfSource:
    """A WeightSource: what one rank keeps of a source's weights; `num_bytes` counts what has come of the files.

    Args:
        source: the whole model's files.
        plan: the rank's part of each layer.
        stage: its layers; None for all.
    """

    def __init__(self, source: Source, plan: ShardPlan, stage: Stage | None = None) -> None:
        self.name = source.name
        self.config = plan.config
        self.is_quantized = source.is_quantized
        self.num_bytes = 0
        self._source = source
        self._plan = plan
        self._stage = stage
        self.num_weights = sum(map(self._keeps, source.num_bytes()))

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield each weight's part once; biases that another rank adds are zeros."""
        cut = self._plan if self._plan.size > 1 else read_whole
        for name, weight in self._source.weights(cut, self._keeps):
            self.num_bytes += _num_bytes(weight)
            if self._plan.rank and self._plan.is_added_once(name):
                assert isinstance(weight, Tensor), "biases are not quantised"
                yield name, torch.zeros_like(weight)
            else:
                yield name, weight

    def _keeps(self, name: str) -> bool:
        if self._stage is not None and not self._stage.keeps(name, tied=self.config.tie_word_embeddings):
            return False
        return not self._plan.leaves_out(name)


def _num_bytes(weight: Weight) -> int:
    match weight:
        case StoredTensor():
            return int(weight.rows.nbytes)
        case QuantizedTensor():
            return weight.num_bytes
    return weight.nbytes


class Shard:
    """One rank's part of a model. Its methods are collective: all ranks of its group call them together.

    Args:
        source: the whole model's files.
        group: the ranks that split the same layers, whose tensors are on the model's device.
        stage: the layers.
        pipe: to the stages before and behind; None if there are no others.
        load: makes a model of a source.
        progress: called with the number of weights read and their total.
        expert_parallel: whether a rank has whole experts instead of a part of each.
        dual_batch: computes steps of many tokens as two halves; None computes all of them at once.

    Attributes:
        model: the part.
        num_bytes: of the weights that were read, as the files store them.
        is_alone: whether no other rank has a part of the same layers.
        plans: what each rank keeps.
    """

    def __init__(
        self,
        source: Source,
        group: Group,
        stage: Stage,
        pipe: Pipe | None,
        load: LoadModel,
        progress: Any = None,
        *,
        expert_parallel: bool = False,
        dual_batch: DualBatch | None = None,
    ) -> None:
        self.plans = [
            ShardPlan(source.config, rank, group.size, expert_parallel=expert_parallel) for rank in range(group.size)
        ]
        plan = self.plans[group.rank]
        part = PartOfSource(source, plan, None if pipe is None else stage)
        self.model = load(
            part, progress=progress, make_model=None if pipe is None else _stage_maker(part.config, stage)
        )
        self.num_bytes = part.num_bytes
        self.is_alone = group.size == 1
        if not self.is_alone:
            join_layers(self.model, plan.first_token_id, group)
        self._group = group
        self._pipe = pipe
        self._run = at_once if dual_batch is None else dual_batch.run
        self._first_token_id = plan.first_token_id
        self._parts = [vocabulary_part(source.config.vocab_size, rank, group.size) for rank in range(group.size)]

    def hidden(self, model_input: ModelInput) -> Tensor | None:
        """Return the last hidden states of a step, [num_tokens, hidden_size]; None if another stage makes them."""
        model = self.model
        if self._pipe is None:
            return self._run(lambda part, _: model(part), model_input)
        assert isinstance(model, LlamaStage)
        residual = self._pipe.take(len(model_input.token_ids))
        if residual is None:
            x = self._run(lambda part, _: model.advance(part, None), model_input)
        else:
            x = self._run(lambda part, tokens: model.advance(part, residual[tokens]), model_input)
        if self._pipe.is_last:
            return x
        self._pipe.pass_on(x)
        return None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor | None:
        """Return the logits of rank 0's hidden [rows, hidden_size] at rank 0: [rows, vocab_size] fp32.

        Args:
            hidden: overwritten on the other ranks.
            out: memory for the result, which is then there.
        """
        if self.is_alone:
            return self.model.logits(hidden, out=out)
        self._group.broadcast(hidden)
        own = self.model.logits(hidden)
        widest = len(self._parts[0])
        parts = self._group.gather(F.pad(own, (0, widest - own.shape[1])))
        if not parts:
            return None
        return torch.cat([p[:, : len(ids)] for p, ids in zip(parts, self._parts, strict=True)], dim=1, out=out)

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the arg-max of the logits of rank 0's hidden and its logit at rank 0; see `Model.greedy`."""
        if self.is_alone:
            return self.model.greedy(hidden)
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


def _stage_maker(config: ModelConfig, stage: Stage) -> ModelClass:
    """Return what makes an empty stage of an architecture."""
    whole = model_class(config.architecture)
    assert isinstance(whole, type), "an architecture is a class"
    assert issubclass(whole, Llama), "check_size lets no other architecture through"
    return partial(LlamaStage, layers=range(stage.start, stage.stop), layer_class=whole.layer_class)
