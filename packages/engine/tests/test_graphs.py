"""Graphs of steps: the inline executor's tokens, on devices that call the work anew or replay native code."""

from __future__ import annotations

import logging
import os
import random
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine import LLM, assembly, sizing
from octavo_engine.batch import ScheduledBatch
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.engine import Engine
from octavo_engine.errors import InvalidConfig
from octavo_engine.executor.overlapped import OverlappedExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.overlap import GraphStats, OverlapStats
from octavo_engine.quant.choose import native_isa
from octavo_engine.runner.device import Graph
from octavo_engine.runner.device_inputs import DeviceInputs
from octavo_engine.runner.device_memory import FreeMemory
from octavo_engine.runner.graph_plan import GraphPlan, GraphShape, graph_sizes
from octavo_engine.runner.late_device import LateDevice
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.overlapped_runner import OverlappedRunner
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import random_model, tiny_config
from octavo_engine.types import SamplingParams
from octavo_kernels import Recording, attention_workspace
from octavo_kvcache import CacheManager
from octavo_kvcache.storage import KVStorage

_SHARED = runpy.run_path(str(Path(__file__).with_name("test_overlapped_runner.py")))
BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, STOP, VOCAB_SIZE, DELAYS = (
    _SHARED[name] for name in ("BLOCK_SIZE", "MAX_NUM_SEQS", "MAX_NUM_BATCHED_TOKENS", "STOP", "VOCAB_SIZE", "DELAYS")
)
decode, enter, request, requests_of, run, setup_of, Setup = (
    _SHARED[name] for name in ("decode", "enter", "request", "requests_of", "run", "setup_of", "Setup")
)

native = pytest.mark.skipif(
    native_isa() is None or os.environ.get("OCTAVO_BACKEND", "cpu") not in ("", "cpu"),
    reason="recordings are of native code",
)
PLAN = GraphPlan((1, 2, 4, 6))


class RecordedGraph:
    """A native program, which reads its inputs by address: no line of Python runs when it is replayed."""

    def __init__(self, work: Callable[[], Tensor], num_bytes: int) -> None:
        assert isinstance(work, partial)
        self._num_tokens, self._num_rows = len(work.args[0].token_ids), len(work.args[0].seq_lens)
        with Recording(self._num_tokens) as recording:
            self.output = work()
        self._program = recording.program
        self.num_bytes = num_bytes

    def replay(self) -> None:
        self._program.run(self._num_tokens, self._num_rows)


@dataclass(slots=True)
class RecordingDevice(LateDevice):
    """A LateDevice whose graphs are what a GPU's are: kernels and addresses."""

    def capture(self, work: Callable[[], Tensor]) -> Graph:  # type: ignore[override]
        if self.capture_error is not None:
            raise self.capture_error
        return RecordedGraph(work, self.graph_bytes)


KINDS = [pytest.param(LateDevice, id="called anew"), pytest.param(RecordingDevice, id="native code", marks=native)]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE))


class SeenModel:
    """A model, and the inputs of all its calls."""

    def __init__(self, model: Llama) -> None:
        self.__dict__.update(_model=model, seen=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, model_input: ModelInput) -> Tensor:
        self.seen.append(model_input)
        hidden = self._model(model_input)
        assert isinstance(hidden, Tensor)
        return hidden


def setup(
    model: Any, device: LateDevice, plan: GraphPlan | None = PLAN, *, num_blocks: int = 200, depth: int = 2
) -> Any:
    """Return an engine with graphs, whose KV cache is full of NaN."""
    storage = KVStorage(model.kv_cache_specs(torch.float32), num_blocks, BLOCK_SIZE)
    for layer in range(storage.num_layers):
        for cache in storage.layer(layer):
            cache.fill_(float("nan"))
    options: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "max_model_len": model.config.max_position_embeddings,
    }
    runner = OverlappedRunner(model, storage, gpu=device, max_in_flight=depth, graphs=plan, **options)
    scheduler = Scheduler(CacheManager(num_blocks, BLOCK_SIZE), eos_token_ids=(STOP,), **options)
    return Setup(Engine(scheduler, OverlappedExecutor(runner)), runner)


def graphs_of(made: Any) -> GraphStats:
    stats: GraphStats = made.engine.overlap_stats.graphs
    return stats


