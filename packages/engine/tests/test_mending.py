"""Ranks that cannot be replaced at once: the engine goes on, what waits is served when they can be."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import LLM, ClusterFull, SamplingParams, WorkerLost
from octavo_engine.parallel import mending, split
from octavo_engine.parallel.mending import MendingTeam
from octavo_engine.parallel.thread_rank import ThreadRank

PROMPTS = [{"prompt_token_ids": [5, 6, 7, 200, 9, *range(20, 60)]}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Cluster:
    """Starts ranks, while it has room."""

    def __init__(self) -> None:
        self.has_room = True
        self.num_refusals = 0
        self.is_closed = False

    def __call__(self, host: str, port: int, rank: int) -> ThreadRank:
        if not self.has_room:
            self.num_refusals += 1
            raise ClusterFull("no room")
        return ThreadRank(host, port, rank)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def llm(make_gguf: Callable[..., Path], cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """An engine whose ranks are of a cluster."""
    monkeypatch.setattr(mending, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(
        split, "Team", lambda job, launch, **options: MendingTeam(job, cluster, cluster.close, **options)
    )
    rng = np.random.default_rng(3)
    parts = {f"blk.0.ffn_{name}.weight": (128, 64) for name in ("gate", "up")} | {"blk.0.ffn_down.weight": (64, 128)}
    tensors = {name: (0, rng.random(shape, np.float32).view(np.uint8)) for name, shape in parts.items()}
    path = make_gguf({"llama.feed_forward_length": 128}, tensors)
    options: dict[str, Any] = {"num_blocks": 33, "num_threads": 1, "show_progress": False}
    with LLM(str(path), tensor_parallel_size=2, **options) as llm:
        yield llm


def tokens_of(llm: LLM) -> list[int]:
    (output,) = llm.generate(PROMPTS, GREEDY)
    return output.outputs[0].token_ids


def test_ranks_are_replaced_as_soon_as_there_is_room(llm: LLM, cluster: Cluster) -> None:
    expected = tokens_of(llm)
    team = llm._engine._executor._team
    loading, await_loaded = [], team.await_loaded

    def await_slowly() -> None:
        time.sleep(0.2)
        loading.append(team.is_lost)  # no step may begin yet
        await_loaded()

    team.await_loaded = await_slowly
    team._lost, cluster.has_room = WorkerLost("rank 1 is gone"), False
    timer = threading.Timer(0.5, lambda: setattr(cluster, "has_room", True))
    timer.start()
    assert tokens_of(llm) == expected
    timer.join()
    assert cluster.num_refusals > 1
    assert team.num_restarts == 1
    assert loading == [True]


def test_the_engine_goes_on_while_there_is_no_room(llm: LLM, cluster: Cluster) -> None:
    """Requests are queued and aborted meanwhile, and the engine can be closed."""
    team = llm._engine._executor._team
    team._lost, cluster.has_room = WorkerLost("rank 1 is gone"), False
    began = time.monotonic()
    for _ in range(5):
        assert llm._engine.step() == []
    assert time.monotonic() - began < 5
    assert team.is_lost
    llm.close()
    assert cluster.is_closed
    assert cluster.num_refusals > 0
