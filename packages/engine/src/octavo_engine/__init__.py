"""An LLM inference engine on paged attention: continuous batching, models, sampling, offline `LLM`.

Importing this package loads neither torch nor a model; `LLM` and `AsyncEngine.from_config` do when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo_engine.adapters.info import AdapterInfo, AdapterStats
    from octavo_engine.api import EngineClient, EngineInfo, EngineStats
    from octavo_engine.async_engine import AsyncEngine
    from octavo_engine.beam_params import BeamSearchParams
    from octavo_engine.branch import Branch
    from octavo_engine.config import EngineConfig
    from octavo_engine.errors import (
        ClusterFull,
        CorruptModelFile,
        EngineAsleep,
        EngineBusy,
        EngineDead,
        EngineError,
        EngineInUse,
        EngineStuck,
        IncompatibleWeights,
        InvalidAdapter,
        InvalidConfig,
        InvalidRequest,
        ModelNotFound,
        PinLimitReached,
        PromptTooLong,
        RankMismatch,
        RankUnreachable,
        RequestFailed,
        RequestLost,
        UnknownAdapter,
        UnknownPin,
        UnsupportedModel,
        WorkerLost,
    )
    from octavo_engine.expert_stats import ExpertStats
    from octavo_engine.llm import LLM
    from octavo_engine.overlap import GraphStats, OverlapStats
    from octavo_engine.pins import Pin
    from octavo_engine.standby import MemoryReport
    from octavo_engine.structured.params import StructuredOutputsParams
    from octavo_engine.timeline import RequestTimeline
    from octavo_engine.types import (
        CachedTokens,
        CompletionDelta,
        CompletionOutput,
        EmbeddingOutput,
        FinishReason,
        Request,
        RequestOutput,
        SamplingParams,
        TokenLogprobs,
        WarmOutput,
    )

_EXPORTS = {
    "adapters.info": ("AdapterInfo", "AdapterStats"),
    "api": ("EngineClient", "EngineInfo", "EngineStats"),
    "async_engine": ("AsyncEngine",),
    "beam_params": ("BeamSearchParams",),
    "branch": ("Branch",),
    "config": ("EngineConfig",),
    "errors": (
        "ClusterFull",
        "CorruptModelFile",
        "EngineAsleep",
        "EngineBusy",
        "EngineDead",
        "EngineStuck",
        "EngineError",
        "EngineInUse",
        "IncompatibleWeights",
        "InvalidAdapter",
        "InvalidConfig",
        "InvalidRequest",
        "ModelNotFound",
        "PinLimitReached",
        "PromptTooLong",
        "RankMismatch",
        "RankUnreachable",
        "RequestFailed",
        "RequestLost",
        "UnknownAdapter",
        "UnknownPin",
        "UnsupportedModel",
        "WorkerLost",
    ),
    "expert_stats": ("ExpertStats",),
    "llm": ("LLM",),
    "overlap": ("GraphStats", "OverlapStats"),
    "pins": ("Pin",),
    "standby": ("MemoryReport",),
    "structured.params": ("StructuredOutputsParams",),
    "timeline": ("RequestTimeline",),
    "types": (
        "CachedTokens",
        "CompletionDelta",
        "CompletionOutput",
        "EmbeddingOutput",
        "FinishReason",
        "Request",
        "RequestOutput",
        "SamplingParams",
        "TokenLogprobs",
        "WarmOutput",
    ),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "LLM",
    "AdapterInfo",
    "AdapterStats",
    "AsyncEngine",
    "BeamSearchParams",
    "Branch",
    "CachedTokens",
    "ClusterFull",
    "CompletionDelta",
    "CompletionOutput",
    "CorruptModelFile",
    "EmbeddingOutput",
    "EngineAsleep",
    "EngineBusy",
    "EngineClient",
    "EngineConfig",
    "EngineDead",
    "EngineError",
    "EngineInUse",
    "EngineInfo",
    "EngineStats",
    "EngineStuck",
    "ExpertStats",
    "FinishReason",
    "GraphStats",
    "IncompatibleWeights",
    "InvalidAdapter",
    "InvalidConfig",
    "InvalidRequest",
    "MemoryReport",
    "ModelNotFound",
    "OverlapStats",
    "Pin",
    "PinLimitReached",
    "PromptTooLong",
    "RankMismatch",
    "RankUnreachable",
    "Request",
    "RequestFailed",
    "RequestLost",
    "RequestOutput",
    "RequestTimeline",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "UnknownAdapter",
    "UnknownPin",
    "UnsupportedModel",
    "WarmOutput",
    "WorkerLost",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