def answers_of(made: Any, *requests: Any) -> Any:
    return run(made.engine, list(requests), {}, random.Random(0))


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (1, 40, (1,)),
        (3, 40, (1, 2, 3)),
        (8, 40, (1, 2, 4, 8)),
        (20, 40, (1, 2, 4, 8, 16, 20)),
        (128, 40, (1, 2, 4, *range(8, 129, 8))),
        (256, 40, (1, 2, 4, *range(8, 257, 8))),
        (512, 40, (1, 2, 4, 8, *range(16, 513, 16))),
        (2000, 40, (1, 2, 4, 8, *range(16, 513, 16))),
        (128, 8, (1, 2, 4, 8, 16, 32, 64, 128)),
        (128, 3, (32, 64, 128)),
        (128, 1, (128,)),
    ],
)
def test_sizes_are_close_and_not_too_many(rows: int, most: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(rows, most) == sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_late", DELAYS)
def test_answers_are_those_of_the_inline_executor(model: Llama, num_late: int, kind: type[LateDevice]) -> None:
    requests, aborts = requests_of(1, free=num_late == 1)
    expected = run(setup_of(model, None).engine, requests, aborts, random.Random(1))
    made = setup(model, kind(num_late=num_late, seed=1), num_blocks=20, depth=3)
    assert run(made.engine, requests, aborts, random.Random(1)) == expected
    assert made.engine.scheduler.counters.num_preemptions > 0
    overlap, graphs = made.engine.overlap_stats, graphs_of(made)
    assert graphs.num_replayed + sum(graphs.num_eager.values()) == overlap.num_overlapped
    assert graphs.num_eager["capture"] == graphs.num_captured <= len(PLAN.sizes)
    assert graphs.num_replayed > 5


@native
def test_a_replay_reads_what_lies_in_the_buffers_now(model: Llama) -> None:
    """Rows come, go and grow while no line of the model's Python runs any more."""
    seen = SeenModel(model)
    made = setup(seen, RecordingDevice(num_late=1))
    first = [request("a", [1, 2, 3], max_tokens=9), request("b", [4], max_tokens=5)]
    second = [request("c", [7, 8], max_tokens=30), request("d", [9] * 6, max_tokens=12)]
    expected = setup_of(model, None)
    assert answers_of(made, *first) == answers_of(expected, *first)
    num_calls, before = len(seen.seen), graphs_of(made)
    assert answers_of(made, *second) == answers_of(expected, *second)
    after = graphs_of(made)
    num_eager = sum(after.num_eager.values()) - sum(before.num_eager.values())
    num_recorded = after.num_captured - before.num_captured
    assert len(seen.seen) - num_calls == num_eager + num_recorded
    assert after.num_replayed - before.num_replayed > 20


def test_graphs_see_their_own_buffers_and_nothing_of_a_step(model: Llama) -> None:
    seen = SeenModel(model)
    made = setup(seen, LateDevice(num_late=1), GraphPlan((4,)))
    answers_of(made, request("a", [1, 2, 3], max_tokens=9), request("b", [4], max_tokens=5), request("c", [6, 7]))
    assert isinstance(made.runner, OverlappedRunner)
    parcels = made.runner._parcels._destination
    begin, end = parcels.data_ptr(), parcels.data_ptr() + parcels.nbytes
    inputs = [one for one in seen.seen if one.max_query_len == 1]
    assert len(inputs) >= 8
    assert all(one is inputs[0] for one in inputs)
    tensors = [inputs[0].token_ids, inputs[0].positions, inputs[0].query_start_loc, inputs[0].seq_lens]
    tensors += [tensor for group in inputs[0].groups for tensor in group]
    assert not any(begin <= tensor.data_ptr() < end for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_fill_a_step_up_change_nothing(model: Llama, kind: type[LateDevice]) -> None:
    """A sequence that left, in whose place a step is filled up, writes to its blocks no more; nor does anybody to 0."""
    made, expected = setup(model, kind(num_late=1), GraphPlan((4,))), setup_of(model, None)
    steps = [
        ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)), enter(1, (4,), (9,)), enter(2, (3,), (11,)))),
        decode(1, (0, 2), (1, 1), (2, 1)),
        decode(2, (0, 3), (1, 2), (2, 2)),
    ]
    for step in steps:
        assert made.runner.execute(step) == expected.runner.execute(step)
    others = [block for block in range(200) if block not in (5, 6)]
    caches = [cache for layer in range(2) for cache in made.runner.storage.layer(layer)]
    for cache in caches:
        cache[others] = float("nan")
    lone = [replace(decode(3, (0, 4)), finished=(1, 2)), decode(4, (0, 5)), decode(5, (0, 6))]
    for step in lone:
        assert made.runner.execute(step) == expected.runner.execute(step)
    assert graphs_of(made) == GraphStats(1, 4, {"prompt": 1, "capture": 1})
    for cache in caches:
        assert cache[others].isnan().all()
        assert cache[5].isfinite().all()


