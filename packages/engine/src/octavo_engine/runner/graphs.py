"""Graphs: steps of a model, captured once for each of some shapes and then replayed as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from octavo_engine.overlap import GraphStats
from octavo_engine.runner.device import Device, Graph
from octavo_engine.runner.graph_plan import GraphPlan, GraphShape
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput

_log = logging.getLogger(__name__)
_NOWHERE = -1  # a slot that is not written

RunModel = Callable[[ModelInput], Tensor]


class GraphInputs:
    """The inputs that graphs read, at addresses that stay: one piece of memory for all shapes.

    A graph reads the first `num_tokens` or `num_rows` entries of each tensor, and the whole width of block tables. Rows
    that a step does not have are sequences without a token, and tokens that it does not have belong to no sequence:
    attention passes over them, and their slot is nowhere.

    Args:
        shapes: of all graphs.
        max_num_blocks: that a sequence can have.
        num_groups: KV groups.
        kv_layers: passed on.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        shapes: tuple[GraphShape, ...],
        max_num_blocks: int,
        num_groups: int,
        kv_layers: tuple[KVLayer, ...],
        device: torch.device,
    ) -> None:
        make = partial(torch.zeros, dtype=torch.int64, device=device)
        max_num_tokens = max(shape.num_tokens for shape in shapes)
        max_num_rows = max(shape.num_rows for shape in shapes)
        self._counting = torch.arange(max_num_rows + 1, dtype=torch.int32, device=device)
        self._token_ids = make(max_num_tokens)
        self._positions = make(max_num_tokens)
        self._query_start_loc = make(max_num_rows + 1, dtype=torch.int32)
        self._seq_lens = make(max_num_rows, dtype=torch.int32)
        self._logits_indices = self._counting[:max_num_rows].long()
        self._groups = tuple(
            GroupInput(make((max_num_rows, max_num_blocks), dtype=torch.int32), make(max_num_tokens))
            for _ in range(num_groups)
        )
        self._kv_layers = kv_layers
        self._views: dict[GraphShape, ModelInput] = {}

    def fill(self, step: ModelInput, shape: GraphShape) -> ModelInput:
        """Copy a step that the shape holds, and return the input of that shape; always the same for a shape."""
        num_tokens, num_rows = len(step.token_ids), len(step.seq_lens)
        self._token_ids[:num_tokens].copy_(step.token_ids)
        self._positions[:num_tokens].copy_(step.positions)
        self._seq_lens[:num_rows].copy_(step.seq_lens)
        self._seq_lens[num_rows : shape.num_rows].zero_()
        starts = self._query_start_loc[: shape.num_rows + 1]
        if shape.max_query_len == 1:
            torch.clamp(self._counting[: shape.num_rows + 1], max=num_rows, out=starts)
        else:
            starts[: num_rows + 1].copy_(step.query_start_loc)
            starts[num_rows + 1 :].fill_(num_tokens)
        for kept, group in zip(self._groups, step.groups, strict=True):
            kept.block_table[:num_rows, : group.block_table.shape[1]].copy_(group.block_table)
            kept.slot_mapping[:num_tokens].copy_(group.slot_mapping)
            kept.slot_mapping[num_tokens : shape.num_tokens].fill_(_NOWHERE)
        return self._view(shape)

    def _view(self, shape: GraphShape) -> ModelInput:
        if shape not in self._views:
            num_tokens, num_rows, max_query_len = shape
            self._views[shape] = ModelInput(
                token_ids=self._token_ids[:num_tokens],
                positions=self._positions[:num_tokens],
                query_start_loc=self._query_start_loc[: num_rows + 1],
                seq_lens=self._seq_lens[:num_rows],
                max_query_len=max_query_len,
                logits_indices=self._logits_indices[:num_rows],
                groups=tuple(GroupInput(table[:num_rows], slots[:num_tokens]) for table, slots in self._groups),
                kv_layers=self._kv_layers,
            )
        return self._views[shape]


class Graphs:
    """Runs a model in steps that are launched: by a graph where there is one for them, else op by op.

    The first step of a shape is run op by op, filled up as the graph will have it, so that its kernels are compiled and
    have run; then the graph is captured, and later steps replay it. What cannot be captured runs op by op for good: one
    warning says why, and `stats` counts the steps.

    Args:
        device: captures and replays.
        plan: shapes and memory.
        inputs: of all graphs.
    """

    def __init__(self, device: Device, plan: GraphPlan, inputs: GraphInputs) -> None:
        self._device = device
        self._plan = plan
        self._inputs = inputs
        self._graphs: dict[GraphShape, Graph] = {}
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
        num_tokens, num_rows = len(step.token_ids), len(step.seq_lens)
        shape = self._plan.fit(num_tokens, num_rows, step.max_query_len)
        if shape is None:
            return self._eager(model, step, self._why_none(step))
        graph = self._graphs.get(shape)
        if graph is not None:
            self._inputs.fill(step, shape)
            graph.replay()
            self._num_replayed += 1
            return graph.output[:num_tokens]
        if self._no_more is not None:
            return self._eager(model, step, self._no_more)
        inputs = self._inputs.fill(step, shape)
        hidden = self._eager(model, inputs, "capture")[:num_tokens]
        self._capture(model, inputs, shape)
        return hidden

    def _why_none(self, step: ModelInput) -> str:
        if step.max_query_len == 1:
            return "rows"
        return "tokens" if self._plan.mixed_sizes else "prompt"

    def _eager(self, model: RunModel, step: ModelInput, reason: str) -> Tensor:
        self._num_eager[reason] += 1
        return model(step)

    def _capture(self, model: RunModel, inputs: ModelInput, shape: GraphShape) -> None:
        """Capture a shape that has just run; afterwards there may be no more."""
        try:
            self._graphs[shape] = self._device.capture(partial(model, inputs))
        except Exception as error:
            self._no_more = "failed"
            _log.warning(
                "a step of %d tokens, %d rows cannot be captured as a graph: %s: %s; steps without a graph run op by "
                "op, slower, from now on (enforce_eager=True captures nothing)",
                shape.num_tokens,
                shape.num_rows,
                type(error).__name__,
                error,
            )
            return
        if self._plan.num_bytes is not None and self.num_bytes > self._plan.num_bytes:
            self._no_more = "memory"
            _log.warning(
                "%d graphs have taken %.2f GiB, more than the %.2f GiB set aside for them; steps without a graph run "
                "op by op, slower, from now on; lower max_num_graphs, max_num_mixed_graphs or max_num_seqs",
                len(self._graphs),
                self.num_bytes / 2**30,
                self._plan.num_bytes / 2**30,
            )
