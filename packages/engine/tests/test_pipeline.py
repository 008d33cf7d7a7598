"""Layers shared out among stages: tokens as of one process, several steps at once, and nothing lost with a rank."""

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch
from torch._C._distributed_c10d import TCPStore

from octavo_engine import LLM, BeamSearchParams, EngineConfig, InvalidConfig, InvalidRequest, SamplingParams, WorkerLost
from octavo_engine.errors import RequestFailed
from octavo_engine.models.llama_stage import LlamaStage
from octavo_engine.parallel import split
from octavo_engine.parallel.follower import follow
from octavo_engine.parallel.group import Group
from octavo_engine.parallel.pulse import Loss
from octavo_engine.parallel.rendezvous import Rendezvous
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.quant.choose import has_native_products
from octavo_engine.types import Request, TokenSpan

TIE = 5e-4
VOCAB_SIZE = 97
PROMPTS = [tuple((7 * i + j) % VOCAB_SIZE for j in range(length)) for i, length in enumerate([1, 5, 16, 17, 40])]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
Make = Callable[..., LLM]


@pytest.fixture
def folder(save_llama: Callable[..., Path]) -> Path:
    return save_llama(4)


@pytest.fixture(scope="module")
def mixtral(make_mixtral: Callable[..., tuple[Path, Any]]) -> Path:
    """A mixture of two layers."""
    return make_mixtral(num_key_value_heads=4)[0]


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make engines whose ranks are threads, of stages and ranks in each; they are closed at the end."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    made: list[LLM] = []

    def make(num_stages: int = 1, size: int = 1, **options: Any) -> LLM:
        made.append(make_llm(folder, num_stages, size, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def make_llm(folder: Path, num_stages: int, size: int = 1, **options: Any) -> LLM:
    defaults = {"num_blocks": 65, "max_num_seqs": 8, "num_threads": 1, "show_progress": False}
    sizes = {"pipeline_parallel_size": num_stages, "tensor_parallel_size": size}
    return LLM(str(folder), **{**defaults, **sizes, **options})


def answers(
    llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS, sampling: SamplingParams = GREEDY
) -> list[tuple[Any, Any]]:
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling)
    return [(tuple(one.token_ids), one.logprobs) for output in outputs for one in output.outputs]


def check_ties(whole: LLM, found: Sequence[tuple[Any, Any]]) -> None:
    """Each token is the likeliest of the model in one piece, or as good as equal to it."""
    outputs = whole.generate(
        [{"prompt_token_ids": [*prompt, *tokens]} for prompt, (tokens, _) in zip(PROMPTS, found, strict=True)],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
    )
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[len(prompt) :]:
            assert entry is not None
            assert entry.top[0][1] - entry.logprob <= TIE


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_compute_the_very_numbers_of_one_process(make: Make, num_stages: int) -> None:
    """Nothing is added in another order, so that log-probabilities are equal to the last bit."""
    llm = make(num_stages, max_num_batched_tokens=32)
    assert (llm.info.pipeline_parallel_size, llm.info.tensor_parallel_size) == (num_stages, 1)
    assert answers(llm) == answers(make(max_num_batched_tokens=32))


def test_stages_of_several_ranks_each(make: Make) -> None:
    """The numbers are those of ranks that split whole layers, and the tokens those of one process."""
    found = answers(make(2, 2, max_num_batched_tokens=32))
    assert found == answers(make(1, 2, max_num_batched_tokens=32))
    check_ties(make(), found)


@pytest.mark.parametrize(
    ("size", "expert_parallel"), [(1, False), (2, False), (2, True)], ids=["alone", "parts of experts", "whole experts"]
)
def test_stages_of_a_mixture(mixtral: Path, monkeypatch: pytest.MonkeyPatch, size: int, expert_parallel: bool) -> None:
    """The last stage's layers tell where their tokens went, as they do on one process."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    found, loads = [], []
    for num_stages in (1, 2):
        with make_llm(mixtral, num_stages, size, expert_parallel=expert_parallel) as llm:
            found.append(answers(llm))
            loads.append(llm.stats().experts.num_tokens)
    assert found[0] == found[1]
    assert len(loads[0]) == 2
    assert loads[0][1:] == loads[1]


@pytest.mark.skipif(not has_native_products(torch.device("cpu")), reason="needs the native kernels")
def test_each_rank_rounds_its_linears_to_the_codes_of_the_whole(
    save_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    folder = save_llama(2, hidden_size=64, intermediate_size=128)
    found = []
    for sizes in ((1, 1), (2, 1), (1, 2), (2, 2)):
        with make_llm(folder, *sizes, quantization="int4") as llm:
            found.append(answers(llm))
    assert found[0] == found[1]
    assert found[2] == found[3]
    for (tokens, logprobs), (split_tokens, split_logprobs) in zip(found[0], found[2], strict=True):
        assert tokens == split_tokens
        likely = [entry.logprob for entry in logprobs]
        assert likely == pytest.approx([entry.logprob for entry in split_logprobs], abs=1e-4)
    with pytest.raises(InvalidConfig, match=r"tensor_parallel_size 4 does not fit .*use 1 or 2$"):
        make_llm(folder, 1, 4, quantization="int4")


def test_stages_compute_different_steps_at_the_same_time(make: Make) -> None:
    """As many steps are on their way as there are stages, and none of them waits for another one's tokens."""
    llm = make(3)
    executor, runner = llm._engine._executor, llm._engine._executor._runner
    assert executor.max_in_flight == 3
    num_begun, rows_begun = [], []
    launch = runner.launch

    def watched(batch: Any) -> Any:
        step = launch(batch)
        num_begun.append(len(runner._begun))
        rows_begun.append([begun.rows for begun in runner._begun])
        return step

    runner.launch = watched
    answers(llm)
    assert max(num_begun) == 3
    assert num_begun.count(3) > len(num_begun) / 2
    for rows in rows_begun:
        assert sum(map(len, rows)) == len(set().union(*rows))
    overlap = llm.stats().overlap
    assert overlap.num_overlapped > 10
    assert overlap.num_waited == {}


def test_what_the_runner_does_is_done_with_all_stages(make: Make) -> None:
    """Samples and beams copy blocks, embeddings and log-probabilities read the hidden states of every token."""
    whole, llm = make(), make(2, max_num_batched_tokens=24)
    drawn = SamplingParams(n=3, seed=7, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    assert answers(llm, PROMPTS, drawn) == answers(whole, PROMPTS, drawn)
    ruled = SamplingParams(seed=3, max_tokens=6, repetition_penalty=1.4, mirostat_mode=2, ignore_eos=True)
    assert answers(llm, PROMPTS, ruled) == answers(whole, PROMPTS, ruled)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS[2:]]
    beams = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    searched = [
        [beam.token_ids for found in one.beam_search(prompts, beams) for beam in found.outputs] for one in (whole, llm)
    ]
    assert searched[0] == searched[1]
    vectors = [[found.embedding for found in one.embed(prompts, pooling="mean")] for one in (whole, llm)]
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize(("mode", "size"), [("swap", 2), ("recompute", 1)])
def test_preempted_sequences_come_back(make: Make, mode: str, size: int) -> None:
    """Copies to the host and back are made between the right steps on every stage."""
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    few = {"num_blocks": 7, "max_model_len": 64, "prefix_cache": False}
    expected = answers(make(1, size), PROMPTS[1:5], sampling)
    llm = make(2, size, host_kv_bytes=1 << 20, preemption_mode=mode, **few)
    assert answers(llm, PROMPTS[1:5], sampling) == expected
    preemption = llm.stats().preemption
    assert (preemption.num_swapped if mode == "swap" else preemption.num_recomputed) > 0


def test_the_model_is_described_as_a_whole(make: Make) -> None:
    whole, llm = make(), make(2, 2)
    assert llm.info.num_parameters == whole.info.num_parameters
    assert llm.info.kv_cache_bytes == whole.info.kv_cache_bytes


@pytest.mark.model
def test_two_stages_of_the_demo_model(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head is its embedding, in blocks of 4 bits, which both stages have."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    prompts = [(504, 3575, 282, 4649, 314), (2, 8, 27)]
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    found = []
    for num_stages in (1, 2):
        with make_llm(demo_path, num_stages) as llm:
            found.append(answers(llm, prompts, sampling))
    assert found[0] == found[1]


def test_sizes_and_what_cannot_be_done_are_refused(make: Make) -> None:
    with pytest.raises(InvalidConfig, match=r"pipeline_parallel_size 5 does not fit .*it has 4 layers.*use 1 to 4$"):
        make(5)
    with pytest.raises(InvalidConfig, match=r"tensor_parallel_size 3 does not fit .*use 1 or 2 or 4"):
        make(2, 3)
    llm = make(2)
    with pytest.raises(InvalidRequest, match="cannot put its model aside"):
        llm.sleep()
    with pytest.raises(InvalidConfig, match="enable_lora needs pipeline_parallel_size 1, got 2"):
        EngineConfig(enable_lora=True, pipeline_parallel_size=2)
    with pytest.raises(InvalidConfig, match="pipeline_parallel_size must be at least 1, got 0"):
        EngineConfig(pipeline_parallel_size=0)


def test_a_torch_that_knows_no_ranks_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(InvalidConfig, match=r"^pipeline_parallel_size 2 needs torch\.distributed"):
        make(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "said"),
    [(signal.SIGKILL, "was killed by signal 9 (SIGKILL)"), (signal.SIGSTOP, "rank 1 does not answer")],
    ids=["ends", "hangs"],
)
def test_a_worker_that_ends_or_hangs_is_replaced_and_costs_no_request(
    folder: Path, caplog: pytest.LogCaptureFixture, sent: signal.Signals, said: str
) -> None:
    with make_llm(folder, 2, max_num_batched_tokens=16, watchdog_timeout=3.0) as llm:
        expected = answers(llm)
        executor = llm._engine._executor
        first = executor._team._workers[1].pid
        submit, left = executor.submit, [4]

        def submit_after_signal(batch: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(first, sent)
            return submit(batch)

        executor.submit = submit_after_signal
        with caplog.at_level(logging.ERROR):
            assert answers(llm) == expected
        assert said in caplog.text
        assert executor._team._workers[1].pid != first


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (1, 2), (2, 1)])
def test_steps_on_their_way_are_lost_once_with_any_stage(
    make: Make, monkeypatch: pytest.MonkeyPatch, stage: int, size: int
) -> None:
    """Prompts are in several of them, in chunks, and are computed again all the same: none has lost two."""
    llm = make(3, size, max_num_batched_tokens=16)
    expected = answers(llm)
    advance, left, lock = LlamaStage.advance, [4], threading.Lock()
    first_layer = llm._engine._executor._team._job.stages[stage][0]

    def fail_once(self: LlamaStage, *arguments: Any) -> torch.Tensor:
        with lock:
            left[0] -= self._first_layer == first_layer
            fails = left[0] == 0
            left[0] -= fails
        if fails:
            raise MemoryError("no room")
        return advance(self, *arguments)

    monkeypatch.setattr(LlamaStage, "advance", fail_once)
    assert answers(llm) == expected
    assert llm._engine._executor._team.num_restarts == 1
    assert llm.stats().num_lost_steps > 1


