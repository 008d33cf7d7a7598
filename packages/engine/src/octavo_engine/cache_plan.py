"""How a configuration shares memory out: blocks of the KV cache, of its host tier, of pins, and who gives up theirs."""

from __future__ import annotations

import logging

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.models.config import ModelConfig
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.runner.device_memory import FreeMemory
from octavo_engine.runner.memory import HostPlan, MemoryPlan, available_bytes, plan_host_tier, plan_memory
from octavo_engine.runner.transfer_speed import measure_transfer
from octavo_kvcache.storage import KVStorage

_log = logging.getLogger(__name__)


def plan_cache(
    config: EngineConfig, model_config: ModelConfig, *, bytes_per_block: int, free: FreeMemory
) -> MemoryPlan:
    """Return how many blocks a model's KV cache has; see `plan_memory`."""
    return plan_memory(
        bytes_per_block=bytes_per_block,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        model_max_len=model_config.max_position_embeddings,
        max_model_len=config.max_model_len,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        free_bytes=free.num_bytes,
        share=free.share,
        what=free.reason,
    )


def plan_host(config: EngineConfig, plan: MemoryPlan, device: torch.device) -> HostPlan:
    """Return how many blocks its host tier has; see `plan_host_tier`.

    Raises:
        InvalidConfig: there are none, and sequences are to be swapped.
    """
    host = plan_host_tier(
        bytes_per_block=plan.num_bytes // plan.num_blocks,
        num_device_blocks=plan.num_blocks,
        host_kv_bytes=config.host_kv_bytes,
        on_gpu=device.type == "cuda",
        free_bytes=available_bytes(),
    )
    if config.preemption_mode == "swap" and not host.num_blocks:
        raise InvalidConfig(f"preemption_mode 'swap' needs memory of the host: {host.reason}; give host_kv_bytes")
    return host


def num_pinnable(config: EngineConfig, plan: MemoryPlan) -> int:
    """Return how many blocks may be pinned; none without the prefix cache, which pins are a part of."""
    return plan.num_pinnable(config.block_size, config.max_pinned_share) if config.prefix_cache else 0


def make_preemption(config: EngineConfig, storage: KVStorage) -> PreemptionPolicy | None:
    """Return what chooses between swapping and computing again; None where nothing can be swapped."""
    if not storage.num_host_blocks:
        return None
    transfer = measure_transfer(storage)
    _log.info(
        "host tier: %d blocks, %.2f GiB, copied at %.1f GB/s",
        storage.num_host_blocks,
        storage.num_host_blocks * storage.bytes_per_block / 2**30,
        transfer.bytes_per_second / 1e9,
    )
    return PreemptionPolicy(transfer, config.block_size, mode=config.preemption_mode)
