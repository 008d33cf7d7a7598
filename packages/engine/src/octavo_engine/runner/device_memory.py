"""How much of a device's memory the KV cache may take: what is free once the largest step has been tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.model_input import GroupInput, ModelInput
from octavo_engine.runner.model_runner import caches_of
from octavo_kernels import sample_tokens
from octavo_kvcache.storage import KVStorage

SHARE = 0.9  # of what a step leaves: fragments, libraries' workspaces and other processes have the rest
UNMEASURED_SHARE = 0.75  # of what is free where no step was tried
_TOP_P = 0.9  # a filter that sees whole rows
_BLOCK_SIZE = 16


class MemoryMeter(Protocol):
    """Measures the memory of a device."""

    def free_bytes(self) -> int:
        """Return what could be taken now."""
        ...

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Do work, and return the most that it held at once beyond what there was before."""
        ...


class CudaMeter:
    """The `MemoryMeter` of a GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """Return what the driver has left, and what torch has from it and nobody uses."""
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0]) + idle

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Do work, and return the most of torch's memory that it held at once; what it took goes back."""
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        return peak


class StepLimits(NamedTuple):
    """The largest step there can be; max_num_batched_tokens and max_num_seqs as in EngineConfig."""

    max_num_batched_tokens: int
    max_num_seqs: int


class FreeMemory(NamedTuple):
    """What a KV cache may take a share of; `reason` says in words what it is, None of a host's plain free memory."""

    num_bytes: int
    share: float
    reason: str | None


def free_memory(
    meter: MemoryMeter,
    try_step: Callable[[], None] | None,
    *,
    num_reserved_bytes: int,
    num_devices: int = 1,
) -> FreeMemory:
    """Return what a KV cache may take of some devices that hold the model.

    Args:
        meter: of one of them.
        try_step: runs the largest step; None if it cannot be run without a KV cache.
        num_reserved_bytes: of each device, for what is allocated later.
        num_devices: over which the KV cache is split evenly.
    """
    peak = 0 if try_step is None else meter.peak_bytes(try_step)
    free = max(0, meter.free_bytes() - peak - num_reserved_bytes) * num_devices
    what = f"the {free / 2**30:.1f} GiB of the device's memory"
    if try_step is None:
        return FreeMemory(free, UNMEASURED_SHARE, f"{what} that are free beside the weights")
    return FreeMemory(free, SHARE, f"{what} that are free beside the weights and {peak / 2**30:.2f} GiB of a step")


def try_largest_step(model: Model, limits: StepLimits, *, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Run a model and the sampler on as many tokens and draws as a step can have, over a KV cache of one block.

    Raises:
        InvalidConfig: the device's memory does not hold such a step beside the weights.
    """
    num_tokens = limits.max_num_batched_tokens
    num_seqs = min(limits.max_num_seqs, num_tokens)
    try:
        _run_step(model, num_tokens, num_seqs, kv_dtype, device)
    except torch.cuda.OutOfMemoryError as error:
        raise InvalidConfig(
            f"a step of {num_tokens} tokens and {num_seqs} draws does not fit into the memory of {device} beside the "
            f"weights, even without a KV cache; lower max_num_batched_tokens or max_num_seqs: {error}"
        ) from error


@torch.inference_mode()
def try_forward(model: Model, num_tokens: int, num_seqs: int, *, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Run a model on the tokens of some sequences, over a KV cache of one block, and draw nothing.

    Raises:
        InvalidConfig: the device's memory does not hold such a step beside the weights.
    """
    storage = KVStorage(model.kv_cache_specs(kv_dtype), 2, _BLOCK_SIZE, device=device)
    try:
        model(_largest_input(model, storage, num_tokens, num_seqs, device))
    except torch.cuda.OutOfMemoryError as error:
        raise InvalidConfig(
            f"a step of {num_tokens} tokens does not fit into the memory of {device} beside the weights, even without "
            f"a KV cache; lower max_num_seqs or max_num_batched_tokens: {error}"
        ) from error


@torch.inference_mode()
def _run_step(model: Model, num_tokens: int, num_seqs: int, kv_dtype: torch.dtype, device: torch.device) -> None:
    storage = KVStorage(model.kv_cache_specs(kv_dtype), 2, _BLOCK_SIZE, device=device)
    hidden = model(_largest_input(model, storage, num_tokens, num_seqs, device))
    last = torch.arange(num_seqs, device=device)
    logits = model.logits(hidden[last])
    whole = {name: torch.zeros(num_seqs, dtype=torch.int64, device=device) for name in ("seeds", "sequence_index")}
    fraction = torch.full((num_seqs,), _TOP_P, device=device)
    sample_tokens(logits, fraction, positions=last, top_p=fraction, **whole)


def _largest_input(
    model: Model, storage: KVStorage, num_tokens: int, num_seqs: int, device: torch.device
) -> ModelInput:
    """Make a step whose tokens are written nowhere, and read the null block alone."""
    query_lens = torch.full((num_seqs,), num_tokens // num_seqs, dtype=torch.int32)
    query_lens[: num_tokens % num_seqs] += 1
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    torch.cumsum(query_lens, 0, out=starts[1:])
    positions = torch.arange(num_tokens) - starts[:-1].long().repeat_interleave(query_lens)
    positions.clamp_(max=model.config.max_position_embeddings - 1)
    longest = int(query_lens.max())
    kv_layers, num_groups = caches_of(model, storage)
    block_table = torch.zeros(num_seqs, -(-longest // _BLOCK_SIZE), dtype=torch.int32, device=device)
    slot_mapping = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
    return ModelInput(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions.to(device),
        query_start_loc=starts.to(device),
        seq_lens=query_lens.to(device),
        max_query_len=longest,
        logits_indices=(starts[1:] - 1).long().to(device),
        groups=(GroupInput(block_table, slot_mapping),) * num_groups,
        kv_layers=kv_layers,
    )