@pytest.mark.parametrize(("stage", "size"), [(0, 2), (2, 1)])
def test_ranks_end_at_once_with_an_engine_that_is_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch, stage: int, size: int
) -> None:
    """They wait for each other in the middle of a step, and learn of it by the connections, whoever holds the error."""
    llm = make(3, size)
    team = llm._engine._executor._team
    workers = list(team._workers.values())
    first_layer = team._job.stages[stage][0]
    advance = LlamaStage.advance

    def fail(self: LlamaStage, *arguments: Any) -> torch.Tensor:
        if self._first_layer == first_layer:
            raise MemoryError("no room")
        return advance(self, *arguments)

    def refuse() -> None:
        raise WorkerLost("nobody replaces them")

    monkeypatch.setattr(LlamaStage, "advance", fail)
    monkeypatch.setattr(team, "restart", refuse)
    gc.disable()
    try:
        with pytest.raises(WorkerLost, match="nobody replaces them") as held:
            answers(llm)
        started = time.monotonic()
        llm.close()
        assert time.monotonic() - started < 0.9  # a rank that hangs is waited for a second
        assert all(worker.ended() for worker in workers)
    finally:
        gc.enable()
    assert held.value


def test_what_waits_for_a_stage_out_of_reach_fails_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for what the stage before makes; that its machine is gone, it hears of beside it."""
    llm = make(2)
    expected = answers(llm)
    team = llm._engine._executor._team
    hanging, waiting, released = threading.Event(), threading.Event(), threading.Event()
    advance, receive = LlamaStage.advance, Group.receive

    def hang_once(self: LlamaStage, *arguments: Any) -> torch.Tensor:
        if self.is_first and not hanging.is_set():
            hanging.set()
            released.wait(20)
        return advance(self, *arguments)

    def watched(self: Group, *arguments: Any, **options: Any) -> None:
        if self is team.links.stages:
            waiting.set()
        receive(self, *arguments, **options)
        if self is team.links.stages:
            waiting.clear()

    def lose() -> None:
        hanging.wait(20)
        waiting.wait(20)
        team._guard._take(Loss(1, "cannot be reached", is_unreachable=True))

    monkeypatch.setattr(LlamaStage, "advance", hang_once)
    monkeypatch.setattr(Group, "receive", watched)
    losing = threading.Thread(target=lose)
    losing.start()
    started = time.monotonic()
    with pytest.raises(RequestFailed, match="RankUnreachable: rank 1 cannot be reached"):
        answers(llm)
    assert time.monotonic() - started < 10
    released.set()
    losing.join()
    assert answers(llm) == expected
    assert team.num_restarts == 1


def test_a_group_that_is_let_go_ends_what_others_wait_for() -> None:
    """Whoever holds the error of an operation that failed: rank 2 waits for rank 0, which has lost rank 1."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    groups = [Group(rank, 3) for rank in range(3)]

    def connect(group: Group) -> None:
        own = TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
        group.connect(own, torch.device("cpu"), seconds=20, message_seconds=20, host="127.0.0.1")

    def receive(group: Group, rank: int) -> WorkerLost | None:
        try:
            group.receive(torch.empty(1), rank)
        except WorkerLost as error:
            return error
        return None

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(connect, groups))
        waiting, losing = pool.submit(receive, groups[2], 0), pool.submit(receive, groups[0], 1)
        groups[1].disconnect()
        held = losing.result(5)
        groups[0].disconnect()
        assert isinstance(waiting.result(5), WorkerLost)
    assert held is not None


