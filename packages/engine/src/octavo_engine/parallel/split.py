"""make_job, make_team, load_split: from a model's files to a team of ranks, and to what they run together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from math import lcm
from typing import NamedTuple

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.parallel.guard import RANK_TIMEOUT
from octavo_engine.parallel.job import Job, installed_versions
from octavo_engine.parallel.launch import WorkerProcess
from octavo_engine.parallel.leader import LeadingModel, PipelinedModel
from octavo_engine.parallel.mending import MendingTeam
from octavo_engine.parallel.plan import check_size
from octavo_engine.parallel.stages import plan_stages
from octavo_engine.parallel.team import STAGE_SECONDS, STEP_SECONDS, Team
from octavo_engine.parallel.torchrun import TorchrunRank, describe_sizes
from octavo_engine.quant.choose import native_isa
from octavo_engine.quant.online import BLOCK
from octavo_engine.weights.source import Source

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(weights loaded, weights in all)"""


class RayPlace(NamedTuple):
    """Where on a Ray cluster ranks are to be: see `EngineConfig.ray_address` and `ray_placement`."""

    address: str | None
    placement: str


def make_job(
    source: Source,
    *,
    size: int,
    num_stages: int = 1,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    int8_activations: bool,
    batch_invariant: bool,
    num_threads: int | None,
    block_size: int,
    expert_parallel: bool = False,
    quantization: str | None = None,
    stage_seconds: float | None = None,
    dbo_token_threshold: int | None = None,
) -> Job:
    """Describe a model to the ranks that are to run it; nothing has been started or loaded when this returns.

    Args:
        source: the whole model's files.
        size: ranks that split each layer.
        num_stages: that the layers are shared out among, each with so many ranks.
        device: of rank 0.
        dtype: of activations.
        kv_dtype: of the KV cache.
        int8_activations: see `choose_method`.
        batch_invariant: see `LayerOptions`.
        num_threads: of each rank; None shares torch's among them.
        block_size: of the KV cache.
        expert_parallel: whether a rank has whole experts instead of a part of each.
        quantization: see `load_model`.
        stage_seconds: that a stage may take over a step before it is taken for lost; None is a day.
        dbo_token_threshold: tokens from which on steps are computed as two halves; None computes all at once.

    Raises:
        InvalidConfig: the model cannot be split so, or there are too few GPUs; says which sizes work.
        UnsupportedModel: the architecture cannot be split.
        CorruptModelFile: a quantised weight of which columns are to be cut is damaged; names it.
    """
    column_block = source.column_block if quantization is None else partial(_rounded_block, source)
    check_size(source.config, size, column_block, source.name, expert_parallel=expert_parallel)
    stages = plan_stages(source.config, source.num_bytes(), num_stages, source.name)
    num_ranks = size * num_stages
    num_here = int(os.environ["LOCAL_WORLD_SIZE"]) if TorchrunRank.of(os.environ) else num_ranks
    if device.type == "cuda" and (device.index or torch.cuda.device_count() < num_here):
        raise InvalidConfig(
            f"{describe_sizes(size, num_stages)} needs the GPUs from 0 to {num_here - 1}, one for each rank; device is "
            f"{device}, and torch sees {torch.cuda.device_count()} GPUs; use device cuda and a smaller size"
        )
    return Job(
        model=str(source.path.absolute()),
        sample=source.sample.hex(),
        versions=installed_versions(),
        tp_size=size,
        stages=tuple((stage.start, stage.stop) for stage in stages),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        int8_activations=int8_activations,
        batch_invariant=batch_invariant,
        num_threads=num_threads or max(1, torch.get_num_threads() // num_ranks),
        block_size=block_size,
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        step_seconds=STEP_SECONDS,
        stage_seconds=STAGE_SECONDS if stage_seconds is None else stage_seconds,
        expert_parallel=expert_parallel,
        quantization=quantization,
        dbo_token_threshold=dbo_token_threshold,
        instruction_set=native_isa() if device.type == "cpu" else None,
    )


def _rounded_block(source: Source, name: str) -> int:
    """Return how many columns are stored, and rounded, together: so parts have the codes of the whole."""
    return lcm(BLOCK, source.column_block(name))


def make_team(job: Job, rank_timeout: float = RANK_TIMEOUT, ray: RayPlace | None = None) -> Team:
    """Return the other ranks of a job: not started yet, or those that torchrun has started.

    Args:
        job: what they run.
        rank_timeout: see `EngineConfig`.
        ray: where on a Ray cluster they are to be; None starts processes of this machine.

    Raises:
        InvalidConfig: torchrun has started another number of processes, or this is not the first of them; or no Ray
            cluster answers.
    """
    started = TorchrunRank.of(os.environ)
    if ray is not None:
        if started is not None:
            raise InvalidConfig("torchrun has started this process, and executor ray starts ranks too; use one of them")
        return _ray_team(job, rank_timeout, ray)
    if started is None:
        return Team(job, WorkerProcess, rank_timeout=rank_timeout)
    started.check_size(job.tp_size, len(job.stages))
    if started.rank:
        raise InvalidConfig(
            f"this process is rank {started.rank} of torchrun's, and rank 0 runs the engine; use follow"
        )
    return Team(job, None, host=started.host, port=started.port, rank_timeout=rank_timeout)


def _ray_team(job: Job, rank_timeout: float, place: RayPlace) -> Team:
    from octavo_engine.parallel.ray_cluster import RayCluster

    cluster = RayCluster(
        place.address,
        size=job.size,
        num_cpus=job.num_threads,
        num_gpus=int(job.device == "cuda"),
        placement=place.placement,
    )
    return MendingTeam(job, cluster, cluster.close, host=cluster.host, rank_timeout=rank_timeout)


def load_split(source: Source, job: Job, team: Team, progress: Progress | None = None) -> LeadingModel:
    """Start the other ranks, and load all parts of a model at the same time.

    Raises:
        WorkerLost, RankMismatch: a rank did not come, or is another one than was expected.
        CorruptModelFile, UnsupportedModel: as in loading a model.
    """
    torch.set_num_threads(job.num_threads)
    team.start()
    shard = job.load(source, team.links, job.device_of(0), progress)
    _log.info("rank 0 has read %d bytes of weights", shard.num_bytes)
    team.await_loaded()
    return (PipelinedModel if job.is_pipelined else LeadingModel)(source.config, shard, team)
