"""BuiltEngine: an engine put together out of a source whose place and numbers are settled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.api import EngineInfo
from octavo_engine.cache_plan import make_preemption, num_pinnable, plan_cache, plan_host
from octavo_engine.config import EngineConfig
from octavo_engine.engine import Engine
from octavo_engine.executor.base import Executor
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.executor.overlapped import OverlappedExecutor
from octavo_engine.executor.pipelined import PipelinedExecutor
from octavo_engine.executor.workers import Team, WorkersExecutor
from octavo_engine.fair_queue import FairQueue
from octavo_engine.kv_dtype import dtype_name
from octavo_engine.models.registry import Model
from octavo_engine.numerics import Numerics
from octavo_engine.opening import Opening
from octavo_engine.quant.choose import native_isa
from octavo_engine.runner.adapter_plan import AdapterPlan
from octavo_engine.runner.adapter_pool import AdapterPool
from octavo_engine.runner.cuda_device import CudaDevice
from octavo_engine.runner.device import Device
from octavo_engine.runner.expert_loads import clear_expert_loads, expert_stats, expert_stats_of
from octavo_engine.runner.graph_plan import GraphPlan
from octavo_engine.runner.memory import HostPlan, MemoryPlan
from octavo_engine.runner.model_host import LocalModel, ModelParts
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.runner.overlapped_runner import OverlappedRunner
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import free_memory_beside, meter_of
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text_side import make_text_processor
from octavo_engine.weights.load import Progress
from octavo_engine.weights.source import Source
from octavo_kernels import Backend, choose
from octavo_kvcache import CacheManager, KVCacheSpec
from octavo_kvcache.storage import KVStorage

_log = logging.getLogger(__name__)


class BuiltEngine(NamedTuple):
    """An engine with its text side and its description."""

    engine: Engine
    text: TextProcessor
    info: EngineInfo


class Place(NamedTuple):
    """What makes a source's model, its KV cache and room for adapters where they are to be.

    `team` has the other parts of all of them. `make_staged` makes the runner of a model whose layers are shared out
    among stages; None if they are not.
    """

    make_model: Callable[..., Model]
    make_storage: Callable[..., KVStorage]
    team: Team | None = None
    make_staged: Callable[..., ModelRunner] | None = None
    make_adapter_pool: Callable[..., AdapterPool] = AdapterPool


def assemble(
    config: EngineConfig,
    opened: Opening,
    numerics: Numerics,
    place: Place,
    progress: Progress | None,
    started: float,
) -> BuiltEngine:
    """Load a model, plan its memory, and put the engine on both together.

    Args:
        config: what the user chose.
        opened: the model's source.
        numerics: what the configuration comes to here.
        place: makes the model and its KV cache.
        progress: called with the number of weights loaded and their total.
        started: when building began, in seconds of the monotonic clock.

    Raises:
        CorruptModelFile, UnsupportedModel: if the model cannot be loaded.
        InvalidConfig: if the settings do not fit the model or the memory.
    """
    device = numerics.device
    source, digest, tokenizer = opened
    model = place.make_model(source, progress=progress)
    specs = model.kv_cache_specs(numerics.kv_dtype)
    bytes_here = sum(s.bytes_per_block(config.block_size) for s in specs)  # of a rank's part of its own layers
    bytes_per_block = bytes_here * config.tensor_parallel_size * source.config.num_layers // len(specs)
    adapters = AdapterPlan.of(config, model, numerics.dtype, place.make_adapter_pool)
    graphs = GraphPlan.of(config, model, kv_dtype=numerics.kv_dtype, device=device, meter=meter_of(device))
    num_reserved_bytes = adapters.num_bytes + (0 if graphs is None else graphs.num_bytes or 0)
    free = free_memory_beside(model, config, device, kv_dtype=numerics.kv_dtype, num_reserved_bytes=num_reserved_bytes)
    plan = plan_cache(config, source.config, bytes_per_block=bytes_per_block, free=free)
    if graphs is not None:
        _log.info("%s", graphs)
    _log.info("KV cache: %d blocks, %.2f GiB: %s", plan.num_blocks, plan.num_bytes / 2**30, plan.reason)
    grammars = GrammarCompiler(
        tokenizer.result(), vocab_size=source.config.vocab_size, eos_token_ids=sorted(source.eos_token_ids)
    )
    host_plan = plan_host(config, plan, device)
    parts = _parts(config, numerics, place, specs, plan, host_plan, grammars, adapters, graphs)
    digest.result()
    weights, storage = parts.weights(source, model), parts.make_storage()
    host: LocalModel | None = None
    executor: Executor
    if place.team is None:
        host = LocalModel(
            weights, storage, config=source.config, tokenizer=tokenizer.result(), parts=parts, device=device
        )
        executor = host.executor
    elif place.make_staged is None:
        executor = WorkersExecutor(parts.make_runner(model, storage), place.team)
    else:
        executor = PipelinedExecutor(parts.make_runner(model, storage), place.team)
    scheduler = _scheduler(config, plan, host_plan, source, numerics, storage, weights.root, adapters.slots)
    text = make_text_processor(source, tokenizer.result(), grammars, config, plan)
    info = _describe(source, config, numerics, plan, host_plan, model, started)
    clear_expert_loads(model)  # of the step that was tried
    experts = partial(expert_stats, model) if host is None else partial(expert_stats_of, host)
    return BuiltEngine(Engine(scheduler, executor, host, adapters.adapters, experts, place.team), text, info)


def _parts(
    config: EngineConfig,
    numerics: Numerics,
    place: Place,
    specs: Sequence[KVCacheSpec],
    plan: MemoryPlan,
    host_plan: HostPlan,
    grammars: GrammarCompiler,
    adapters: AdapterPlan,
    graphs: GraphPlan | None,
) -> ModelParts:
    device = numerics.device
    gpu = _overlapping(device) if place.team is None else None  # other ranks take one step after the other
    make_runner = place.make_staged or (
        ModelRunner if gpu is None else partial(OverlappedRunner, gpu=gpu, graphs=graphs)
    )
    return ModelParts(
        place.make_model,
        partial(
            place.make_storage,
            specs,
            plan.num_blocks,
            config.block_size,
            device=device,
            num_host_blocks=host_plan.num_blocks,
        ),
        _runner_maker(config, plan, device, grammars, adapters, make_runner),
        numerics.root,
        numerics.kv_dtype,
        InlineExecutor if gpu is None else OverlappedExecutor,
    )


def _runner_maker(
    config: EngineConfig,
    plan: MemoryPlan,
    device: torch.device,
    grammars: GrammarCompiler,
    adapters: AdapterPlan,
    make_runner: Callable[..., ModelRunner],
) -> Callable[[Model, KVStorage], ModelRunner]:
    def make(model: Model, storage: KVStorage) -> ModelRunner:
        return make_runner(
            model,
            storage,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            device=device,
            grammars=grammars,
            adapters=adapters.make_pool(model, max_num_tokens=config.max_num_batched_tokens, device=device),
        )

    return make


def _overlapping(device: torch.device) -> Device | None:
    """Return a device as that on which a step may begin before the one before has been read; None if it is none."""
    return CudaDevice(device) if device.type == "cuda" else None


def _scheduler(
    config: EngineConfig,
    plan: MemoryPlan,
    host_plan: HostPlan,
    source: Source,
    numerics: Numerics,
    storage: KVStorage,
    root: bytes,
    adapters: AdapterSlots,
) -> Scheduler:
    cache = CacheManager(
        plan.num_blocks,
        config.block_size,
        prefix_cache=config.prefix_cache,
        deduplicate=numerics.deterministic,
        max_num_pinned=num_pinnable(config, plan),
        root=root,
        num_host_blocks=host_plan.num_blocks,
    )
    return Scheduler(
        cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        eos_token_ids=source.eos_token_ids,
        max_num_kept=config.max_num_kept,
        preemption=make_preemption(config, storage),
        max_num_timelines=config.max_num_timelines,
        queue=FairQueue() if config.queue_policy == "fair" else None,
        adapters=adapters,
        num_shares=config.pipeline_parallel_size,
    )


def _describe(
    source: Source,
    config: EngineConfig,
    numerics: Numerics,
    plan: MemoryPlan,
    host: HostPlan,
    model: Model,
    started: float,
) -> EngineInfo:
    return EngineInfo(
        model_name=source.name,
        architecture=source.config.architecture,
        dtype=dtype_name(numerics.dtype),
        kv_dtype=dtype_name(numerics.kv_dtype),
        mode=numerics.mode,
        device=str(numerics.device),
        kernel_backend=_describe_backend(choose("paged_attention", numerics.device)),
        deterministic=numerics.deterministic,
        vocab_size=source.config.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        kv_cache_bytes=plan.num_bytes,
        kv_cache_reason=plan.reason,
        num_parameters=model.num_parameters,
        load_seconds=time.monotonic() - started,
        num_host_blocks=host.num_blocks,
        host_kv_bytes=host.num_bytes,
        host_kv_reason=host.reason,
        weights_digest=source.digest.hex(),
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
    )


def _describe_backend(backend: Backend) -> str:
    """Name a kernel backend for reports; of the one for CPUs, the instruction set, or torch if nothing is compiled."""
    name: str = backend.value
    if backend is Backend.CPU:
        name += f" ({native_isa() or 'torch'})"
    return name
