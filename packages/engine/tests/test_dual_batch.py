"""DualBatch: two halves of a step are the step, one is computed while the other's sums are on their way."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine import LLM, EngineConfig, InvalidConfig, SamplingParams
from octavo_engine.parallel import split
from octavo_engine.parallel.dual_batch import DualBatch, halves
from octavo_engine.parallel.group import Group
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.runner.model_input import GroupInput, ModelInput

NUM_SUMS = 3
PROMPTS = [tuple((7 * i + j) % 97 for j in range(length)) for i, length in enumerate([1, 5, 16, 17, 40])]


def step_of(rows: Sequence[tuple[int, int]]) -> ModelInput:
    """Return a step whose rows compute so many tokens, after so many that were computed before."""
    lengths = [num_tokens for num_tokens, _ in rows]
    num_tokens = sum(lengths)
    return ModelInput(
        token_ids=torch.arange(100, 100 + num_tokens),
        positions=torch.cat([torch.arange(before, before + length) for length, before in rows]),
        query_start_loc=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        seq_lens=torch.tensor([sum(row) for row in rows], dtype=torch.int32),
        max_query_len=max(lengths),
        logits_indices=torch.tensor([num_tokens - 1]),
        groups=tuple(
            GroupInput(
                torch.arange(10 * len(rows), dtype=torch.int32).view(len(rows), 10) + 1000 * group,
                torch.arange(num_tokens) + 5000 * (1 + group),
            )
            for group in range(2)
        ),
        kv_layers=(),
    )


def tokens_of(model_input: ModelInput) -> list[tuple[Any, ...]]:
    """Return everything that a step says of each of its tokens."""
    spans = enumerate(pairwise(model_input.query_start_loc.tolist()))
    return [
        (
            int(model_input.token_ids[token]),
            int(model_input.positions[token]),
            int(model_input.seq_lens[row]) - (stop - token) + 1,  # how many tokens it attends to
            *(tuple(group.block_table[row].tolist()) for group in model_input.groups),
            *(int(group.slot_mapping[token]) for group in model_input.groups),
        )
        for row, (start, stop) in spans
        for token in range(start, stop)
    ]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=5), st.data())
def test_halves_say_of_each_token_what_the_step_says(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    step = step_of(rows)
    num_tokens = len(step.token_ids)
    if num_tokens < 2:
        return
    middle = data.draw(st.integers(1, num_tokens - 1))
    first, second = halves(step, middle)
    assert len(first.token_ids) == middle
    assert tokens_of(first) + tokens_of(second) == tokens_of(step)
    for half in (first, second):
        lengths = half.query_start_loc.diff()
        assert len(half.token_ids) == half.query_start_loc[-1] == lengths.sum()
        assert half.max_query_len == lengths.max()
        assert half.query_start_loc.dtype == torch.int32
        assert len(half.seq_lens) == len(lengths)
        assert all(len(group.block_table) == len(lengths) for group in half.groups)
    assert torch.equal(step.seq_lens, step_of(rows).seq_lens)  # the step itself is as it was


class Backend:
    """In the place of a process group of two ranks: notes what is started and what is waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Any:
        name = str(int(inputs[0][0, 0]))
        self.events.append(f"start {name}")
        for part in outputs[0]:
            part.copy_(inputs[0])
        return Work(lambda: self.events.append(f"wait {name}"))


class Work:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


@pytest.fixture
def group() -> Group:
    group = Group(0, 2)
    group._backend = Backend()
    return group


def compute_of(group: Group, fail: Callable[[int, int], None] = lambda half, sums: None) -> Any:
    def compute(model_input: ModelInput, tokens: slice) -> Tensor:
        x = model_input.token_ids[:, None].float()
        half = int(tokens.start > 0)
        for number in range(NUM_SUMS):
            fail(half, number)
            assert torch.equal(group.sum(x), 2 * x)
        return x

    return compute


def test_a_half_computes_while_the_sums_of_the_other_are_on_their_way(group: Group) -> None:
    step = step_of([(4, 0), (1, 7)])
    dual = DualBatch(group, 4)
    hidden = dual.run(compute_of(group), step)
    assert torch.equal(hidden, step.token_ids[:, None].float())
    assert dual.num_halved == 1
    first, second = 100, 102
    expected = [f"start {first}", f"start {second}"]
    for _ in range(NUM_SUMS - 1):
        expected += [f"wait {first}", f"start {first}", f"wait {second}", f"start {second}"]
    assert group._backend.events == [*expected, f"wait {first}", f"wait {second}"]


def test_a_step_of_few_tokens_is_computed_whole(group: Group) -> None:
    dual = DualBatch(group, 4)
    dual.run(compute_of(group), step_of([(2, 0), (1, 7)]))
    assert dual.num_halved == 0
    assert group._backend.events == ["start 100", "wait 100"] * NUM_SUMS


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("at", range(NUM_SUMS))
def test_what_one_half_raises_ends_both(group: Group, failing: int, at: int) -> None:
    def fail(half: int, number: int) -> None:
        if (half, number) == (failing, at):
            raise RuntimeError("no memory")

    dual = DualBatch(group, 4)
    step = step_of([(4, 0), (1, 7)])
    with pytest.raises(RuntimeError, match="no memory"):
        dual.run(compute_of(group, fail), step)
    begun = [event for event in group._backend.events if event.startswith("start")]
    assert len(begun) == 2 * at + failing  # the other half does not go on alone
    group._backend.events.clear()
    dual.run(compute_of(group), step)  # and the next step runs as ever
    assert len(group._backend.events) == 4 * NUM_SUMS


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
)
def test_the_numbers_are_those_of_whole_steps(
    save_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    check_numbers(save_llama(2), monkeypatch, **sizes)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_the_numbers_of_a_mixture_are_those_of_whole_steps(
    make_mixtral: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, expert_parallel: bool
) -> None:
    folder, _ = make_mixtral(num_key_value_heads=4)
    check_numbers(folder, monkeypatch, tensor_parallel_size=2, expert_parallel=expert_parallel)


def check_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> None:
    """Halved prompts, chunks and decodes have the tokens and log-probabilities of whole ones, to the last bit."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    num_halved: list[int] = []
    run = DualBatch.run

    def counting(dual: DualBatch, compute: Any, model_input: ModelInput) -> Tensor:
        hidden = run(dual, compute, model_input)
        num_halved.append(dual.num_halved)
        return hidden

    monkeypatch.setattr(DualBatch, "run", counting)
    found = []
    for enable_dbo in (False, True):
        options = {"num_blocks": 65, "max_num_seqs": 8, "num_threads": 1, "max_num_batched_tokens": 32}
        with LLM(
            str(folder), **options, **sizes, show_progress=False, enable_dbo=enable_dbo, dbo_token_threshold=3
        ) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, prompt_logprobs=1)
            outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], sampling)
            found.append([(o.prompt_logprobs, o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
        assert bool(num_halved) == enable_dbo
    assert max(num_halved) > 8  # prompts, and steps in which all decode
    assert found[0] == found[1]


def test_what_has_nothing_to_overlap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="enable_dbo needs tensor_parallel_size 2 or more, got 1"):
        EngineConfig(model=str(tmp_path), enable_dbo=True)
    with pytest.raises(InvalidConfig, match="enable_dbo and enable_lora both came"):
        EngineConfig(model=str(tmp_path), enable_dbo=True, tensor_parallel_size=2, enable_lora=True)
    with pytest.raises(InvalidConfig, match="dbo_token_threshold must be at least 2, got 1"):
        EngineConfig(model=str(tmp_path), dbo_token_threshold=1)
