"""Builds an engine in this process out of a configuration: source, model, memory, runner, scheduler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from octavo_engine.adapters.slots import AdapterSlots
from octavo_engine.api import EngineInfo
from octavo_engine.beam_limits import BeamLimits
from octavo_engine.config import EngineConfig
from octavo_engine.determinism import resolve_deterministic
from octavo_engine.engine import Engine
from octavo_engine.errors import InvalidConfig, InvalidRequest
from octavo_engine.executor.base import Executor
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.executor.overlapped import OverlappedExecutor
from octavo_engine.executor.workers import Team, WorkersExecutor
from octavo_engine.fair_queue import FairQueue
from octavo_engine.kv_dtype import check_scales, resolve_kv_dtype
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import Model
from octavo_engine.preemption import PreemptionPolicy
from octavo_engine.quant.choose import choose_method, has_native_products, native_isa
from octavo_engine.runner.adapter_plan import AdapterPlan
from octavo_engine.runner.cuda_device import CudaDevice
from octavo_engine.runner.device import Device
from octavo_engine.runner.device_memory import FreeMemory
from octavo_engine.runner.memory import HostPlan, MemoryPlan, available_bytes, plan_host_tier, plan_memory
from octavo_engine.runner.model_host import LocalModel, ModelParts
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.runner.overlapped_runner import OverlappedRunner
from octavo_engine.runner.transfer_speed import measure_transfer
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import free_memory_beside
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.answer_format import AnswerFormat
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import Source, open_source
from octavo_kernels import Backend, choose
from octavo_kvcache import CacheManager
from octavo_kvcache.storage import KVStorage

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(weights loaded, weights in all)"""

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


class BuiltEngine(NamedTuple):
    """An engine with its text side and its description."""

    engine: Engine
    text: TextProcessor
    info: EngineInfo


def build_engine(config: EngineConfig, progress: Progress | None = None) -> BuiltEngine:
    """Load a model and set up everything it needs to serve requests.

    Args:
        config: what the user chose.
        progress: called with the number of weights loaded and their total.

    Raises:
        ModelNotFound, CorruptModelFile, UnsupportedModel: if the model cannot be loaded; says which file and why.
        InvalidConfig: if the settings do not fit the model or the memory.
    """
    started = time.monotonic()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    source = open_source(config.model)
    numerics = _resolve_numerics(config, source.config)
    check_scales(source, numerics.kv_dtype)
    device = numerics.device
    if config.tensor_parallel_size > 1:
        return _build_split(config, source, numerics, progress, started)
    quant = choose_method(
        device,
        numerics.dtype,
        int8_activations=config.mode == "fast",
        batch_invariant=numerics.deterministic,
    )
    make_model = partial(
        load_model,
        device=device,
        dtype=numerics.dtype,
        quant=quant,
        batch_invariant=numerics.deterministic,
        quantization=config.quantization,
    )
    return _assemble(config, source, numerics, _Place(make_model, KVStorage), progress, started)


class _Place(NamedTuple):
    """What makes a source's model and its KV cache where they are to be; `team` has the other parts of both."""

    make_model: Callable[..., Model]
    make_storage: Callable[..., KVStorage]
    team: Team | None = None


def _build_split(
    config: EngineConfig, source: Source, numerics: _Numerics, progress: Progress | None, started: float
) -> BuiltEngine:
    """Build an engine whose model is split over this process and others, which end if that fails."""
    if not torch.distributed.is_available():
        raise InvalidConfig(
            f"tensor_parallel_size {config.tensor_parallel_size} needs torch.distributed, which this build of torch "
            "does not have; install another one, or use 1"
        )
    from octavo_engine.parallel.leader import LeadingStorage
    from octavo_engine.parallel.split import load_split, make_job, make_team

    job = make_job(
        source,
        size=config.tensor_parallel_size,
        device=numerics.device,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        int8_activations=config.mode == "fast",
        batch_invariant=numerics.deterministic,
        num_threads=config.num_threads,
        block_size=config.block_size,
    )
    team = make_team(job)
    place = _Place(partial(load_split, job=job, team=team), partial(LeadingStorage, team=team), team)
    try:
        return _assemble(config, source, numerics, place, progress, started)
    except BaseException:
        team.close()
        raise


