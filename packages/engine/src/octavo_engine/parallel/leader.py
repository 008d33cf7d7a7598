"""LeadingModel, LeadingStorage: the model and the KV cache of rank 0's runner, of which other ranks have parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.linear_adapters import StepAdapters
from octavo_engine.layers.mixture import MixtureOfExperts
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import Model, model_class
from octavo_engine.parallel.channel import Command, Message, copies_message, step_input, step_message
from octavo_engine.parallel.shard import Shard
from octavo_engine.parallel.team import Team
from octavo_engine.quant.base import WeightSlot
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.runner.model_input import ModelInput
from octavo_kernels import NotRecordable, sample_tokens
from octavo_kernels.recording import current
from octavo_kvcache import BlockCopy, KVCacheSpec
from octavo_kvcache.storage import KVStorage


class LeadingModel:
    """A `Model` that tells the other ranks of every step, and computes rank 0's part of it.

    So the runner is the same as for a model in one piece: it has all rows, all logits, and draws every token once.

    Args:
        config: of the whole model.
        shard: rank 0's part.
        team: the other ranks.

    Attributes:
        adapters: the slots of a step's tokens; None where no adapters are served.
    """

    def __init__(self, config: ModelConfig, shard: Shard, team: Team) -> None:
        self.config = config
        options = LayerOptions(device=torch.device("meta"), quant=Unquantized())
        self._whole: Model = model_class(config.architecture)(config, options)
        self.num_parameters = self._whole.num_parameters
        self._shard = shard
        self.adapters: StepAdapters | None = None
        self._team = team

    @property
    def shard(self) -> Shard:
        """Rank 0's part."""
        return self._shard

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states: [num_tokens, hidden_size].

        Raises:
            WorkerLost: a rank has ended, or does not answer.
            NotRecordable: a recording is open, which the ranks' sums would not be in.
        """
        self._check_not_recorded()
        if self.adapters is not None and self.adapters.slots is not None:
            with self._together(Message(Command.SLOTS, (), self.adapters.slots.cpu())):
                pass
        return self._hidden(model_input)

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the logits of hidden [rows, hidden_size]: [rows, vocab_size] fp32; see `Model.logits`."""
        with self._together(Message(Command.LOGITS, (len(hidden),))):
            logits = self._shard.logits(hidden.contiguous(), out)
        assert logits is not None
        return logits

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arg-max of the logits of hidden [rows, hidden_size], and its logit; see `Model.greedy`."""
        with self._together(Message(Command.GREEDY, (len(hidden),))):
            found = self._shard.greedy(hidden.contiguous())
        assert found is not None
        return found

    def draw(self, hidden: Tensor, *, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Draw from the logits of hidden [rows, hidden_size]; see `Model.draw`."""
        return sample_tokens(self.logits(hidden, out=out), **options)

    def _hidden(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states, which rank 0 and the others of its layers make together."""
        with self._together(step_message(model_input)):
            hidden = self._shard.hidden(model_input)
        assert hidden is not None
        return hidden

    def _together(self, message: Message) -> AbstractContextManager[None]:
        """Tell the ranks that have parts of rank 0's layers to do something, and do rank 0's part of it inside."""
        return self._team.together(message)

    @staticmethod
    def _check_not_recorded() -> None:
        if current() is not None:
            raise NotRecordable("the model is split over several processes, which wait for each other in every step")

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the linears of the whole model, without weights."""
        return self._whole.linears()

    def ends(self) -> None:
        """Return none: each rank has some rows of these matrices."""

    def mixtures(self) -> Iterator[tuple[str, MixtureOfExperts]]:
        """Yield rank 0's mixtures of experts, whose routers see every token."""
        return self._shard.model.mixtures()

    def kv_cache_specs(self, dtype: torch.dtype) -> list[KVCacheSpec]:
        """Say what rank 0 keeps of each layer per token."""
        return self._shard.model.kv_cache_specs(dtype)

    def slots(self) -> Iterator[WeightSlot]:
        """Yield nothing: the weights are there."""
        return iter(())

    def is_redundant(self, name: str) -> bool:
        """Return whether a tensor without a slot may be passed over."""
        return self._shard.model.is_redundant(name)

    def finish(self) -> None:
        """Do nothing: the weights are finished."""


class PipelinedModel(LeadingModel):
    """A `LeadingModel` whose layers are shared out among stages, of which rank 0 is in the last.

    The other stages compute a step as soon as it has begun, the last one its own part of it when rank 0 finishes the
    step. So the stages compute different steps at the same time, if steps begin before earlier ones are finished.
    """

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states: [num_tokens, hidden_size]; see `LeadingModel`."""
        self._check_not_recorded()
        return self.finish_step(self.begin_step(model_input))

    def begin_step(self, model_input: ModelInput) -> ModelInput:
        """Tell the other stages of a step, and return it in memory of its own, which `finish_step` takes later.

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        message = step_message(model_input)
        with self._team.together(message, self._team.links.earlier_stages):
            return step_input(message, model_input.kv_layers, model_input.token_ids.device)

    def finish_step(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states of the oldest step that has begun: [num_tokens, hidden_size].

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        return self._hidden(model_input)

    def _together(self, message: Message) -> AbstractContextManager[None]:
        return self._team.together(message, self._team.links.last_stage)


class LeadingStorage(KVStorage):
    """Rank 0's part of the KV cache; copies of blocks are made on all ranks.

    Args:
        specs: of rank 0's layers.
        num_blocks: of every rank.
        block_size: tokens per block.
        team: the other ranks, which take memory too.
        device: of rank 0.
        num_host_blocks: of every rank.
    """

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        num_blocks: int,
        block_size: int,
        *,
        team: Team,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
    ) -> None:
        super().__init__(specs, num_blocks, block_size, device=device, num_host_blocks=num_host_blocks)
        self._team = team
        team.allocate(num_blocks, num_host_blocks)

    def apply(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks on all ranks; see `KVStorage.apply`.

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        if copies:
            with self._team.together(copies_message(copies)):
                super().apply(copies)

    def apply_in_earlier_stages(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks on the ranks of all stages but the last, which follows by `apply_in_last_stage`.

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        if copies:
            with self._team.together(copies_message(copies), self._team.links.earlier_stages):
                pass

    def apply_in_last_stage(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks on the ranks of the last stage, rank 0 among them.

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        if copies:
            with self._team.together(copies_message(copies), self._team.links.last_stage):
                super().apply(copies)