def test_a_draw_that_fails_ends_the_sequences_of_its_step_alone(make: Make) -> None:
    """What the ranks do goes on: the steps after it are whole."""
    llm = make(2, max_num_batched_tokens=16)
    expected = answers(llm)
    runner = llm._engine._executor._runner
    read, left = runner._read, [3]

    def fail_once(step: Any, hidden: torch.Tensor) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no room")
        return read(step, hidden)

    runner._read = fail_once
    with pytest.raises(RequestFailed, match="MemoryError: no room") as raised:
        answers(llm)
    ended = [tuple(one.token_ids) for output in raised.value.outputs if output for one in output.outputs]
    whole = [tokens for tokens in ended if len(tokens) == 8]
    assert 0 < len(whole) < len(PROMPTS)
    assert set(whole) <= {tokens for tokens, _ in expected}
    assert answers(llm) == expected
    assert llm._engine._executor._team.num_restarts == 0


def test_an_interrupt_leaves_an_engine_that_goes_on(make: Make) -> None:
    llm = make(2)
    expected = answers(llm)
    shard = llm._engine._executor._runner.model._shard
    hidden, left = shard.hidden, [5]

    def interrupt_once(model_input: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return hidden(model_input)

    shard.hidden = interrupt_once
    with pytest.raises(KeyboardInterrupt):
        answers(llm)
    assert answers(llm) == expected


def test_aborted_requests_give_their_rows_to_others(make: Make) -> None:
    """A row changes hands while a step is on its way that draws for it: what it draws is nobody's."""
    llm = make(2, max_num_seqs=2)
    expected = dict(enumerate(tokens for tokens, _ in answers(llm)))
    engine = llm._engine
    for index, prompt in enumerate(PROMPTS):
        inputs = (TokenSpan(prompt),)
        engine.add(Request(request_id=str(index), inputs=inputs, sampling=GREEDY, arrival_time=float(index)))
    found: dict[int, list[int]] = {index: [] for index in expected}
    while engine.has_work:
        for update in engine.step():
            found[int(update.request_id)] += update.token_ids
        for sequence in engine.scheduler.sequences("1"):
            if sequence.num_placeholders and len(sequence.token_ids) > len(PROMPTS[1]) + 3:
                engine.abort("1")
    assert len(found.pop(1)) == 4
    assert {index: tuple(tokens) for index, tokens in found.items()} == {i: expected[i] for i in found}
    assert llm.stats().overlap.num_waited == {"rows": 1}


def test_ranks_that_torchrun_has_started_meet_in_its_store(
    folder: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(make())
    store = Rendezvous("127.0.0.1", 0, serves=True, seconds=10)  # torchrun's own
    host, port = store.address
    environ = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": "0"}
    options = {"join_seconds": 10, "local_rank": 0, "in_lobby": True}
    rank = threading.Thread(target=follow, args=(host, port, 1), kwargs=options)
    rank.start()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with make_llm(folder, 2) as llm:
        assert answers(llm) == expected
        llm._engine._executor._team._lost = WorkerLost("rank 1 is gone")
        with pytest.raises(WorkerLost, match="rank 1 is gone; torchrun starts all ranks again"):
            answers(llm)
        llm._engine._executor._team._lost = None
    rank.join(10)
    assert not rank.is_alive()