def test_all_steps_find_their_input_at_the_same_addresses() -> None:
    sizes = {"max_num_tokens": 12, "max_num_seqs": 6, "max_num_blocks": 5, "num_groups": 2, "block_size": 4}
    inputs = DeviceInputs(**sizes, kv_layers=(), device=torch.device("cpu"))
    shape = GraphShape(4, 4, 1)
    small, graph = inputs.of_step(GraphShape(7, 2, 6), 9), inputs.of_graph(shape)
    assert inputs.of_graph(GraphShape(4, 4, 1)) is graph
    assert [tuple(table.shape) for table, _ in small.groups] == [(2, 3)] * 2
    assert [tuple(table.shape) for table, _ in graph.groups] == [(4, 5)] * 2
    assert [len(slots) for _, slots in small.groups + graph.groups] == [7, 7, 4, 4]
    assert (len(small.query_start_loc), len(graph.query_start_loc), small.max_query_len) == (3, 5, 6)
    written = inputs.tensors(shape)
    for name in ("token_ids", "positions", "query_start_loc", "seq_lens", "logits_indices"):
        assert len({getattr(one, name).data_ptr() for one in (written, small, graph)}) == 1, name
    for value, tensor in enumerate(written, 1):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in (*graph.groups[1], graph.seq_lens)] == [[6], [7], [4]]
    assert small.token_ids.tolist() == [1] * 4 + [0] * 3
    assert small.groups[1].block_table.tolist() == [[6] * 3] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_the_largest_graph_has_run_op_by_op(model: Llama, kind: type[LateDevice]) -> None:
    made, expected = setup(model, kind(), GraphPlan((1, 2))), setup_of(model, None)
    step = ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5,)), enter(1, (4,), (9,)), enter(2, (3,), (11,))))
    for one in (step, decode(1, (0, 2), (1, 1), (2, 1)), decode(2, (0, 3), (1, 2)), decode(3, (1, 3))):
        assert made.runner.execute(one) == expected.runner.execute(one)
    assert graphs_of(made) == GraphStats(2, 0, {"prompt": 1, "rows": 1, "capture": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_that_fails_is_said_once_and_counted(
    model: Llama, kind: type[LateDevice], caplog: pytest.LogCaptureFixture
) -> None:
    device = kind(num_late=1)
    made, requests = setup(model, device), [request("a", [1, 2, 3]), request("b", [4], max_tokens=3)]
    alone = request("c", [1, 2], max_tokens=4)
    expected = setup_of(model, None)
    assert answers_of(made, alone) == answers_of(expected, alone)
    before = graphs_of(made)
    assert (before.num_captured, before.num_replayed) == (1, 2)
    device.capture_error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        assert answers_of(made, *requests) == answers_of(expected, *requests)
    (warning,) = caplog.messages
    assert "of 2 tokens, 2 rows cannot be captured as a graph: RuntimeError: operation not permitted" in warning
    assert "enforce_eager=True" in warning
    after = graphs_of(made)
    assert after.num_captured == 1
    assert after.num_eager["capture"] == 2  # the one that was tried
    assert after.num_eager["failed"] >= 1
    assert after.num_replayed > before.num_replayed  # the graph that there is serves on


@native
def test_a_model_that_cannot_be_captured_runs_op_by_op(model: Llama, caplog: pytest.LogCaptureFixture) -> None:
    class Computes(SeenModel):
        def __call__(self, model_input: ModelInput) -> Tensor:
            return super().__call__(model_input) + 0.0

    made, one = setup(Computes(model), RecordingDevice()), request("a", [1, 2, 3])
    with caplog.at_level(logging.WARNING):
        assert answers_of(made, one) == answers_of(setup_of(model, None), one)
    (warning,) = caplog.messages
    assert "NotRecordable: Recording: torch computed aten.add" in warning
    assert graphs_of(made) == GraphStats(0, 0, {"prompt": 1, "capture": 1, "failed": 4})


def test_no_more_is_captured_once_what_was_set_aside_is_taken(model: Llama, caplog: pytest.LogCaptureFixture) -> None:
    plan = GraphPlan((1, 2, 3), num_bytes=150)
    made, expected = setup(model, LateDevice(graph_bytes=100), plan), setup_of(model, None)
    step = ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)), enter(1, (4,), (9, 10)), enter(2, (3,), (11,))))
    steps = [step, decode(1, (0, 2)), decode(2, (0, 3), (1, 1)), decode(3, (1, 2), (2, 1)), decode(4, (1, 3))]
    steps += [decode(5, (0, 4), (1, 4), (2, 2))]
    with caplog.at_level(logging.WARNING):
        for one in steps:
            assert made.runner.execute(one) == expected.runner.execute(one)
    (warning,) = caplog.messages
    assert "2 graphs have taken 0.00 GiB, more than the 0.00 GiB set aside" in warning
    assert graphs_of(made) == GraphStats(2, 2, {"prompt": 1, "capture": 2, "memory": 1})


