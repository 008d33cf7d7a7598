"""GraphPlan: which shapes of steps are captured as graphs, and the memory set aside for that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.device_memory import MemoryMeter, try_forward
from octavo_kernels import attention_workspace
from octavo_kvcache import group_specs

LARGEST = 512
"""Tokens of the largest graph: more keep a GPU busy for longer than it takes to launch their kernels one by one."""

_LEAST_STEP = 8
_LEAST_MIXED = 16
_PARTS = ((4, 5, 6, 7), (4, 6), (4,))  # of an octave, from which it is doubled
_POOL_SHARE = 2  # of the largest step's memory: smaller graphs that are captured before it leave gaps
_BYTES_PER_GRAPH = 8 << 20  # what the driver keeps of some hundred kernels, generously; no GPU has been asked


class GraphShape(NamedTuple):
    """What a graph computes: a step is filled up to it.

    Attributes:
        num_tokens: of all sequences.
        num_rows: sequences.
        max_query_len: the most tokens that one of them may have.
    """

    num_tokens: int
    num_rows: int
    max_query_len: int


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What graphs a runner may capture.

    sizes: rows of decode steps, ascending; a step is filled up to the next one.
    num_bytes: of the device's memory that all graphs may take; None if nothing was set aside, and they take what there
        is.
    mixed_sizes: tokens of steps in which a sequence has several, ascending; none runs such steps op by op.
    max_num_seqs: sequences that such a step can have.
    """

    sizes: tuple[int, ...]
    num_bytes: int | None = None
    mixed_sizes: tuple[int, ...] = ()
    max_num_seqs: int = 0

    def __str__(self) -> str:
        set_aside = "no memory" if self.num_bytes is None else f"{self.num_bytes / 2**30:.2f} GiB"
        mixed = f" and {len(self.mixed_sizes)} of up to {self.mixed_sizes[-1]} tokens" if self.mixed_sizes else ""
        return f"graphs: {len(self.sizes)} of up to {self.sizes[-1]} rows{mixed}, {set_aside} set aside for them"

    @property
    def shapes(self) -> tuple[GraphShape, ...]:
        """All that may be captured."""
        decode = (GraphShape(size, size, 1) for size in self.sizes)
        return *decode, *(self._mixed(size) for size in self.mixed_sizes)

    def fit(self, num_tokens: int, num_rows: int, max_query_len: int) -> GraphShape | None:
        """Return the least shape that holds a step; None if none does."""
        if max_query_len == 1:
            size = next((size for size in self.sizes if size >= num_rows), None)
            return None if size is None else GraphShape(size, size, 1)
        size = next((size for size in self.mixed_sizes if size >= num_tokens), None)
        return None if size is None else self._mixed(size)

    def _mixed(self, size: int) -> GraphShape:
        return GraphShape(size, min(size, self.max_num_seqs), size)

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        model: Model,
        *,
        kv_dtype: torch.dtype,
        device: torch.device,
        meter: MemoryMeter | None,
    ) -> GraphPlan | None:
        """Plan for a model in its place; None where steps are not captured.

        Those of mixtures are not: experts in codes wait for the device, and rows that fill a step up would count.

        Steps of the largest sizes are tried, unless the KV cache is sized by hand, which leaves to the user what is
        beside it.

        Args:
            config: what the user chose.
            model: with its weights.
            kv_dtype: of the KV cache.
            device: where the model is.
            meter: of the device; None where its memory is the host's, which has no graphs.

        Raises:
            InvalidConfig: the device's memory does not hold such a step beside the weights.
        """
        if config.enforce_eager or meter is None or config.num_ranks > 1 or any(model.mixtures()):
            return None
        sizes = graph_sizes(min(config.max_num_seqs, config.max_num_batched_tokens), config.max_num_graphs)
        mixed = mixed_sizes(config.max_num_batched_tokens, config.max_num_mixed_graphs)
        plan = cls(sizes, None, mixed, config.max_num_seqs)
        if config.num_blocks is not None or config.kv_cache_bytes is not None:
            return plan
        max_model_len = config.max_model_len or model.config.max_position_embeddings
        num_blocks = -(-max_model_len // config.block_size) * len(group_specs(model.kv_cache_specs(kv_dtype)))
        tables = 3 * config.max_num_seqs * num_blocks * torch.int32.itemsize  # of all rows, a step, and under way
        outputs = sum(shape.num_tokens for shape in plan.shapes) * model.config.hidden_size * torch.float32.itemsize
        peak = max(
            _peak_bytes(model, shape, max_model_len, meter, kv_dtype, device)
            for shape in (plan.fit(0, sizes[-1], 1), plan.fit(mixed[-1], 0, 2) if mixed else None)
            if shape is not None
        )
        num_bytes = _POOL_SHARE * peak + tables + outputs + len(plan.shapes) * _BYTES_PER_GRAPH
        return cls(sizes, num_bytes, mixed, config.max_num_seqs)


def _peak_bytes(
    model: Model,
    shape: GraphShape,
    max_model_len: int,
    meter: MemoryMeter,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return what a step of a shape holds at once, with attention's workspace for sequences of the full length."""
    sizes = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
    workspace = attention_workspace(shape.num_rows, max_model_len, *sizes, max_query_len=shape.max_query_len)
    try_step = partial(try_forward, model, shape.num_tokens, shape.num_rows, kv_dtype=kv_dtype, device=device)
    return meter.peak_bytes(try_step) + workspace


def graph_sizes(max_num_rows: int, max_num_graphs: int) -> tuple[int, ...]:
    """Return the rows of graphs, ascending: 1, 2, 4 and every eighth number up to `LARGEST` or all rows there can be.

    Where these are too many, the distance between them doubles until they are not; if that does not help, the smallest
    are left out.
    """
    largest = min(max_num_rows, LARGEST)
    step = _LEAST_STEP
    while True:
        powers = {1 << exponent for exponent in range(step.bit_length() - 1)}
        sizes = sorted({size for size in powers if size < largest} | {*range(step, largest, step)} | {largest})
        if len(sizes) <= max_num_graphs or step >= largest:
            return tuple(sizes[-max_num_graphs:])
        step *= 2


def mixed_sizes(max_num_tokens: int, max_num_graphs: int) -> tuple[int, ...]:
    """Return the tokens of graphs of mixed steps, ascending: four sizes an octave, up to `LARGEST` or all there can be.

    So at most a fifth of a step is filled up from 16 tokens on. Where these are too many, two sizes an octave or one;
    if that does not help, the smallest are left out.
    """
    largest = min(max_num_tokens, LARGEST)
    if not max_num_graphs or largest < 2:
        return ()
    sizes: list[int] = []
    for parts in _PARTS:
        octaves = (_LEAST_MIXED // 4 << exponent for exponent in range(largest.bit_length()))
        sizes = sorted({size for octave in octaves for part in parts if (size := octave * part) < largest} | {largest})
        if len(sizes) <= max_num_graphs:
            break
    return tuple(sizes[-max_num_graphs:])
