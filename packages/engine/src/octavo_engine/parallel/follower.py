"""Follower: what every rank but the first does: it joins, loads its part, and computes what rank 0 says."""

from __future__ import annotations

import torch

from octavo_engine.parallel.adapters import FollowingAdapters
from octavo_engine.parallel.channel import Channel, Command, Message, copies_of, step_input
from octavo_engine.parallel.guard import Guard
from octavo_engine.parallel.job import Job
from octavo_engine.parallel.links import Links
from octavo_engine.parallel.lobby import find_round
from octavo_engine.parallel.rendezvous import Rendezvous
from octavo_engine.parallel.shard import Shard
from octavo_engine.runner.model_input import KVLayer
from octavo_engine.runner.model_runner import caches_of
from octavo_kvcache.storage import KVStorage


class Follower:
    """A rank that keeps its part of a model and of the KV cache, and no requests: rank 0 has those.

    Args:
        shard: its part of the model.
        channel: where rank 0 speaks.
        job: how it computes.
        device: where it computes.
    """

    def __init__(self, shard: Shard, channel: Channel, job: Job, device: torch.device) -> None:
        self._shard = shard
        self._channel = channel
        self._job = job
        self._device = device
        self._hidden_size = shard.model.config.hidden_size
        self._storage: KVStorage | None = None
        self._kv_layers: tuple[KVLayer, ...] = ()
        self._adapters = FollowingAdapters(shard.model, channel, device)

    @torch.inference_mode()
    def run(self) -> None:
        """Do what rank 0 says until it says stop.

        Raises:
            WorkerLost: rank 0 or another rank has ended.
        """
        while (message := self._channel.receive()).command is not Command.STOP:
            self._do(message)

    def _do(self, message: Message) -> None:
        match message.command:
            case Command.ALLOCATE:
                self._allocate(*message.numbers[:2])
            case Command.COPY:
                assert self._storage is not None, "rank 0 allocates first"
                self._storage.apply(copies_of(message))
            case Command.STEP:
                with self._adapters.step():
                    self._shard.hidden(step_input(message, self._kv_layers, self._device))
            case Command.SLOTS:
                self._adapters.hold(message)
            case Command.ADAPTER:
                self._adapters.fill(message)
            case Command.LOGITS:
                self._shard.logits(self._empty_hidden(message))
            case Command.GREEDY:
                self._shard.greedy(self._empty_hidden(message))

    def _allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        specs = self._shard.model.kv_cache_specs(getattr(torch, self._job.kv_dtype))
        self._storage = KVStorage(
            specs, num_blocks, self._job.block_size, device=self._device, num_host_blocks=num_host_blocks
        )
        self._kv_layers, _ = caches_of(self._shard.model, self._storage)

    def _empty_hidden(self, message: Message) -> torch.Tensor:
        shape = (message.numbers[0], self._hidden_size)
        return torch.empty(shape, dtype=getattr(torch, self._job.dtype), device=self._device)


def follow(
    host: str,
    port: int,
    rank: int,
    *,
    join_seconds: float,
    local_rank: int | None = None,
    in_lobby: bool = False,
    ends_process: bool = False,
) -> None:
    """Be a rank of the model that rank 0 runs, until it says stop.

    Args:
        host: of the store where the ranks meet.
        port: of it.
        rank: to be.
        join_seconds: how long to wait for rank 0.
        local_rank: the number of this machine's GPU to take; None is that of the rank.
        in_lobby: whether the store outlives rank 0, so that the one that lives is to be found first; see `Lobby`.
        ends_process: see `Guard`.

    Raises:
        WorkerLost: rank 0 does not answer within `join_seconds`, or a rank has ended; rank 0 is told.
        RankUnreachable: a rank cannot be reached any more; rank 0 is told, if it is another one.
        EngineError: as in loading a model; rank 0 is told.
    """
    prefix = find_round(host, port, rank, seconds=join_seconds) if in_lobby else ""
    rendezvous = Rendezvous(host, port, serves=False, seconds=join_seconds, prefix=prefix)
    connected: list[Links] = []

    def cut() -> None:
        for links in connected:
            links.cut()

    guard = Guard(rank, cut, ends_process=ends_process)
    try:
        job = Job.decode(rendezvous.take("job"))
        device = job.device_of(rank if local_rank is None else local_rank)
        torch.set_num_threads(job.num_threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        source = job.open()
        rendezvous.leave(f"joined/{rank}", "")
        links = job.links(rank)
        guard.watch(rendezvous, job.size, wait=join_seconds)
        rendezvous.connect(links, device, job.step_seconds, job.stage_seconds)
        connected.append(links)
        guard.check()
        shard = job.load(source, links, device)
        rendezvous.leave(f"loaded/{rank}", str(shard.num_bytes))
        Follower(shard, links.channel(), job, device).run()
    except Exception as error:
        reason = guard.reason(error)
        if guard.loss is None or guard.loss.rank:  # else nobody listens
            rendezvous.leave_failure(rank, reason)
        guard.close(says_farewell=False)
        if reason is error:
            raise
        raise reason from error
    guard.close(says_farewell=True)
