"""Graphs of steps in which sequences compute several tokens, beside others that compute one.

Three devices replay them: one calls the work anew, one replays native code, and one, in the session of Triton's
interpreter, replays what a GPU would: kernels, and torch's ops with the memory that they had.
"""

from __future__ import annotations

import itertools
import os
import random
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo_engine.batch import ScheduledBatch
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.models.llama import Llama
from octavo_engine.overlap import GraphStats
from octavo_engine.runner.device import Graph
from octavo_engine.runner.device_rows import DeviceRows
from octavo_engine.runner.graph_plan import GraphPlan, GraphShape, mixed_sizes
from octavo_engine.runner.late_device import LateDevice
from octavo_engine.testing import random_model, tiny_config
from octavo_kernels import StepTensors, attention_workspace

_SHARED = runpy.run_path(str(Path(__file__).with_name("test_graphs.py")))
RecordingDevice, native, setup, graphs_of, answers_of, setup_of, plan_of, FakeMeter = (
    _SHARED[name]
    for name in (
        "RecordingDevice", "native", "setup", "graphs_of", "answers_of", "setup_of", "plan_of", "FakeMeter",
    )
)  # fmt: skip
request, requests_of, run, enter, decode, DELAYS, VOCAB_SIZE = (
    _SHARED[name] for name in ("request", "requests_of", "run", "enter", "decode", "DELAYS", "VOCAB_SIZE")
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("OCTAVO_BACKEND") == "triton"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the session triton-interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="an interpreter's time is spent on its own device")
PLAN = GraphPlan((1, 2, 4, 6), mixed_sizes=(8, 16), max_num_seqs=6)


class Replay(TorchDispatchMode):
    """Notes torch's ops and Triton's kernels with their tensors, and does the same again on the same memory.

    Nothing that Python would decide by a shape or a number is decided again. An op that looks at a value fails, as
    under a GPU's capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self._again: list[Callable[[], object]] = []
        self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_kernel:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.item.default:
            raise RuntimeError("operation not permitted when stream is capturing: a value was read")
        result = func(*args, **kwargs)
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in given]
        if func._schema.is_mutable:
            self._again.append(lambda: func(*args, **kwargs))
        elif fresh and "empty" not in func.name():

            def compute() -> None:
                for kept, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                    kept.copy_(new)

            self._again.append(compute)
        return result

    def kernel(self, launch: Callable[[], object]) -> None:
        self._again.append(launch)
        self._in_kernel = True
        try:
            launch()
        finally:
            self._in_kernel = False

    def replay(self) -> None:
        for do in self._again:
            do()


class ReplayedGraph:
    def __init__(self, work: Callable[[], Tensor], num_bytes: int) -> None:
        from triton.runtime.interpreter import GridExecutor

        call, self._replay = GridExecutor.__call__, Replay()
        self.num_bytes = num_bytes

        def noted(executor: Any, *arguments: Any, **options: Any) -> None:
            self._replay.kernel(lambda: call(executor, *arguments, **options))

        GridExecutor.__call__ = noted
        try:
            with self._replay:
                self.output = work()
        finally:
            GridExecutor.__call__ = call
        self.output.fill_(float("nan"))

    def replay(self) -> None:
        self._replay.replay()


@dataclass(slots=True)
class ReplayingDevice(LateDevice):
    """A LateDevice whose graphs hold ops and kernels of Triton's interpreter."""

    def capture(self, work: Callable[[], Tensor]) -> Graph:  # type: ignore[override]
        return ReplayedGraph(work, self.graph_bytes)


KINDS = [
    pytest.param(LateDevice, id="called anew", marks=not_interpreted),
    pytest.param(RecordingDevice, id="native code", marks=[native, not_interpreted]),
    pytest.param(ReplayingDevice, id="kernels", marks=interpreted),
]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE))


