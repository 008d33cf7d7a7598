"""For tests of the runner: small models with random weights, and a driver that stands in for the scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from octavo_engine.batch import CachedRow, ModelOutput, NewRow, ScheduledBatch
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig, RopeConfig
from octavo_engine.models.llama import Llama
from octavo_engine.models.mixtral import Mixtral
from octavo_engine.models.registry import Model
from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.choose import choose_method
from octavo_engine.runner.forward import OpByOp
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.types import Pooling, SamplingParams, Task
from octavo_kvcache import BlockCopy, TableUpdate
from octavo_kvcache.storage import KVStorage


def tiny_config(*, vocab_size: int = 97, tie_word_embeddings: bool = False) -> ModelConfig:
    """Return the configuration of a Llama of two layers that computes in microseconds."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_ids=(),
        eos_token_ids=(2,),
        dtype="float32",
        hidden_act="silu",
    )


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights for a Llama or a Mixtral, in float32 on the CPU, by their names in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    slots = _class_of(config)(config, LayerOptions(device=torch.device("meta"))).slots()
    return {
        slot.name: torch.empty(slot.shape).normal_(1.0 if "norm" in slot.name else 0.0, 0.2, generator=generator)
        for slot in slots
    }


def _class_of(config: ModelConfig) -> type[Llama]:
    return Mixtral if config.num_experts else Llama


def random_model(
    config: ModelConfig, seed: int = 0, quant: QuantMethod[Any] | None = None, device: torch.device | str = "cpu"
) -> Llama:
    """Return a Llama or a Mixtral of random weights in float32; `quant` is chosen as for any model."""
    device = torch.device(device)
    options = LayerOptions(device=device, quant=quant or choose_method(device, torch.float32))
    model = _class_of(config)(config, options)
    weights = random_weights(config, seed)
    for slot in model.slots():
        slot.fill(weights[slot.name])
    model.finish()
    return model


def make_runner(
    model: Model,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    kv_dtype: torch.dtype = torch.float32,
    watch: Callable[[ModelInput, Tensor], None] | None = None,
) -> ModelRunner:
    """Return a runner on a Llama's device with a KV cache full of NaN, so that a read of an unwritten slot shows.

    Where `kv_dtype` is one of codes, their scales are NaN. `watch` is shown the input and the hidden states of every
    step.
    """
    device = model.norm.weight.device if isinstance(model, Llama) else "cpu"
    storage = KVStorage(model.kv_cache_specs(kv_dtype), num_blocks, block_size, device=device)
    for layer in range(storage.num_layers):
        for cache in storage.scales(layer) or storage.layer(layer):
            cache.fill_(float("nan"))
    max_model_len = model.config.max_position_embeddings
    runner = ModelRunner(
        model,
        storage,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs * max_model_len,
        max_model_len=max_model_len,
        device=device,
    )
    if watch is not None:
        runner.forward = OpByOp(_watched(runner.forward, watch), model.greedy)
    return runner


def _watched(
    forward: Callable[[ModelInput], Tensor], watch: Callable[[ModelInput, Tensor], None]
) -> Callable[[ModelInput], Tensor]:
    def watched(model_input: ModelInput) -> Tensor:
        hidden = forward(model_input)
        watch(model_input, hidden)
        return hidden

    return watched


@dataclass(slots=True)
class DrivenRow:
    """What the driver knows of a row: its tokens, how many are computed, its blocks."""

    new: NewRow
    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int = 0
    entered: bool = False