def _assemble(
    config: EngineConfig,
    source: Source,
    numerics: _Numerics,
    place: _Place,
    progress: Progress | None,
    started: float,
) -> BuiltEngine:
    device, make_model = numerics.device, place.make_model
    # Hashing and packing release the interpreter lock; the tokenizer is built in what is left of it.
    with ThreadPoolExecutor(2, thread_name_prefix="octavo-open") as pool:
        digest, tokenizer = pool.submit(lambda: source.digest), pool.submit(source.tokenizer)
        model = make_model(source, progress=progress)
    specs = model.kv_cache_specs(numerics.kv_dtype)
    bytes_per_block = sum(s.bytes_per_block(config.block_size) for s in specs) * config.tensor_parallel_size
    adapters = AdapterPlan.of(config, model, numerics.dtype)
    free = free_memory_beside(
        model, config, numerics.device, kv_dtype=numerics.kv_dtype, num_reserved_bytes=adapters.num_bytes
    )
    plan = _plan(config, source.config, bytes_per_block=bytes_per_block, free=free)
    _log.info("KV cache: %d blocks, %.2f GiB: %s", plan.num_blocks, plan.num_bytes / 2**30, plan.reason)
    grammars = GrammarCompiler(
        tokenizer.result(), vocab_size=source.config.vocab_size, eos_token_ids=sorted(source.eos_token_ids)
    )
    host_plan = _plan_host(config, plan, device)
    gpu = _overlapping(device) if place.team is None else None  # other ranks take one step after the other
    parts = ModelParts(
        make_model,
        partial(
            place.make_storage,
            specs,
            plan.num_blocks,
            config.block_size,
            device=device,
            num_host_blocks=host_plan.num_blocks,
        ),
        _runner_maker(config, plan, device, grammars, adapters, gpu),
        numerics.root,
        numerics.kv_dtype,
        InlineExecutor if gpu is None else OverlappedExecutor,
    )
    digest.result()
    weights, storage = parts.weights(source, model), parts.make_storage()
    host: LocalModel | None = None
    executor: Executor
    if place.team is None:
        host = LocalModel(
            weights, storage, config=source.config, tokenizer=tokenizer.result(), parts=parts, device=device
        )
        executor = host.executor
    else:
        executor = WorkersExecutor(parts.make_runner(model, storage), place.team)
    scheduler = _scheduler(config, plan, host_plan, source, numerics, storage, weights.root, adapters.slots)
    text = _text_processor(source, tokenizer.result(), grammars, config, plan)
    info = _describe(source, config, numerics, plan, host_plan, model, started)
    return BuiltEngine(Engine(scheduler, executor, host, adapters.adapters), text, info)


def _runner_maker(
    config: EngineConfig,
    plan: MemoryPlan,
    device: torch.device,
    grammars: GrammarCompiler,
    adapters: AdapterPlan,
    gpu: Device | None,
) -> Callable[[Model, KVStorage], ModelRunner]:
    make_runner = ModelRunner if gpu is None else partial(OverlappedRunner, gpu=gpu)

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
    numerics: _Numerics,
    storage: KVStorage,
    root: bytes,
    adapters: AdapterSlots,
) -> Scheduler:
    cache = CacheManager(
        plan.num_blocks,
        config.block_size,
        prefix_cache=config.prefix_cache,
        deduplicate=numerics.deterministic,
        max_num_pinned=_num_pinnable(config, plan),
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
        preemption=_preemption_policy(config, storage),
        max_num_timelines=config.max_num_timelines,
        queue=FairQueue() if config.queue_policy == "fair" else None,
        adapters=adapters,
    )


