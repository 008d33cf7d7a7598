"""RayCluster, RayRank: ranks as actors of an existing Ray cluster, in a placement group that is made with them.

bundle    0                                 1 ...
holds     rank 0, which is this process:    an actor for each of
          on its node, nothing is put in    the other ranks
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import Any

from octavo_engine.errors import ClusterFull, InvalidConfig

PLACE_SECONDS = 60.0
"""Within which the cluster must have room for all ranks."""

_PROBE_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_ON_NODE = 0.001  # of the resource that every node has of its own, to be put there

_log = logging.getLogger(__name__)


class RayCluster:
    """Starts ranks on the nodes of a cluster; it is a `Launch`. One thread at a time uses it.

    Args:
        address: of the cluster's head; None is RAY_ADDRESS, or else the cluster that this machine is a node of. A
            program that has called `ray.init` stays with its cluster.
        size: ranks, rank 0 included.
        num_cpus: of each rank.
        num_gpus: of each rank.
        placement: over nodes, one of `RAY_PLACEMENTS`.
        place_seconds: within which there must be room.

    Attributes:
        host: the address of this node.

    Raises:
        InvalidConfig: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self,
        address: str | None,
        *,
        size: int,
        num_cpus: int,
        num_gpus: int,
        placement: str,
        place_seconds: float = PLACE_SECONDS,
    ) -> None:
        self._ray = _import_ray()
        self._size = size
        self._needs = {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
        self._placement = placement
        self._place_seconds = place_seconds
        self._group: Any = None
        self._ranks: set[int] = set()
        self._closing = threading.Event()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, address)
        own_id = self._ray.get_runtime_context().get_node_id()
        self.host: str = next(n["NodeManagerAddress"] for n in self._ray.nodes() if n["NodeID"] == own_id)

    def __call__(self, host: str, port: int, rank: int) -> RayRank:
        """Start a rank. The first one of a team makes room for all.

        Raises:
            ClusterFull: there is not enough of it; says what is free.
        """
        if self._group is None:
            self._group = self._place()
        self._ranks.add(rank)
        return RayRank(self, host, port, rank)

    def options(self, rank: int) -> dict[str, Any]:
        """Return where a rank is to be, and what it takes, as Ray's options of an actor."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        return {"num_cpus": self._needs["CPU"], "num_gpus": self._needs.get("GPU", 0), "scheduling_strategy": where}

    @property
    def ray(self) -> Any:
        """The module."""
        return self._ray

    def leave(self, rank: int) -> None:
        """Take in that a rank has been ended; after the last one their room is given back."""
        self._ranks.discard(rank)
        if not self._ranks:
            self._give_back()

    def close(self) -> None:
        """Give all room back, and leave the cluster if this object has joined it."""
        self._closing.set()
        self._give_back()
        if self._is_ours and self._ray.is_initialized():
            self._ray.shutdown()

    def _place(self) -> Any:
        bundles = [{**self._needs, f"node:{self.host}": _ON_NODE}, *[dict(self._needs)] * (self._size - 1)]
        group = self._ray.util.placement_group(bundles, strategy=self._placement.upper())
        until = time.monotonic() + self._place_seconds
        while not group.wait(_LOOK_SECONDS):
            if self._closing.is_set() or time.monotonic() > until:
                free = self._describe_free()
                self._ray.util.remove_placement_group(group)
                needs = " and ".join(f"{number} {name}" for name, number in self._needs.items())
                raise ClusterFull(
                    f"the Ray cluster has had no room for {self._size} ranks with {needs} each, placed by "
                    f"{self._placement}, rank 0 on {self.host}, for {self._place_seconds:g} s; {free}; start more "
                    "nodes, or use fewer ranks, fewer threads or another placement"
                )
        return group

    def _describe_free(self) -> str:
        free = self._ray.available_resources()
        total = self._ray.cluster_resources()
        parts = [f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}" for name in self._needs]
        nodes = [
            f"{node['NodeManagerAddress']} with "
            + " and ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in self._needs)
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        return f"free are {' and '.join(parts)}, on nodes {', '.join(nodes)}"

    def _give_back(self) -> None:
        group, self._group = self._group, None
        if group is not None and self._ray.is_initialized():
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.util.remove_placement_group(group)


class RayRank:
    """A rank in an actor; a `Worker`. The log says at once when it ends unasked.

    Args:
        cluster: where.
        host: where rank 0 is met.
        port: of it.
        rank: to run.
    """

    def __init__(self, cluster: RayCluster, host: str, port: int, rank: int) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        self._rank = rank
        self._stopping = threading.Event()
        actor = self._ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
        self._actor = actor.options(**cluster.options(rank)).remote()
        self._end = self._actor.run.remote(host, port, rank)
        threading.Thread(target=self._watch, name=f"octavo-rank-{rank}", daemon=True).start()

    def ended(self) -> str | None:
        """Return how the actor has ended; None while it runs."""
        if not self._has_ended(0):
            return None
        try:
            self._ray.get(self._end)
        except self._ray.exceptions.RayTaskError as error:
            return f"(a Ray actor) has failed: {error.cause or error}"
        except self._ray.exceptions.RayError as error:
            return f"(a Ray actor) has ended: {' '.join(str(error).split())}"
        return "(a Ray actor) has ended"

    def stop(self, seconds: float) -> None:
        """Let the actor end, and kill it if it does not."""
        self._stopping.set()
        if self._ray.is_initialized():
            self._has_ended(seconds)
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(self._actor)
        self._cluster.leave(self._rank)

    def _has_ended(self, seconds: float) -> bool:
        ready, _ = self._ray.wait([self._end], timeout=seconds)
        return bool(ready)

    def _watch(self) -> None:
        while not self._stopping.is_set() and self._ray.is_initialized():
            if self._has_ended(_LOOK_SECONDS):
                if not self._stopping.is_set():
                    _log.error("rank %d %s", self._rank, self.ended())
                return


class RankActor:
    """What runs in a Ray actor: a rank, until rank 0 says stop."""

    def run(self, host: str, port: int, rank: int) -> None:
        """Be a rank; see `follow`."""
        logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
        from octavo_engine.parallel.follower import follow
        from octavo_engine.parallel.team import JOIN_SECONDS

        follow(host, port, rank, join_seconds=JOIN_SECONDS, local_rank=0, ends_process=True)  # Ray shows it one GPU


def _import_ray() -> Any:
    try:
        import ray
        import ray.util
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            "executor ray needs the package ray, which is not installed; pip install 'octavo-engine[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster as a driver. Ray itself waits minutes for one that is not there, so that it is tried before."""
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in wanted:
        raise InvalidConfig(
            f"the Ray cluster {wanted!r} is at the end of a Ray client; run this on one of its nodes, whose address is "
            "host:port"
        )
    host, _, port = wanted.rpartition(":")
    if wanted != "auto":
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except (OSError, ValueError) as error:
            raise InvalidConfig(
                f"no Ray cluster answers at {wanted}: {error}; start one there with `ray start --head`, or give the "
                "address of one as host:port"
            ) from error
    try:
        ray.init(address=wanted, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InvalidConfig(
            f"the Ray cluster at {wanted} cannot be joined: {error}; this machine must be one of its nodes: `ray start "
            "--address=...`"
        ) from error
