"""Ranks on a Ray cluster, with a stand-in for Ray: room for all or a typed error, and room given back."""

import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import ClusterFull, EngineConfig, InvalidConfig
from octavo_engine.parallel import ray_cluster
from octavo_engine.parallel.ray_cluster import RayCluster


class Ray:
    """What RayCluster and RayRank ask of the module; ranks run until `end` is set.

    Args:
        has_room: whether placement groups find their places.
    """

    def __init__(self, *, has_room: bool) -> None:
        self.groups: list[tuple[list[dict[str, float]], str]] = []
        self.removed: list[Any] = []
        self.killed: list[Any] = []
        self.started: list[tuple[Any, ...]] = []
        self.end = threading.Event()
        self.error: Exception | None = None
        self.has_room = has_room
        self.util = SimpleNamespace(placement_group=self._place, remove_placement_group=self.removed.append)
        self.exceptions = SimpleNamespace(RayError=RuntimeError, RayTaskError=KeyError)

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "b")

    def nodes(self) -> list[dict[str, Any]]:
        addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
        return [
            {"NodeID": name, "NodeManagerAddress": address, "Alive": True, "Resources": {"CPU": 4.0}}
            for name, address in addresses.items()
        ]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def _place(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        self.groups.append((bundles, strategy))
        return SimpleNamespace(wait=lambda seconds: self.has_room)

    def remote(self, **options: Any) -> Callable[[type], Any]:
        def run(*arguments: Any) -> str:
            self.started.append(arguments)
            return "the end"

        actor = SimpleNamespace(run=SimpleNamespace(remote=run))
        return lambda cls: SimpleNamespace(options=lambda **where: SimpleNamespace(remote=lambda: actor))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (references, []) if self.end.wait(timeout) else ([], references)

    def get(self, reference: Any) -> None:
        if self.error is not None:
            raise self.error

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


def join(monkeypatch: pytest.MonkeyPatch, ray: Ray, **options: Any) -> RayCluster:
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: ray)
    monkeypatch.setattr(RayCluster, "options", lambda self, rank: {})
    defaults: dict[str, Any] = {"size": 3, "num_cpus": 2, "num_gpus": 0, "placement": "strict_spread"}
    return RayCluster(None, **{**defaults, **options})


def test_each_rank_has_a_bundle_and_the_first_is_on_the_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(has_room=True)
    cluster = join(monkeypatch, ray)
    ranks = [cluster("10.0.0.2", 9, rank) for rank in (1, 2)]
    assert ray.groups == [([{"CPU": 2, "node:10.0.0.2": 0.001}, {"CPU": 2}, {"CPU": 2}], "STRICT_SPREAD")]
    assert ray.started == [("10.0.0.2", 9, 1), ("10.0.0.2", 9, 2)]
    assert [rank.ended() for rank in ranks] == [None, None]
    ranks[0].stop(0)
    assert not ray.removed
    ranks[1].stop(0)
    assert len(ray.removed) == 1
    assert len(ray.killed) == 2
    cluster("10.0.0.2", 9, 1).stop(0)  # the next team has a group of its own
    assert len(ray.groups) == len(ray.removed) == 2


def test_a_cluster_without_room_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(has_room=False)
    cluster = join(monkeypatch, ray, place_seconds=0.05)
    with pytest.raises(
        ClusterFull,
        match=r"no room for 3 ranks with 2 CPU each, placed by strict_spread, rank 0 on 10\.0\.0\.2, for 0\.05 s; "
        r"free are 1 of 8 CPU, on nodes 10\.0\.0\.1 with 4 CPU, 10\.0\.0\.2 with 4 CPU; start more nodes",
    ):
        cluster("10.0.0.2", 9, 1)
    assert len(ray.removed) == 1
    assert not ray.started


def test_an_actor_that_ends_is_logged_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_cluster, "_LOOK_SECONDS", 0.01)
    ray = Ray(has_room=True)
    rank = join(monkeypatch, ray)("10.0.0.2", 9, 1)
    ray.error = RuntimeError("The actor died:\n  its worker process was killed")
    ray.end.set()
    reason = "(a Ray actor) has ended: The actor died: its worker process was killed"
    assert rank.ended() == reason
    until = time.monotonic() + 5
    while f"rank 1 {reason}" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    assert f"rank 1 {reason}" in caplog.text
    rank.stop(0)


def test_no_ray_and_no_cluster_are_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"size": 2, "num_cpus": 1, "num_gpus": 0, "placement": "pack"}
    for address, message in (
        ("127.0.0.1:1", r"no Ray cluster answers at 127\.0\.0\.1:1: .*`ray start --head`"),
        ("nonsense", "no Ray cluster answers at nonsense: .*as host:port"),
        ("ray://head:10001", "'ray://head:10001' is at the end of a Ray client; run this on one of its nodes"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            ray_cluster._connect(None, address)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidConfig, match=r"package ray, which is not installed; pip install 'octavo-engine\[ray\]'"):
        RayCluster(None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "slurm"}, "executor 'slurm' is not one of processes, ray"),
        ({"executor": "ray"}, "executor ray runs the ranks of a model that is split; give tensor_parallel_size"),
        ({"ray_placement": "near"}, "ray_placement 'near' is not one of pack, spread, strict_pack, strict_spread"),
        ({"rank_timeout": 0.5}, "rank_timeout must be from 1 to 3600 seconds, got 0.5; 6 is the default"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        EngineConfig(**options)
