"""Graphs: decode steps of a model, captured once for each of some sizes and then replayed as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from octavo_engine.overlap import GraphStats
from octavo_engine.runner.device import Device, Graph
from octavo_engine.runner.graph_plan import GraphPlan
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput

_log = logging.getLogger(__name__)
_NOWHERE = -1  # a slot that is not written

RunModel = Callable[[ModelInput], Tensor]


class GraphInputs:
    """The inputs that graphs read, at addresses that stay: one piece of memory for all sizes.

    A graph of `size` rows reads the first `size` entries of each tensor, and the whole width of block tables. Rows that
    a step does not have are sequences without a token: attention passes over them, and their slot is nowhere.

    Args:
        max_num_rows: of the largest graph.
        max_num_blocks: that a sequence can have.
        num_groups: KV groups.
        kv_layers: passed on.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_blocks: int,
        num_groups: int,
        kv_layers: tuple[KVLayer, ...],
        device: torch.device,
    ) -> None:
        make = partial(torch.zeros, dtype=torch.int64, device=device)
        self._counting = torch.arange(max_num_rows + 1, dtype=torch.int32, device=device)
        self._token_ids = make(max_num_rows)
        self._positions = make(max_num_rows)
        self._query_start_loc = make(max_num_rows + 1, dtype=torch.int32)
        self._seq_lens = make(max_num_rows, dtype=torch.int32)
        self._logits_indices = self._counting[:max_num_rows].long()
        self._groups = tuple(
            GroupInput(make((max_num_rows, max_num_blocks), dtype=torch.int32), make(max_num_rows))
            for _ in range(num_groups)
        )
        self._kv_layers = kv_layers
        self._views: dict[int, ModelInput] = {}

    def fill(self, step: ModelInput, size: int) -> ModelInput:
        """Copy a step of one token per sequence, and return the input of so many rows; always the same for a size."""
        num_rows = len(step.seq_lens)
        self._token_ids[:num_rows].copy_(step.token_ids)
        self._positions[:num_rows].copy_(step.positions)
        self._seq_lens[:num_rows].copy_(step.seq_lens)
        self._seq_lens[num_rows:size].zero_()
        torch.clamp(self._counting[: size + 1], max=num_rows, out=self._query_start_loc[: size + 1])
        for kept, group in zip(self._groups, step.groups, strict=True):
            kept.block_table[:num_rows, : group.block_table.shape[1]].copy_(group.block_table)
            kept.slot_mapping[:num_rows].copy_(group.slot_mapping)
            kept.slot_mapping[num_rows:size].fill_(_NOWHERE)
        return self._view(size)

    def _view(self, size: int) -> ModelInput:
        if size not in self._views:
            self._views[size] = ModelInput(
                token_ids=self._token_ids[:size],
                positions=self._positions[:size],
                query_start_loc=self._query_start_loc[: size + 1],
                seq_lens=self._seq_lens[:size],
                max_query_len=1,
                logits_indices=self._logits_indices[:size],
                groups=tuple(GroupInput(table[:size], slots[:size]) for table, slots in self._groups),
                kv_layers=self._kv_layers,
            )
        return self._views[size]


class Graphs:
    """Runs a model in steps that are launched: by a graph where there is one for them, else op by op.

    The first step of a size is run op by op, filled up as the graph will have it, so that its kernels are compiled and
    have run; then the graph is captured, and later steps replay it. What cannot be captured runs op by op for good: one
    warning says why, and `stats` counts the steps.

    Args:
        device: captures and replays.
        plan: sizes and memory.
        inputs: of all graphs.
    """

    def __init__(self, device: Device, plan: GraphPlan, inputs: GraphInputs) -> None:
        self._device = device
        self._plan = plan
        self._inputs = inputs
        self._graphs: dict[int, Graph] = {}
        self._no_more: str | None = None  # why nothing else is captured
        self._num_replayed = 0
        self._num_eager: Counter[str] = Counter()

    @property
    def stats(self) -> GraphStats:
        """How the model was run so far."""
        return GraphStats(len(self._graphs), self._num_replayed, dict(self._num_eager))

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory that the graphs have taken."""
        return sum(graph.num_bytes for graph in self._graphs.values())

    def __call__(self, model: RunModel, step: ModelInput) -> Tensor:
        """Return the hidden states of a step [num_tokens, hidden_size], which hold until the next one is launched.

        Args:
            model: the same in every call.
            step: on the device.
        """
        num_rows = len(step.seq_lens)
        if step.max_query_len > 1:
            return self._eager(model, step, "prompt")
        size = next((size for size in self._plan.sizes if size >= num_rows), None)
        if size is None:
            return self._eager(model, step, "rows")
        graph = self._graphs.get(size)
        if graph is not None:
            self._inputs.fill(step, size)
            graph.replay()
            self._num_replayed += 1
            return graph.output[:num_rows]
        if self._no_more is not None:
            return self._eager(model, step, self._no_more)
        inputs = self._inputs.fill(step, size)
        hidden = self._eager(model, inputs, "capture")[:num_rows]
        self._capture(model, inputs, size)
        return hidden

    def _eager(self, model: RunModel, step: ModelInput, reason: str) -> Tensor:
        self._num_eager[reason] += 1
        return model(step)

    def _capture(self, model: RunModel, inputs: ModelInput, size: int) -> None:
        """Capture a size that has just run; afterwards there may be no more."""
        try:
            self._graphs[size] = self._device.capture(partial(model, inputs))
        except Exception as error:
            self._no_more = "failed"
            _log.warning(
                "a decode step of %d rows cannot be captured as a graph: %s: %s; steps without a graph run op by op, "
                "slower, from now on (enforce_eager=True captures nothing)",
                size,
                type(error).__name__,
                error,
            )
            return
        if self._plan.num_bytes is not None and self.num_bytes > self._plan.num_bytes:
            self._no_more = "memory"
            _log.warning(
                "%d graphs have taken %.2f GiB, more than the %.2f GiB set aside for them; steps without a graph run "
                "op by op, slower, from now on; lower max_num_graphs or max_num_seqs",
                len(self._graphs),
                self.num_bytes / 2**30,
                self._plan.num_bytes / 2**30,
            )