@dataclass(slots=True)
class Driver:
    """Schedules by hand: the test says how many tokens of which row a step computes.

    Block ids are handed out in an order shuffled by `seed`.
    """

    runner: ModelRunner
    seed: int = 0
    rows: dict[int, DrivenRow] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    _copies: list[BlockCopy] = field(default_factory=list)
    _step_id: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(1, self.runner.storage.num_blocks))
        random.Random(self.seed).shuffle(self._free)

    def add(
        self,
        row: int,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        num_prompt_tokens: int | None = None,
        seed: int = 0,
        sequence_index: int = 0,
        stop_token_ids: Sequence[int] = (),
        fork_of: int | None = None,
        task: Task = "generate",
        pooling: Pooling = "last",
        sampler_state: float | None = None,
    ) -> None:
        """Announce a sequence; it enters with the first step that names its row."""
        new = NewRow(
            row=row,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
            sampling=sampling or SamplingParams(temperature=0),
            seed=seed,
            sequence_index=sequence_index,
            stop_token_ids=frozenset(stop_token_ids),
            block_ids=((),),
            num_computed_tokens=0,
            num_scheduled_tokens=0,
            samples=False,
            fork_of=fork_of,
            task=task,
            pooling=pooling,
            sampler_state=sampler_state,
        )
        self.rows[row] = DrivenRow(new, list(token_ids), [])

    def step(self, num_scheduled_tokens: Mapping[int, int], finished: Sequence[int] = ()) -> dict[int, tuple[int, ...]]:
        """Run a step, given the tokens to compute by row; return the tokens that each of its rows drew."""
        batch, output = self.run(num_scheduled_tokens, finished)
        return dict(zip(rows_of(batch), output.token_ids, strict=True))

    def run(
        self, num_scheduled_tokens: Mapping[int, int], finished: Sequence[int] = ()
    ) -> tuple[ScheduledBatch, ModelOutput]:
        """Run a step: the batch, and the whole output in its order."""
        for row in finished:
            block_ids = self.rows.pop(row).block_ids
            held = {block_id for state in self.rows.values() for block_id in state.block_ids}
            self._free += [block_id for block_id in block_ids if block_id not in held]
        copies, self._copies = tuple(self._copies), []
        entering = [row for row in num_scheduled_tokens if not self.rows[row].entered]
        staying = [row for row in num_scheduled_tokens if row not in entering]
        # Before the entering rows: a fork takes the blocks that its parent has after the step.
        cached = tuple(self._continue(row, num_scheduled_tokens[row]) for row in staying)
        self._step_id += 1
        batch = ScheduledBatch(
            step_id=self._step_id,
            new=tuple(self._enter(row, num_scheduled_tokens[row]) for row in entering),
            cached=cached,
            finished=tuple(finished),
            copies=copies,
        )
        output = self.runner.execute(batch)
        for row, token_ids in zip(rows_of(batch), output.token_ids, strict=True):
            self.rows[row].token_ids.extend(token_ids)
        return batch, output

    def generate(self, num_tokens: int) -> dict[int, list[int]]:
        """Compute what is left of all prompts at once, then decode; return each row's last `num_tokens` tokens."""
        for _ in range(num_tokens):
            self.step({row: self._num_left(state) for row, state in self.rows.items()})
        return {row: state.token_ids[-num_tokens:] for row, state in self.rows.items()}

    def _num_left(self, state: DrivenRow) -> int:
        if state.new.fork_of is not None and not state.entered:
            return 0
        return len(state.token_ids) - state.num_computed_tokens

    def _enter(self, row: int, num_scheduled: int) -> NewRow:
        state = self.rows[row]
        state.entered = True
        if state.new.fork_of is not None:
            self._share(self.rows[state.new.fork_of], state)
        num_computed, _ = self._advance(state, num_scheduled)
        return replace(
            state.new,
            block_ids=(tuple(state.block_ids),),
            num_computed_tokens=num_computed,
            num_scheduled_tokens=num_scheduled,
            samples=state.num_computed_tokens == len(state.token_ids),
        )

    def _share(self, parent: DrivenRow, child: DrivenRow) -> None:
        """Give a fork its parent's full blocks, and a copy of the partial one before the next step."""
        child.num_computed_tokens = len(child.token_ids)
        num_full, num_partial = divmod(child.num_computed_tokens, self.runner.storage.block_size)
        child.block_ids = parent.block_ids[:num_full]
        if num_partial:
            child.block_ids.append(self._free.pop())
            self._copies.append(BlockCopy(parent.block_ids[num_full], child.block_ids[-1]))

    def _continue(self, row: int, num_scheduled: int) -> CachedRow:
        state = self.rows[row]
        num_computed, update = self._advance(state, num_scheduled)
        samples = state.num_computed_tokens == len(state.token_ids)
        return CachedRow(row, num_computed, num_scheduled, samples, (update,) if update[1] else ())

    def _advance(self, state: DrivenRow, num_scheduled: int) -> tuple[int, TableUpdate]:
        num_computed = state.num_computed_tokens
        state.num_computed_tokens += num_scheduled
        first = len(state.block_ids)
        num_blocks = -(-state.num_computed_tokens // self.runner.storage.block_size)
        ids = tuple(self._free.pop() for _ in range(num_blocks - first))
        state.block_ids.extend(ids)
        return num_computed, TableUpdate(first, ids)


def rows_of(batch: ScheduledBatch) -> list[int]:
    """Return the rows of a batch in the order of its output."""
    return [new.row for new in batch.new] + [cached.row for cached in batch.cached]
