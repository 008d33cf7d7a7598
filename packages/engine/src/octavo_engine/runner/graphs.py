"""Graphs: steps of a model, captured once for each of some shapes and then replayed as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor

from octavo_engine.overlap import GraphStats
from octavo_engine.runner.device import Device, Graph
from octavo_engine.runner.graph_plan import GraphPlan, GraphShape
from octavo_engine.runner.model_input import ModelInput

_log = logging.getLogger(__name__)

RunModel = Callable[[ModelInput], Tensor]


class Graphs:
    """Runs a model in steps that are launched: by a graph where there is one for them, else op by op.

    The first step of a shape is run op by op, filled up as the graph will have it, so that its kernels are compiled and
    have run; then the graph is captured, and later steps replay it. What cannot be captured runs op by op for good: one
    warning says why, and `stats` counts the steps.

    Args:
        device: captures and replays.
        plan: shapes and memory.
    """

    def __init__(self, device: Device, plan: GraphPlan) -> None:
        self._device = device
        self._plan = plan
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

    def fit(self, step: GraphShape) -> GraphShape | None:
        """Return the shape that a step is filled up to; None if it runs op by op as it is, which is counted as such."""
        shape, reason = self._plan.fit(*step), self._no_more
        if shape is None:
            reason = self._why_none(step)
        elif reason is None or shape in self._graphs:
            return shape
        assert reason is not None
        self._num_eager[reason] += 1
        return None

    def __call__(self, model: RunModel, inputs: ModelInput, shape: GraphShape) -> Tensor:
        """Return the hidden states of a step [num_tokens, hidden_size], which hold until the next one is launched.

        Args:
            model: the same in every call.
            inputs: of a step that is filled up to the shape: the same tensors in every call.
            shape: from `fit`.
        """
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.replay()
            self._num_replayed += 1
            return graph.output
        self._num_eager["capture"] += 1
        hidden = model(inputs)
        self._capture(model, inputs, shape)
        return hidden

    def _why_none(self, step: GraphShape) -> str:
        if step.max_query_len == 1:
            return "rows"
        return "tokens" if self._plan.mixed_sizes else "prompt"

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
