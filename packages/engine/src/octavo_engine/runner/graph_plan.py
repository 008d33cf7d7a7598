"""GraphPlan: for which numbers of rows a decode step is captured as a graph, and the memory set aside for that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.device_memory import MemoryMeter, try_decode
from octavo_kernels import attention_workspace
from octavo_kvcache import group_specs

LARGEST = 512
"""Rows of the largest graph: more keep a GPU busy for longer than it takes to launch their kernels one by one."""

_LEAST_STEP = 8
_POOL_SHARE = 2  # of the largest step's memory: smaller graphs that are captured before it leave gaps
_BYTES_PER_GRAPH = 8 << 20  # what the driver keeps of some hundred kernels, generously; no GPU has been asked


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What graphs a runner may capture.

    sizes: rows, ascending; a step is filled up to the next one.
    num_bytes: of the device's memory that all graphs may take; None if nothing was set aside, and they take what there
        is.
    """

    sizes: tuple[int, ...]
    num_bytes: int | None = None

    def __str__(self) -> str:
        set_aside = "no memory" if self.num_bytes is None else f"{self.num_bytes / 2**30:.2f} GiB"
        return f"graphs: {len(self.sizes)} of up to {self.sizes[-1]} rows, {set_aside} set aside for them"

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

        A step of the largest size is tried, unless the KV cache is sized by hand, which leaves to the user what is
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
        if config.num_blocks is not None or config.kv_cache_bytes is not None:
            return cls(sizes)
        try_step = partial(try_decode, model, sizes[-1], kv_dtype=kv_dtype, device=device)
        max_model_len = config.max_model_len or model.config.max_position_embeddings
        sizes_of_model = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
        peak = meter.peak_bytes(try_step) + attention_workspace(sizes[-1], max_model_len, *sizes_of_model)
        num_blocks = -(-max_model_len // config.block_size) * len(group_specs(model.kv_cache_specs(kv_dtype)))
        tables = sizes[-1] * num_blocks * torch.int32.itemsize
        return cls(sizes, _POOL_SHARE * peak + tables + len(sizes) * _BYTES_PER_GRAPH)


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