@pytest.fixture
def expected_of(model: Llama, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what some steps answer without a device, by the reference where kernels are interpreted."""

    def answers(*steps: ScheduledBatch) -> list[Any]:
        with monkeypatch.context() as patched:
            if INTERPRETED:
                patched.setenv("OCTAVO_BACKEND", "reference")
                plain = random_model(tiny_config(vocab_size=VOCAB_SIZE))
            else:
                plain = model
            runner = setup_of(plain, None).runner
            return [runner.execute(step) for step in steps]

    return answers


def mixed_steps() -> list[ScheduledBatch]:
    """Prompts, then decode rows beside chunks of other prompts, with rows that come and go; all but one fit 8 or 16."""
    first = ScheduledBatch(step_id=0, new=(enter(0, (1, 2, 3), (5, 6)), enter(1, (4, 9), (9, 10))))
    second = decode(1, (0, 3), (1, 2))
    second = ScheduledBatch(step_id=1, new=(enter(2, (3, 8, 5, 7, 2, 6, 11), (12, 13)),), cached=second.cached)
    third = decode(2, (0, 4), (2, 7), (1, 3))
    third = ScheduledBatch(step_id=2, new=(enter(3, (21, 22, 23), (14,)),), cached=third.cached)
    fourth = decode(3, (2, 8), (3, 3))
    fourth = ScheduledBatch(
        step_id=3, new=(enter(4, tuple(range(30, 42)), (20, 21, 22)),), cached=fourth.cached, finished=(0, 1)
    )
    fifth = ScheduledBatch(
        step_id=4, new=(enter(0, (50, 51), (5,)),), cached=decode(4, (4, 12)).cached, finished=(2, 3)
    )
    return [first, second, third, fourth, fifth, decode(5, (0, 2), (4, 13))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows that a step lacks, which hold anything
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_step_is_replayed_with_the_tokens_of_the_reference(
    model: Llama, expected_of: Callable[..., Any], kind: type[LateDevice]
) -> None:
    made = setup(model, kind(num_late=1), PLAN)
    for step, expected in zip(mixed_steps(), expected_of(*mixed_steps()), strict=True):
        assert made.runner.execute(step) == expected
    assert graphs_of(made) == GraphStats(3, 3, {"capture": 3})  # of 8 and 16 tokens, and of two rows that decode


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("num_late", DELAYS)
def test_answers_are_those_of_the_inline_executor(model: Llama, num_late: int, kind: type[LateDevice]) -> None:
    requests, aborts = requests_of(4, free=num_late == 1)
    expected = run(setup_of(model, None).engine, requests, aborts, random.Random(1))
    made = setup(model, kind(num_late=num_late, seed=1), PLAN, num_blocks=20, depth=3)
    assert run(made.engine, requests, aborts, random.Random(1)) == expected
    overlap, graphs = made.engine.overlap_stats, graphs_of(made)
    assert graphs.num_replayed + sum(graphs.num_eager.values()) == overlap.num_overlapped
    assert set(graphs.num_eager) <= {"capture", "tokens"}
    assert graphs.num_captured >= 3
    assert graphs.num_replayed > 5


@pytest.mark.parametrize("forgotten", ["token_ids", "positions", "block_tables", "slot_mapping"])
@native
@not_interpreted
def test_every_buffer_is_read_by_a_replay(
    model: Llama, expected_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """What stays in one of them from the step before shows in the tokens. (Wrong lengths would reach beyond memory.)"""
    expand, made = DeviceRows.expand, setup(model, RecordingDevice(num_late=1), PLAN)

    def forget(self: DeviceRows, plan: Any, size: Any, out: StepTensors) -> None:
        kept = getattr(out, forgotten)
        before = kept.clone()
        expand(self, plan, size, out)
        shape = PLAN.fit(size.num_tokens, size.num_seqs, size.max_query_len)
        if size.max_query_len > 1 and shape in made.runner._graphs._graphs:
            kept.copy_(before)

    monkeypatch.setattr(DeviceRows, "expand", forget)
    steps = mixed_steps()
    assert [made.runner.execute(step) for step in steps] != expected_of(*steps)


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [
        (1, 24, ()),
        (1024, 0, ()),
        (10, 24, (10,)),
        (60, 24, (16, 20, 24, 28, 32, 40, 48, 56, 60)),
        (1024, 12, (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
        (1024, 6, (16, 32, 64, 128, 256, 512)),
        (1024, 2, (256, 512)),
    ],
)
def test_sizes_of_mixed_steps(tokens: int, most: int, sizes: tuple[int, ...]) -> None:
    assert mixed_sizes(tokens, most) == sizes
    full = mixed_sizes(1024, 24)
    assert len(full) == 21
    assert all(after <= before * 1.25 for before, after in itertools.pairwise(full))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_step_of_more_tokens_than_the_largest_graph_runs_op_by_op(
    model: Llama, expected_of: Callable[..., Any], kind: type[LateDevice]
) -> None:
    steps = [ScheduledBatch(step_id=0, new=(enter(0, tuple(range(30, 50)), (5, 6, 7, 8, 9)),))]
    made = setup(model, kind(), PLAN)
    assert [made.runner.execute(step) for step in steps] == expected_of(*steps)
    assert graphs_of(made) == GraphStats(0, 0, {"tokens": 1})


@not_interpreted
def test_memory_is_set_aside_for_both_kinds_of_graphs(model: Llama) -> None:
    meter = FakeMeter()
    without = plan_of(model, meter, max_num_seqs=8)
    both = plan_of(model, meter, max_num_seqs=8, max_num_batched_tokens=64, max_num_mixed_graphs=4)
    assert meter.num_tries == 1 + 2
    assert both.mixed_sizes == (16, 32, 64)
    assert both.shapes[-1] == GraphShape(64, 8, 64)
    decode, mixed = (attention_workspace(8, 256, 4, 2, 16, max_query_len=most) for most in (1, 64))
    tables, outputs = 3 * 8 * (256 // 16) * 4, sum(both.sizes + both.mixed_sizes) * 32 * 4
    assert decode < mixed
    assert both.num_bytes == 2 * ((1 << 20) + mixed) + tables + outputs + (len(both.sizes) + 3) * (8 << 20)
    assert both.num_bytes > without.num_bytes
    with pytest.raises(InvalidConfig, match="max_num_mixed_graphs must be at least 0, got -1"):
        EngineConfig(max_num_mixed_graphs=-1)
