"""AdapterPlan: what an engine with adapters is made of, and how much memory it takes beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.adapters.info import pool_bytes
from octavo_engine.adapters.read import AdapterReader
from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.adapters.store import Adapters
from octavo_engine.config import EngineConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.adapter_pool import AdapterPool, PoolOptions, adapter_targets


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The scheduler's slots, and, if adapters are served, their store and what a model's pool is made with.

    `num_bytes` is what the pool takes of the device's memory.
    """

    slots: AdapterSlots
    adapters: Adapters | None = None
    options: PoolOptions | None = None
    num_bytes: int = 0
    pool_class: Callable[..., AdapterPool] = AdapterPool

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        model: Model,
        dtype: torch.dtype,
        pool_class: Callable[..., AdapterPool] = AdapterPool,
    ) -> AdapterPlan:
        """Plan for a configuration, the model that it came to, the dtype of activations, and what makes a pool."""
        if not config.enable_lora:
            return cls(AdapterSlots())
        targets, slots = adapter_targets(model), AdapterSlots(config.max_loras)
        if config.lora_dtype != "auto":
            dtype = getattr(torch, config.lora_dtype)
        ends_shape = None if model.ends() is None else (model.config.vocab_size, model.config.hidden_size)
        adapters = Adapters(
            AdapterReader(
                targets, config=model.config, max_rank=config.max_lora_rank, dtype=dtype, ends_shape=ends_shape
            ),
            max_num_loaded=config.max_cpu_loras or config.max_loras,
            is_held=slots.is_held,
        )
        slots.on_unheld = adapters.evict
        num_bytes = pool_bytes(
            targets,
            max_loras=config.max_loras,
            max_lora_rank=config.max_lora_rank,
            element_bytes=dtype.itemsize,
        )
        return cls(slots, adapters, PoolOptions(config.max_loras, config.max_lora_rank, dtype), num_bytes, pool_class)

    def make_pool(self, model: Model, *, max_num_tokens: int, device: torch.device) -> AdapterPool | None:
        """Give a model room for adapters, in a pool as its place makes it; None if none are served."""
        if self.adapters is None or self.options is None:
            return None
        return self.pool_class(model, self.adapters.weights, self.options, max_num_tokens=max_num_tokens, device=device)
