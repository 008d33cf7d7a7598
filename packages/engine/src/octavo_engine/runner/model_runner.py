"""ModelRunner: runs scheduled batches on one device, from deltas to drawn tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.models.registry import Model
from octavo_engine.runner.model_input import KVLayer, StepRows, build
from octavo_engine.runner.pooling import Pooler
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.sampler import Drawn, sample
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.types import TokenLogprobs
from octavo_kvcache import group_specs
from octavo_kvcache.storage import KVStorage

_UNSOUND = "the model's output for this sequence is not a finite number"


class ModelRunner:
    """Keeps the rows of the running sequences and executes batches on them, one after the other.

    Args:
        model: with its weights loaded.
        storage: the KV cache, made for the model's `kv_cache_specs`.
        max_num_seqs: rows there can be.
        max_model_len: tokens that a sequence can have; the model's table of positions must reach as far.
        device: where the model and the storage are.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device | str = "cpu",
    ) -> None:
        assert max_model_len <= model.config.max_position_embeddings
        self.model = model
        self.storage = storage
        self.device = torch.device(device)
        self._kv_layers, num_groups = _kv_layers(model, storage)
        self._rows = Rows(max_num_seqs, num_groups)
        self._sampling = SamplingRows(max_num_seqs, model.config.vocab_size, self.device)
        self._pooler = Pooler()

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step: update the rows, compute, draw, append.

        The answer is on the host when this returns.
        """
        self._update(batch)
        if not batch.num_rows:
            return ModelOutput(token_ids=())
        step = StepRows.of(batch)
        drawing = np.flatnonzero(step.samples & ~self._rows.embeds[step.rows])
        # A row of logits may serve several places: a parent and its forks.
        sources, logits_rows = np.unique(step.sources[drawing], return_inverse=True)
        model_input = build(
            step,
            self._rows,
            self._kv_layers,
            logits_indices=step.last_tokens(sources),
            block_size=self.storage.block_size,
            device=self.device,
        )
        hidden = self.model(model_input)
        answer = _Answer(batch.num_rows)
        for place, vector in self._pooler.pool(step, self._rows, hidden).items():
            answer.add_pooled(place, vector)
        if len(drawing):
            logits = self.model.logits(hidden[model_input.logits_indices])
            if len(drawing) > len(sources):
                logits = logits[torch.from_numpy(logits_rows).to(self.device)]
            rows = step.rows[drawing]
            drawn = sample(logits, self._sampling.batch(rows, self._rows.num_tokens[rows]))
            self._append(rows, drawn)
            answer.add_drawn(drawing, drawn)
        return answer.output()

    def _update(self, batch: ScheduledBatch) -> None:
        self._pooler.release(batch.finished)
        self.storage.apply(batch.copies)
        for new in batch.new:
            self._rows.add(new)
            self._sampling.add(new)
        self._rows.update(batch.cached)

    def _append(self, rows: NDArray[np.int64], drawn: Drawn) -> None:
        if not drawn.sound.all():
            rows, token_ids = rows[drawn.sound], drawn.token_ids[drawn.sound]
        else:
            token_ids = drawn.token_ids
        self._rows.append(rows, token_ids)
        self._sampling.append(rows, token_ids)


class _Answer:
    """A ModelOutput in the making."""

    def __init__(self, num_rows: int) -> None:
        self._token_ids: list[tuple[int, ...]] = [()] * num_rows
        self._logprobs: list[tuple[TokenLogprobs, ...] | None] | None = None
        self._pooled: dict[int, tuple[float, ...]] = {}
        self._errors: dict[int, str] = {}

    def add_drawn(self, places: NDArray[np.int64], drawn: Drawn) -> None:
        if drawn.logprobs is not None:
            self._logprobs = [None] * len(self._token_ids)
        for index, place in enumerate(places.tolist()):
            if not drawn.sound[index]:
                self._errors[place] = _UNSOUND
                continue
            self._token_ids[place] = (int(drawn.token_ids[index]),)
            entry = drawn.logprobs[index] if drawn.logprobs is not None else None
            if self._logprobs is not None and entry is not None:
                self._logprobs[place] = (entry,)

    def add_pooled(self, place: int, vector: Tensor) -> None:
        if bool(vector.isfinite().all()):
            self._pooled[place] = tuple(vector.tolist())
        else:
            self._errors[place] = _UNSOUND

    def output(self) -> ModelOutput:
        return ModelOutput(
            token_ids=tuple(self._token_ids),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            pooled=self._pooled or None,
            errors=self._errors or None,
        )


def _kv_layers(model: Model, storage: KVStorage) -> tuple[tuple[KVLayer, ...], int]:
    """Collect the caches of all layers, and count the KV groups."""
    dtype = storage.layer(0)[0].dtype
    groups = group_specs(model.kv_cache_specs(dtype))
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return tuple(KVLayer(*storage.layer(layer), group_of[layer]) for layer in sorted(group_of)), len(groups)
