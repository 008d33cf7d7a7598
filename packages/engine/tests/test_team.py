"""Ranks that do not come, are others, or end: a typed error within a stated time, and nothing is left behind."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch

from octavo_engine import (
    LLM,
    InvalidConfig,
    ModelNotFound,
    RankMismatch,
    RequestFailed,
    SamplingParams,
    UnsupportedModel,
    WorkerLost,
)
from octavo_engine.parallel import split
from octavo_engine.parallel.follower import follow
from octavo_engine.parallel.job import Job
from octavo_engine.parallel.launch import WorkerProcess
from octavo_engine.parallel.lobby import PREFIX
from octavo_engine.parallel.rendezvous import Rendezvous
from octavo_engine.parallel.team import Team
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.parallel.torchrun import TorchrunRank
from octavo_engine.quant.choose import native_isa
from octavo_engine.weights.source import GGUFSource

MakeGGUF = Callable[..., Path]
PROMPTS = [{"prompt_token_ids": [5, 6, 7, 200, 9, *range(20, 60)]}, {"prompt_token_ids": [5, 6, 7, 200, 9, 11]}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class NoRank:
    """A rank that never comes."""

    def __init__(self, host: str, port: int, rank: int) -> None:
        """Start nothing."""

    def ended(self) -> str | None:
        return None

    def stop(self, seconds: float) -> None:
        """End nothing."""


@pytest.fixture
def path(make_gguf: MakeGGUF) -> Path:
    """A model that two ranks can share."""
    rng = np.random.default_rng(3)
    wide = {
        f"blk.0.ffn_{name}.weight": (0, rng.random((128, 64), np.float32).view(np.uint8)) for name in ("gate", "up")
    }
    down = {"blk.0.ffn_down.weight": (0, rng.random((64, 128), np.float32).view(np.uint8))}
    return make_gguf({"llama.feed_forward_length": 128}, {**wide, **down})


@pytest.fixture
def job(path: Path) -> Job:
    return split.make_job(
        GGUFSource(path),
        size=2,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        int8_activations=False,
        batch_invariant=True,
        num_threads=1,
        block_size=16,
    )


def start(job: Job, launch: Any = ThreadRank, **options: Any) -> None:
    """Start a team and end it."""
    ranks = Team(job, launch, **options)
    try:
        ranks.start()
        ranks.await_loaded()
    finally:
        ranks.close()


def test_a_rank_that_never_joins_is_named(job: Job) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerLost, match=r"rank 1 has not joined within 0\.2 s"):
        start(job, NoRank, join_seconds=0.2)
    assert time.monotonic() - started < 5


def test_a_port_in_use_is_refused(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"ranks cannot meet at 127.0.0.1 port {port}.*choose another port"):
            start(job, port=port, join_seconds=2)


def test_a_torch_that_knows_no_ranks_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(InvalidConfig, match=r"tensor_parallel_size 2 needs torch\.distributed"):
        tiny_llm(path)


def test_other_versions_are_refused(job: Job) -> None:
    with pytest.raises(RankMismatch, match=r"rank 1: rank 0 has torch 1\.0, this rank has .*same versions"):
        start(replace(job, versions={**job.versions, "torch": "1.0"}))


def test_other_files_are_refused(job: Job, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RankMismatch, match=r"rank 1: .*tiny\.gguf: rank 0 has other files under this name"):
        start(job)


@pytest.mark.skipif(native_isa() is None, reason="blocks are multiplied by the native kernels")
def test_linears_that_are_quantised_already_are_not_rounded_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    with pytest.raises(UnsupportedModel, match=r"quantization 'int8' takes weights that are not quantised"):
        tiny_llm(path, quantization="int8")


def test_files_that_a_rank_does_not_have_are_named(job: Job, path: Path) -> None:
    path.unlink()
    with pytest.raises(ModelNotFound, match=r"rank 1: .*tiny\.gguf: no such file"):
        start(job)


def test_a_process_that_cannot_start_is_reported_with_its_exit_code(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerLost, match=r"rank 1 \(process \d+\) has ended with exit code 1"):
        start(job, WorkerProcess)


def test_a_step_that_fails_on_rank_0_replaces_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in the middle of a step then, so that they cannot take part in the next one."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    with tiny_llm(path) as llm:
        expected = tokens_of(llm)
        attention = llm._engine._executor._runner.model._shard.model.layers[0].attention
        broken = [True]

        def fail_once(x: torch.Tensor) -> torch.Tensor:
            if broken.pop():
                raise MemoryError("no room")
            return x

        qkv = attention.qkv
        attention.qkv = lambda x: qkv(fail_once(x) if broken else x)
        assert tokens_of(llm) == expected
        assert llm._engine._executor._team.num_restarts == 1


@pytest.fixture
def split_llm(path: Path) -> Iterator[LLM]:
    """An engine with a rank in a process of its own."""
    with tiny_llm(path) as llm:
        yield llm


def tiny_llm(path: Path, size: int = 2, **options: Any) -> LLM:
    defaults = {"num_blocks": 33, "max_num_seqs": 2, "num_threads": 1, "show_progress": False}
    return LLM(str(path), tensor_parallel_size=size, **{**defaults, **options})


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def worker_of(llm: LLM) -> WorkerProcess:
    worker = llm._engine._executor._team._workers[1]
    assert isinstance(worker, WorkerProcess)
    return worker


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def kill_in_step(llm: LLM, step: int) -> None:
    """Let the worker be killed right before a step from now on, counted from 1."""
    executor = llm._engine._executor
    submit, left = executor.submit, [step]

    def submit_and_kill(batch: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(worker_of(llm).pid, signal.SIGKILL)
        return submit(batch)

    executor.submit = submit_and_kill


def test_a_killed_worker_is_replaced_and_costs_no_request(split_llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    expected = tokens_of(split_llm)
    first = worker_of(split_llm).pid
    kill_in_step(split_llm, 5)
    with caplog.at_level(logging.ERROR):
        assert tokens_of(split_llm) == expected
    assert f"rank 1 (process {first}) was killed by signal 9 (SIGKILL)" in caplog.text
    second = worker_of(split_llm).pid
    assert second != first
    # One that is lost between two requests takes the prefix cache with it.
    executor = split_llm._engine._executor
    os.kill(second, signal.SIGKILL)
    until = time.monotonic() + 10
    while not executor._team.is_lost:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert tokens_of(split_llm) == expected
    assert split_llm.stats().num_lost_steps == 1
    # Requests that lose a worker twice end with its reason; the engine goes on.
    executor._team.restart = lambda: setattr(executor._team, "_lost", WorkerLost("rank 1 is gone"))
    kill_in_step(split_llm, 1)
    with pytest.raises(RequestFailed, match=r"WorkerLost: "):
        tokens_of(split_llm)
    third = worker_of(split_llm).pid
    split_llm.close()
    assert not any(is_running(pid) for pid in (first, second, third))


TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_ranks_that_torchrun_has_started_meet_in_its_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_llm(path, size=1) as whole:
        expected = tokens_of(whole)
    store = Rendezvous("127.0.0.1", 0, serves=True, seconds=10)  # torchrun's own
    host, port = store.address
    store.leave(f"{PREFIX}/here/1", "earlier")  # a rank that has ended since
    environ = {**TORCHRUN, "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    other = TorchrunRank.of({**environ, "RANK": "1"})
    assert other is not None
    arguments = {"join_seconds": 10, "local_rank": other.local_rank, "in_lobby": True}
    rank = threading.Thread(target=follow, args=(other.host, other.port, other.rank), kwargs=arguments)
    timer = threading.Timer(2, rank.start)  # later than rank 0
    timer.start()
    for name, value in {**environ, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with tiny_llm(path) as llm:
        assert tokens_of(llm) == expected
        llm._engine._executor._team._lost = WorkerLost("rank 1 is gone")
        with pytest.raises(WorkerLost, match="rank 1 is gone; torchrun starts all ranks again"):
            tokens_of(llm)
        llm._engine._executor._team._lost = None
    assert store.has(f"{PREFIX}/round/earlier")
    rank.join(10)
    assert not rank.is_alive()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidConfig, match="torchrun has started 3 processes, tensor_parallel_size is 2"):
        tiny_llm(path)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "STEP_SECONDS", 5.0)
    with tiny_llm(path) as llm:
        expected = tokens_of(llm)
        os.kill(worker_of(llm).pid, signal.SIGSTOP)
        started = time.monotonic()
        assert tokens_of(llm) == expected
        assert 5 <= time.monotonic() - started < 30
        assert llm.stats().num_lost_steps == 1


def test_an_engine_whose_ranks_cannot_be_replaced_stops(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    with tiny_llm(path) as llm:
        team = llm._engine._executor._team
        team._launch, team._join_seconds, team._lost = NoRank, 0.2, WorkerLost("rank 1 is gone")
        with pytest.raises(WorkerLost, match=r"rank 1 has not joined within 0\.2 s"):
            tokens_of(llm)


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os, sys, time\n"
        "from octavo_engine.parallel.launch import WorkerProcess\n"
        "from octavo_engine.parallel.rendezvous import Rendezvous\n"
        "meeting = Rendezvous('127.0.0.1', 0, serves=True, seconds=60)\n"
        "worker = WorkerProcess(*meeting.address, 1)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait()
    until = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)