def test_an_executor_adds_the_graphs_of_its_runners_up(model: Llama) -> None:
    executor = OverlappedExecutor(None)
    for _ in range(2):
        executor.use(setup(model, LateDevice()).runner)
        for step in (ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5,)),)), decode(1, (0, 2)), decode(2, (0, 3))):
            executor.submit(step).result()
    executor.use(None)
    assert executor.overlap == OverlapStats(6, {}, GraphStats(2, 2, {"capture": 2, "prompt": 2}))


class FakeMeter:
    """A device with some free bytes, of which a step holds some."""

    def __init__(self) -> None:
        self.num_tries = 0

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        self.num_tries += 1
        return 1 << 20


def plan_of(model: Llama, meter: FakeMeter | None, **options: Any) -> GraphPlan | None:
    config = EngineConfig(**{"max_num_mixed_graphs": 0, **options})
    return GraphPlan.of(config, model, kv_dtype=torch.float32, device=torch.device("cpu"), meter=meter)


def test_memory_is_set_aside_for_as_many_graphs_as_there_may_be(model: Llama) -> None:
    meter = FakeMeter()
    many, few = plan_of(model, meter, max_num_seqs=64), plan_of(model, meter, max_num_seqs=64, max_num_graphs=2)
    assert many is not None
    assert few is not None
    assert meter.num_tries == 2
    assert (many.sizes, few.sizes) == ((1, 2, 4, *range(8, 65, 8)), (32, 64))
    assert many.num_bytes is not None
    assert few.num_bytes is not None
    workspace = attention_workspace(64, 256, 4, 2, 16)
    tables = 3 * 64 * (256 // 16) * 4
    outputs = 32 * 4  # of a token
    assert few.num_bytes == 2 * ((1 << 20) + workspace) + tables + 96 * outputs + 2 * (8 << 20)
    assert many.num_bytes - few.num_bytes == 9 * (8 << 20) + (sum(many.sizes) - 96) * outputs


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "op by op"])
def test_an_engine_captures_anew_after_it_has_slept(
    make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    monkeypatch.setattr(assembly, "meter_of", lambda _: FakeMeter())
    monkeypatch.setattr(assembly, "_overlapping", lambda _: LateDevice(num_late=1))
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    options: dict[str, Any] = {"num_blocks": 40, "max_num_seqs": 4, "enforce_eager": enforce_eager}
    options["max_num_mixed_graphs"] = 1  # of 512 tokens
    answers, found = [], []
    with LLM(str(make_gguf()), show_progress=False, **options) as llm:
        for _ in range(2):
            answers.append(llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling)[0].outputs)
            found.append(llm.stats().overlap.graphs)
            llm.sleep(level=1)
            llm.wake_up()
    assert answers[0] == answers[1]
    once = GraphStats() if enforce_eager else GraphStats(2, 4, {"capture": 2})
    assert found == [once, once + once]


def test_nothing_is_captured_where_it_is_not_wanted_or_cannot_be(model: Llama) -> None:
    assert plan_of(model, FakeMeter(), enforce_eager=True) is None
    assert plan_of(model, None) is None
    assert plan_of(model, FakeMeter(), tensor_parallel_size=2) is None
    assert plan_of(model, FakeMeter(), pipeline_parallel_size=2) is None
    mixture = replace(tiny_config(), architecture="MixtralForCausalLM", num_experts=3, num_experts_per_token=2)
    assert plan_of(random_model(mixture), FakeMeter()) is None
    meter = FakeMeter()
    assert plan_of(model, meter, num_blocks=9, max_num_seqs=2) == GraphPlan((1, 2), max_num_seqs=2)
    assert meter.num_tries == 0
    with pytest.raises(InvalidConfig, match="max_num_graphs must be at least 1, got 0"):
        EngineConfig(max_num_graphs=0)


def test_the_kv_cache_leaves_the_graphs_their_memory(
    make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the plan: the cache itself would be the host's, without a limit of its own."""
    meter, found = FakeMeter(), list[FreeMemory]()

    def keep(*_: Any, free: FreeMemory, **__: Any) -> None:
        found.append(free)
        raise InvalidConfig("far enough")

    for module in (sizing, assembly):
        monkeypatch.setattr(module, "meter_of", lambda _: meter)
    monkeypatch.setattr(assembly, "plan_cache", keep)
    for enforce_eager in (True, False):
        sizes = {"max_num_seqs": 64, "max_num_graphs": 2, "max_num_mixed_graphs": 3}
        config = EngineConfig(model=str(make_gguf()), enforce_eager=enforce_eager, **sizes)
        with pytest.raises(InvalidConfig, match="far enough"):
            build_engine(config)
    assert meter.num_tries == 1 + 3  # the largest step, and with graphs one of each kind
    assert found[0].num_bytes - found[1].num_bytes > 5 * (8 << 20)