class _Numerics(NamedTuple):
    """Where the model runs and in which numbers: what `mode`, `dtype` and `device` come to."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    mode: str
    deterministic: bool
    quantization: str | None

    @property
    def root(self) -> bytes:
        """What distinguishes KV of the same tokens and files."""
        rounded = "" if self.quantization is None else f" {self.quantization}"
        return f"{self.dtype} {self.kv_dtype} {self.mode}{rounded}".encode()


def _describe(
    source: Source,
    config: EngineConfig,
    numerics: _Numerics,
    plan: MemoryPlan,
    host: HostPlan,
    model: Model,
    started: float,
) -> EngineInfo:
    return EngineInfo(
        model_name=source.name,
        architecture=source.config.architecture,
        dtype=_name(numerics.dtype),
        kv_dtype=_name(numerics.kv_dtype),
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
    )


def _text_processor(
    source: Source, tokenizer: Tokenizer, grammars: GrammarCompiler, config: EngineConfig, plan: MemoryPlan
) -> TextProcessor:
    template = source.chat_template()
    return TextProcessor(
        tokenizer,
        template,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=source.config.vocab_size,
        beam_limits=BeamLimits(
            max_width=min(config.max_num_seqs, config.max_num_batched_tokens),
            num_blocks=plan.num_blocks - 1 - _num_pinnable(config, plan),
            block_size=config.block_size,
        ),
        default_sampling=_default_sampling(source.generation_config),
        grammars=grammars,
        answers=AnswerFormat.of(
            "" if template is None else template.source, config.tool_parser, config.reasoning_parser
        ),
        eos_token_ids=source.eos_token_ids,
    )


def _num_pinnable(config: EngineConfig, plan: MemoryPlan) -> int:
    """Return how many blocks may be pinned; none without the prefix cache, which pins are a part of."""
    return plan.num_pinnable(config.block_size, config.max_pinned_share) if config.prefix_cache else 0


def _default_sampling(advised: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a generation_config.json advises and this engine can do, and tell the user of both."""
    taken: dict[str, Any] = {}
    for name in _SAMPLING_DEFAULTS:
        value = advised.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except InvalidRequest as error:
            _log.warning("generation_config.json is not followed: %s", error)
        else:
            taken[name] = value
    if taken:
        described = ", ".join(f"{name}={value}" for name, value in taken.items())
        _log.info("sampling defaults from generation_config.json: %s", described)
    return taken


def _describe_backend(backend: Backend) -> str:
    """Name a kernel backend for reports; of the one for CPUs, the instruction set, or torch if nothing is compiled."""
    name: str = backend.value
    if backend is Backend.CPU:
        name += f" ({native_isa() or 'torch'})"
    return name


def _name(dtype: torch.dtype) -> str:
    name: str = str(dtype).removeprefix("torch.")
    return name


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidConfig(f"device {name!r} is none that torch knows; use cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(f"device {name!r} was asked for, but torch sees no GPU here; use cpu or auto")
    return device


def _resolve_dtype(name: str, device: torch.device, model_config: ModelConfig) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _resolve_numerics(config: EngineConfig, model_config: ModelConfig) -> _Numerics:
    device = _resolve_device(config.device)
    dtype = _resolve_dtype(config.dtype, device, model_config)
    deterministic = resolve_deterministic(config.deterministic, device)
    rounded = config.quantization
    if rounded is not None and (dtype != torch.float32 or not has_native_products(device)):
        raise InvalidConfig(
            f"quantization {rounded!r} needs the native CPU kernels and float32, device is {device} and dtype "
            f"{_name(dtype)}; leave both auto on a CPU, or use a checkpoint that is quantised already"
        )
    if config.mode == "exact":
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, device, dtype)
        return _Numerics(device, dtype, kv_dtype, config.mode, deterministic, rounded)
    if device.type != "cpu":
        raise InvalidConfig(f"mode 'fast' is for CPUs, the device is {device}; use mode exact, or device cpu")
    if dtype != torch.float32:
        raise InvalidConfig(f"mode 'fast' computes in float32, dtype {_name(dtype)} was asked for; leave dtype auto")
    if not has_native_products(device):
        raise InvalidConfig(
            "mode 'fast' needs the native CPU kernels, which this installation does not have or OCTAVO_CPU_ISA=none "
            "turns off; use mode exact"
        )
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, device, torch.bfloat16)
    return _Numerics(device, dtype, kv_dtype, config.mode, deterministic, rounded)


def _plan(config: EngineConfig, model_config: ModelConfig, *, bytes_per_block: int, free: FreeMemory) -> MemoryPlan:
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


def _plan_host(config: EngineConfig, plan: MemoryPlan, device: torch.device) -> HostPlan:
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


def _preemption_policy(config: EngineConfig, storage: KVStorage) -> PreemptionPolicy | None:
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
