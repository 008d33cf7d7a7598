"""check_config: what an `EngineConfig` may hold: known names, numbers in range, and options that go together."""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import TYPE_CHECKING

from octavo_engine.errors import InvalidConfig
from octavo_engine.preemption import PREEMPTION_MODES
from octavo_engine.text.parsers.formats import REASONING_PARSERS, TOOL_PARSERS

if TYPE_CHECKING:
    from octavo_engine.config import EngineConfig

QUANTIZATIONS = ("int8", "int4", "fp8")
QUEUE_POLICIES = ("arrival", "fair")
EXECUTORS = ("processes", "ray")
RAY_PLACEMENTS = ("pack", "spread", "strict_pack", "strict_spread")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "fp8")
_MODES = ("exact", "fast")
_BLOCK_SIZES = (8, 16, 32, 64, 128)
_LEAST = MappingProxyType(
    {
        "max_model_len": 1,
        "num_blocks": 2,  # block 0 is reserved
        "kv_cache_bytes": 1,
        "host_kv_bytes": 0,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
        "max_num_kept": 0,
        "max_num_timelines": 0,
        "max_num_graphs": 1,
        "max_num_mixed_graphs": 0,
        "max_loras": 1,
        "max_lora_rank": 1,
        "num_threads": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "dbo_token_threshold": 2,
    }
)


def check_config(config: EngineConfig) -> None:
    """Return if a configuration can be followed.

    Raises:
        InvalidConfig: if a value is out of range, or two do not go together; names it, what was expected and what came.
    """
    _check_names(config)
    _check_numbers(config)
    _check_ranks(config)
    _check_pairs(config)


def _check_names(config: EngineConfig) -> None:
    """Check options that are one of some words."""
    _check_one_of("dtype", config.dtype, _DTYPES)
    _check_one_of("lora_dtype", config.lora_dtype, _DTYPES)
    _check_one_of("kv_cache_dtype", config.kv_cache_dtype, _KV_CACHE_DTYPES, "auto is the default")
    _check_one_of("mode", config.mode, _MODES, "exact is the default")
    if config.quantization is not None:
        _check_one_of("quantization", config.quantization, QUANTIZATIONS)
    _check_one_of("tool_parser", config.tool_parser, TOOL_PARSERS)
    _check_one_of("reasoning_parser", config.reasoning_parser, REASONING_PARSERS)
    _check_one_of("preemption_mode", config.preemption_mode, PREEMPTION_MODES, "auto is the default")
    _check_one_of("queue_policy", config.queue_policy, QUEUE_POLICIES)
    _check_one_of("executor", config.executor, EXECUTORS)
    _check_one_of("ray_placement", config.ray_placement, RAY_PLACEMENTS)


def _check_one_of(name: str, value: str, known: Collection[str], advice: str = "") -> None:
    if value not in known:
        end = f"; {advice}" if advice else ""
        raise InvalidConfig(f"{name} {value!r} is not one of {', '.join(known)}{end}")


def _check_numbers(config: EngineConfig) -> None:
    """Check sizes, counts, shares and seconds, each by itself."""
    if config.block_size not in _BLOCK_SIZES:
        raise InvalidConfig(f"block_size {config.block_size} is not one of {_BLOCK_SIZES}; 16 is the default")
    if not 0 <= config.max_pinned_share < 1:
        raise InvalidConfig(f"max_pinned_share must be at least 0 and below 1, got {config.max_pinned_share}")
    if config.watchdog_timeout is not None and not config.watchdog_timeout > 0:
        raise InvalidConfig(f"watchdog_timeout must be above 0 seconds, got {config.watchdog_timeout}; None is off")
    if not 1 <= config.rank_timeout <= 3600:
        raise InvalidConfig(f"rank_timeout must be from 1 to 3600 seconds, got {config.rank_timeout}; 6 is the default")
    for name, low in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise InvalidConfig(f"{name} must be at least {low}, got {value}")


def _check_ranks(config: EngineConfig) -> None:
    """Check what a model that is split, or is not, can be combined with."""
    if config.enable_lora and config.pipeline_parallel_size > 1:
        raise InvalidConfig(
            f"enable_lora needs pipeline_parallel_size 1, got {config.pipeline_parallel_size}; a model whose layers "
            "are shared out among stages takes no adapters; use tensor_parallel_size"
        )
    if config.quantization == "fp8" and config.tensor_parallel_size > 1:
        raise InvalidConfig(
            f"quantization fp8 needs tensor_parallel_size 1, got {config.tensor_parallel_size}; its scales are of "
            "whole rows, which no process reads; use int8"
        )
    if config.expert_parallel and config.tensor_parallel_size == 1:
        raise InvalidConfig(
            "expert_parallel needs tensor_parallel_size 2 or more, got 1; it says how a mixture's experts are "
            "split over processes"
        )
    if config.enable_dbo and config.tensor_parallel_size == 1:
        raise InvalidConfig(
            "enable_dbo needs tensor_parallel_size 2 or more, got 1; it computes one half of a step while the "
            "processes add up the other"
        )
    if config.executor == "ray" and config.num_ranks == 1:
        raise InvalidConfig(
            "executor ray runs the ranks of a model that is split; give tensor_parallel_size or "
            "pipeline_parallel_size too"
        )


def _check_pairs(config: EngineConfig) -> None:
    """Check other options that do not go together."""
    if config.max_cpu_loras is not None and config.max_cpu_loras < config.max_loras:
        raise InvalidConfig(
            f"max_cpu_loras must be at least max_loras, {config.max_loras}, got {config.max_cpu_loras}; raise it, or "
            "lower max_loras"
        )
    if config.enable_dbo and config.enable_lora:
        raise InvalidConfig(
            "enable_dbo and enable_lora both came; adapters are held for the tokens of whole steps, leave one out"
        )
    if config.preemption_mode == "swap" and config.host_kv_bytes == 0:
        raise InvalidConfig("preemption_mode 'swap' needs memory of the host, host_kv_bytes is 0; give it some bytes")
