"""ModelRunner: runs scheduled batches on one device, from deltas to drawn tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.kv_scales import fill_scales
from octavo_engine.models.registry import Model
from octavo_engine.runner.adapter_pool import AdapterPool
from octavo_engine.runner.answer import Answer
from octavo_engine.runner.candidates import likeliest
from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.forward import Forward, make_forward
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.logits_buffer import LogitsBuffer
from octavo_engine.runner.model_input import KVLayer, ModelInput
from octavo_engine.runner.pooling import Pooler
from octavo_engine.runner.prompt_logprobs import PromptLogprobs
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.sampler import Drawn, draw, greedy, sample
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_rows import StepRows
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_kvcache import group_specs
from octavo_kvcache.storage import KVStorage


class RaggedStep(NamedTuple):
    """A step with prompts, chunks, forks or embeddings, ready to be computed.

    `drawing` are the places that draw or answer candidates, and `shared` says which of the wanted hidden states each
    goes by; None if each has its own.
    """

    rows: StepRows
    drawing: NDArray[np.int64]
    shared: NDArray[np.int64] | None
    model_input: ModelInput


class ModelRunner:
    """Keeps the rows of the running sequences and executes batches on them, one after the other.

    Args:
        model: with its weights loaded.
        storage: the KV cache, made for the model's `kv_cache_specs`.
        max_num_seqs: rows there can be.
        max_num_batched_tokens: tokens that a step can compute.
        max_model_len: tokens that a sequence can have; the model's table of positions must reach as far.
        device: where the model and the storage are.
        grammars: makes the matchers of requests with structured output; None if there are none.
        adapters: the model's adapters; None if it has none.
        jumps_ahead: whether tokens that a grammar forces follow a drawn one without a step of their own. Only for an
            executor with one step in flight: later ones would have been scheduled without them.

    Attributes:
        forward: what runs the model.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        device: torch.device | str = "cpu",
        grammars: GrammarCompiler | None = None,
        adapters: AdapterPool | None = None,
        jumps_ahead: bool = True,
    ) -> None:
        assert max_model_len <= model.config.max_position_embeddings
        self.model = model
        self.storage = storage
        self.device = torch.device(device)
        self._max_model_len = max_model_len
        kv_layers, num_groups = caches_of(model, storage)
        fill_scales(model, storage)
        max_num_blocks = -(-max_model_len // storage.block_size)
        self._rows = Rows(
            max_num_seqs, max_num_tokens=max_model_len, max_num_blocks=max_num_blocks, num_groups=num_groups
        )
        self._inputs = InputBuilder(
            StepBuffers(
                max_num_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_num_blocks=max_num_blocks,
                num_groups=num_groups,
            ),
            kv_layers,
            block_size=storage.block_size,
            device=self.device,
        )
        self.forward: Forward = make_forward(model, self._inputs, self.device)
        self._sampling = SamplingRows(self._rows.token_ids, model.config.vocab_size, self.device, grammars)
        self._logits = LogitsBuffer(max_num_seqs, model.config.vocab_size, self.device)
        self._pooler = Pooler()
        self._prompt_logprobs = PromptLogprobs(self._rows.token_ids, self._make_prompt_logits, max_num_seqs)
        self._adapters = adapters
        if adapters is not None:
            adapters.record(self._inputs)
        self._jumps_ahead = jumps_ahead

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step: update the rows, compute, draw, append.

        The answer is on the host when this returns.
        """
        with self.forward.threads():
            return self._run(batch)

    def _run(self, batch: ScheduledBatch) -> ModelOutput:
        self._update(batch)
        return self._compute(batch)

    def _compute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run a step whose rows are up to date."""
        if not batch.num_rows:
            return ModelOutput(token_ids=())
        step = DecodeStep.of(batch)
        if step is None or self._rows.num_embedding or self._prompt_logprobs:
            return self._run_ragged(StepRows.of(batch))
        return self._decode(step)

    def _decode(self, step: DecodeStep) -> ModelOutput:
        """Run a step in which every row computes one token and draws the next."""
        model_input = self._inputs.decode(step, self._rows)
        rows, ends = self._inputs.decoding.rows, self._inputs.decoding.ends
        forward = self._forward_of(rows)
        if self._rows.num_searching:
            answer = Answer(len(rows))
            self._answer(answer, np.arange(len(rows)), forward(model_input), rows, ends.astype(np.int64))
            return answer.output()
        if self._sampling.takes_best(step.row_ids):
            token_ids, logits = forward.greedy(model_input)
            if all(map(isfinite, logits.tolist())):
                self._rows.append(rows, ends, token_ids)
                return ModelOutput(token_ids=tuple(zip(token_ids.tolist())))  # a tuple of one for each row
            drawn = Drawn(token_ids, np.isfinite(logits))
            self._append(rows, ends, drawn)
        else:
            drawn = self._draw(forward(model_input), rows, ends.astype(np.int64))
        answer = Answer(len(rows))
        self._add_drawn(answer, np.arange(len(rows)), rows, ends, drawn)
        return answer.output()

    def _forward_of(self, rows: NDArray[np.int64], num_tokens: NDArray[np.int64] | None = None) -> Forward:
        """Return what runs a step of some rows; each computes so many tokens, None stands for one."""
        if not self._rows.num_adapted:
            return self.forward
        slots = self._rows.adapters[rows]
        if (slots < 0).all():
            return self.forward
        assert self._adapters is not None
        return self._adapters.forward(slots if num_tokens is None else np.repeat(slots, num_tokens))

    @torch.inference_mode()
    def _run_ragged(self, rows: StepRows) -> ModelOutput:
        """Run a step with prompts, chunks, forks or embeddings."""
        step = self._build(rows)
        return self._read(step, self._forward_of(rows.rows, rows.num_scheduled_tokens)(step.model_input))

    def _build(self, step: StepRows) -> RaggedStep:
        """Make the input of a step whose rows are up to date."""
        drawing = np.flatnonzero(step.samples & ~self._rows.embeds[step.rows])
        sources, shared = step.sources[drawing], None
        if step.forks:  # one row of logits serves a parent and its forks
            sources, shared = np.unique(sources, return_inverse=True)
        return RaggedStep(step, drawing, shared, self._inputs.build(step, self._rows, step.last_tokens(sources)))

    def _read(self, ragged: RaggedStep, hidden: Tensor) -> ModelOutput:
        """Answer a step whose last hidden states [num_tokens, hidden_size] are there."""
        step, drawing, shared, model_input = ragged
        answer = Answer(len(step.rows))
        if self._rows.num_embedding:
            for place, vector in self._pooler.pool(step, self._rows, hidden).items():
                answer.add_pooled(place, vector)
        if self._prompt_logprobs:
            answer.add_prompt_logprobs(self._prompt_logprobs.collect(step, hidden))
        if len(drawing):
            ends = step.ends[drawing]
            self._answer(answer, drawing, hidden[model_input.logits_indices], step.rows[drawing], ends, shared)
        return answer.output()

    @torch.inference_mode()
    def _answer(
        self,
        answer: Answer,
        places: NDArray[np.int64],
        hidden: Tensor,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        shared: NDArray[np.int64] | None = None,
    ) -> None:
        """Answer some places: candidates where the rows search, drawn tokens elsewhere; see `_draw`."""
        num_candidates = self._rows.num_candidates[rows]
        searching = np.flatnonzero(num_candidates)
        if not len(searching):
            self._add_drawn(answer, places, rows, positions, self._draw(hidden, rows, positions, shared))
            return
        sources = searching if shared is None else shared[searching]
        with self._heads_of(rows[searching]):
            logits = self._make_logits(_rows_of(hidden, sources))
        changes = self._sampling.changes(rows[searching], positions[searching])
        answer.add_candidates(places[searching], likeliest(logits, int(num_candidates.max()), changes))
        drawing = np.flatnonzero(num_candidates == 0)
        if len(drawing):
            sources, shared = np.unique(drawing if shared is None else shared[drawing], return_inverse=True)
            drawn = self._draw(_rows_of(hidden, sources), rows[drawing], positions[drawing], shared)
            self._add_drawn(answer, places[drawing], rows[drawing], positions[drawing], drawn)

    def _update(self, batch: ScheduledBatch) -> None:
        if batch.finished:
            self._pooler.release(batch.finished)
            self._rows.release(batch.finished)
            self._sampling.release(batch.finished)
            self._prompt_logprobs.release(batch.finished)
        self.storage.apply(batch.copies)
        for new in batch.new:
            self._rows.add(new)
            if new.adapter is not None:
                assert self._adapters is not None
                self._adapters.ensure(new.adapter)
            self._sampling.add(new)
            self._prompt_logprobs.add(new, self.model.config.vocab_size)
        if batch.moves:
            self._rows.move(batch.moves)
            self._sampling.move(batch.moves)
            self._inputs.decoding.forget()  # block tables of rows have changed as a whole
        self._rows.update(batch.cached)

    @torch.inference_mode()
    def _draw(
        self,
        hidden: Tensor,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        shared: NDArray[np.int64] | None = None,
    ) -> Drawn:
        """Draw the tokens at some positions of different rows, and append them.

        Args:
            hidden: [sources, hidden_size], where the logits come from.
            rows: [draws].
            positions: [draws].
            shared: [draws], which of the sources each draw goes by; None if each has its own.
        """
        forced = self._sampling.forced(rows)
        if forced:
            drawn = self._draw_others(forced, hidden, rows, positions, shared)
        else:
            drawn = self._draw_all(hidden, rows, positions, shared)
        self._append(rows, positions, drawn)
        return drawn

    def _draw_all(
        self, hidden: Tensor, rows: NDArray[np.int64], positions: NDArray[np.int64], shared: NDArray[np.int64] | None
    ) -> Drawn:
        sampling = self._sampling.batch(rows, positions)
        with self._heads_of(rows, shared):
            if sampling is None:
                return greedy(*self.model.greedy(hidden), shared)
            if sampling.is_plain:
                draw_from = partial(self.model.draw, out=self._logits.rows(len(hidden)))
                return draw(hidden, draw_from, sampling, shared)
            logits = self._make_logits(hidden)
        return sample(logits, sampling, shared)

    def _draw_others(
        self,
        forced: Mapping[int, list[int]],
        hidden: Tensor,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        shared: NDArray[np.int64] | None,
    ) -> Drawn:
        """Draw in the places whose token is not forced; no logits are computed for the others."""
        firsts = {place: token_ids[0] for place, token_ids in forced.items()}
        places = np.array([place for place in range(len(rows)) if place not in forced], np.int64)
        if not len(places):
            return Drawn(places, np.ones(0, np.bool_)).beside(firsts, places)
        sources = places
        if shared is not None:
            sources, shared = np.unique(shared[places], return_inverse=True)
        drawn = self._draw_all(_rows_of(hidden, sources), rows[places], positions[places], shared)
        return drawn.beside(firsts, places)

    def _make_logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden, out=self._logits.rows(len(hidden)))

    def _make_prompt_logits(self, hidden: Tensor, row: int) -> Tensor:
        with self._heads_of(np.full(len(hidden), row)):
            return self._make_logits(hidden)

    def _heads_of(
        self, rows: NDArray[np.int64], shared: NDArray[np.int64] | None = None
    ) -> AbstractContextManager[None]:
        """Return what to open where logits of some rows are made, by the heads of their adapters; see `_draw`.

        Rows that share a source have the same adapter.
        """
        if not self._rows.num_adapted:
            return nullcontext()
        assert self._adapters is not None
        slots = self._rows.adapters[rows]
        if shared is not None:
            slots = slots[np.unique(shared, return_index=True)[1]]
        return self._adapters.heads.of(slots)

    def _add_drawn(
        self,
        answer: Answer,
        places: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64] | NDArray[np.int32],
        drawn: Drawn,
    ) -> None:
        """Put a draw of some rows, which was appended, in its places of the answer, and what must follow behind it."""
        answer.add_drawn(places, drawn)
        if self._jumps_ahead:
            for index, token_ids in self._sampling.forced(rows).items():
                if drawn.sound[index]:
                    room = self._max_model_len - int(positions[index]) - 1
                    self._follow(int(rows[index]), int(positions[index]) + 1, token_ids[:room])
                    answer.add_forced(int(places[index]), token_ids[:room])
        answer.add_states(places, self._sampling.states(rows))

    def _follow(self, row: int, position: int, token_ids: list[int]) -> None:
        """Append tokens that were not drawn to a row, from a position on."""
        one = np.array([row])
        for offset, token_id in enumerate(token_ids):
            self._rows.append(one, np.array([position + offset]), np.array([token_id]))
            self._sampling.append(one, np.array([token_id]))

    def _append(self, rows: NDArray[np.int64], positions: NDArray[np.int64] | NDArray[np.int32], drawn: Drawn) -> None:
        token_ids = drawn.token_ids
        if not drawn.all_sound:
            rows, positions, token_ids = rows[drawn.sound], positions[drawn.sound], token_ids[drawn.sound]
        self._rows.append(rows, positions, token_ids)
        self._sampling.append(rows, token_ids)


def _rows_of(hidden: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Return some rows of a tensor: itself if they are all of its rows."""
    return hidden if len(rows) == len(hidden) else hidden[torch.from_numpy(rows).to(hidden.device)]


def caches_of(model: Model, storage: KVStorage) -> tuple[tuple[KVLayer, ...], int]:
    """Return the caches of all of a model's layers, and how many KV groups they form."""
    dtype = storage.layer(0)[0].dtype
    groups = group_specs(model.kv_cache_specs(dtype))
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    layers = (
        KVLayer(*storage.layer(layer), group_of[layer], *(storage.scales(layer) or ())) for layer in sorted(group_of)
    )
    return tuple(layers), len(groups)
