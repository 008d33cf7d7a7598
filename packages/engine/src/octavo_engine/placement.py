"""Places an engine: settles the numbers of an opened model, and whether it is to be here or split over processes."""

from __future__ import annotations

from functools import partial

import torch

from octavo_engine.assembly import BuiltEngine, Place, assemble
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.kv_dtype import check_scales
from octavo_engine.kv_scales import load_with_scales
from octavo_engine.numerics import Numerics, resolve_numerics
from octavo_engine.opening import Opening
from octavo_engine.parallel.torchrun import describe_sizes
from octavo_engine.quant.choose import choose_method
from octavo_engine.weights.load import Progress
from octavo_kvcache.storage import KVStorage


def place_engine(config: EngineConfig, opened: Opening, progress: Progress | None, started: float) -> BuiltEngine:
    """Load an opened model where the configuration wants it and put an engine on it; see `build_engine`.

    Args:
        config: what the user chose.
        opened: the model.
        progress: called with the number of weights loaded and their total.
        started: when building began, in seconds of the monotonic clock.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    source = opened.source
    numerics = resolve_numerics(config, source.config)
    check_scales(source, numerics.kv_dtype, config.num_ranks)
    device = numerics.device
    if config.num_ranks > 1:
        return _place_split(config, opened, numerics, progress, started)
    quant = choose_method(
        device,
        numerics.dtype,
        int8_activations=config.mode == "fast",
        batch_invariant=numerics.deterministic,
    )
    make_model = partial(
        load_with_scales,
        kv_dtype=numerics.kv_dtype,
        device=device,
        dtype=numerics.dtype,
        quant=quant,
        batch_invariant=numerics.deterministic,
        quantization=config.quantization,
    )
    return assemble(config, opened, numerics, Place(make_model, KVStorage), progress, started)


def _place_split(
    config: EngineConfig, opened: Opening, numerics: Numerics, progress: Progress | None, started: float
) -> BuiltEngine:
    """Build an engine whose model is split over this process and others, which end if that fails."""
    if not torch.distributed.is_available():
        raise InvalidConfig(
            f"{describe_sizes(config.tensor_parallel_size, config.pipeline_parallel_size)} needs torch.distributed, "
            "which this build of torch does not have; install another one, or use 1"
        )
    from octavo_engine.parallel.adapters import LeadingAdapterPool
    from octavo_engine.parallel.leader import LeadingStorage
    from octavo_engine.parallel.pipelined_runner import PipelinedRunner
    from octavo_engine.parallel.split import RayPlace, load_split, make_job, make_team

    job = make_job(
        opened.source,
        size=config.tensor_parallel_size,
        num_stages=config.pipeline_parallel_size,
        device=numerics.device,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        int8_activations=config.mode == "fast",
        batch_invariant=numerics.deterministic,
        num_threads=config.num_threads,
        block_size=config.block_size,
        expert_parallel=config.expert_parallel,
        quantization=config.quantization,
        dbo_token_threshold=config.dbo_token_threshold if config.enable_dbo else None,
        stage_seconds=config.watchdog_timeout,
    )
    ray = RayPlace(config.ray_address, config.ray_placement) if config.executor == "ray" else None
    team = make_team(job, config.rank_timeout, ray)
    staged = partial(PipelinedRunner, max_in_flight=len(job.stages)) if job.is_pipelined else None
    place = Place(
        partial(load_split, job=job, team=team),
        partial(LeadingStorage, team=team),
        team,
        staged,
        partial(LeadingAdapterPool, team=team),
    )
    try:
        return assemble(config, opened, numerics, place, progress, started)
    except BaseException:
        team.close()
        raise
