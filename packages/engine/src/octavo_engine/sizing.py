"""What a KV cache may take a share of: the host's free memory, or a device's beside the model and its largest step."""

from __future__ import annotations

from functools import partial

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.device_memory import (
    CudaMeter,
    FreeMemory,
    MemoryMeter,
    StepLimits,
    free_memory,
    try_largest_step,
)
from octavo_engine.runner.memory import CPU_SHARE, available_bytes


def free_memory_beside(
    model: Model, config: EngineConfig, device: torch.device, *, kv_dtype: torch.dtype, num_reserved_bytes: int
) -> FreeMemory:
    """Return what is free where a loaded model runs.

    A KV cache that is sized by hand needs no measurement, and a part of a split model cannot be run alone: then no step
    is tried.

    Args:
        model: in its place.
        config: the limits of a step.
        device: where the model is.
        kv_dtype: of the KV cache.
        num_reserved_bytes: that adapters will take.
    """
    meter = meter_of(device)
    if meter is None:
        return FreeMemory(max(0, available_bytes() - num_reserved_bytes), CPU_SHARE, None)
    try_step = partial(
        try_largest_step,
        model,
        StepLimits(config.max_num_batched_tokens, config.max_num_seqs),
        kv_dtype=kv_dtype,
        device=device,
    )
    sized = config.num_blocks is not None or config.kv_cache_bytes is not None
    return free_memory(
        meter,
        None if sized or config.num_ranks > 1 else try_step,
        num_reserved_bytes=num_reserved_bytes,
        num_devices=config.num_ranks,
    )


def meter_of(device: torch.device) -> MemoryMeter | None:
    """Return what measures a device's memory; None where it is the host's."""
    return CudaMeter(device) if device.type == "cuda" else None
