"""Recorded forward passes: the same bits as op by op, in steps of every shape, and when there is none."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

import octavo_kernels
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama
from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.forward import Likeliest, OpByOp, RecordedForward
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.testing import Driver, make_runner, random_model, tiny_config
from octavo_engine.types import SamplingParams

native = pytest.mark.skipif(octavo_kernels.cpu_isa() == "none", reason="no native kernels")

STEPS = [{0: 9, 1: 1}, {0: 1, 1: 1, 2: 30}, {0: 1, 1: 1, 2: 7}, {0: 1, 1: 1, 2: 1}, {1: 1}]


def model_of(quant: QuantMethod[Any], config: ModelConfig | None = None) -> Llama:
    model = random_model(config or tiny_config(), quant=quant)
    assert isinstance(model, Llama)
    return model


def hidden_states(model: Llama, *, op_by_op: bool) -> list[Tensor]:
    """Drive three prompts through chunks and decodes; return the hidden states of every step."""
    seen: list[Tensor] = []

    def watch(_: ModelInput, hidden: Tensor) -> None:
        seen.append(hidden.clone())

    runner = make_runner(model, watch=watch)
    if op_by_op:

        def plain(model_input: ModelInput) -> Tensor:
            hidden = model(model_input)
            watch(model_input, hidden)
            return hidden

        runner.forward = OpByOp(plain, model.greedy)
    driver = Driver(runner)
    source = random.Random(5)
    for row, length in enumerate((9, 1, 37)):
        driver.add(row, [source.randrange(model.config.vocab_size) for _ in range(length)])
    for step in STEPS:
        driver.step(step)
    return seen


@native
def test_a_recorded_step_has_the_bits_of_one_run_op_by_op() -> None:
    model = model_of(Packed())
    recorded, plain = hidden_states(model, op_by_op=False), hidden_states(model, op_by_op=True)
    assert [len(hidden) for hidden in recorded] == [sum(step.values()) for step in STEPS]
    for ours, expected in zip(recorded, plain, strict=True):
        assert torch.equal(ours, expected)


@native
def test_a_tokens_bits_do_not_depend_on_its_company() -> None:
    model = model_of(Packed())
    together = hidden_states(model, op_by_op=False)
    alone: list[Tensor] = []
    driver = Driver(make_runner(model, watch=lambda _, hidden: alone.append(hidden.clone())), seed=3)
    source = random.Random(5)
    prompt = [source.randrange(model.config.vocab_size) for _ in range(9)]
    driver.add(0, prompt)
    driver.step({0: 9})
    driver.step({0: 1})
    assert torch.equal(alone[0], together[0][:9])
    assert torch.equal(alone[1][0], together[1][30])  # behind the prompt that entered in that step


def drive(driver: Driver, seed: int, num_steps: int) -> list[tuple[Any, ...]]:
    """Drive rows through random chunks, decodes, forks, ends and tables that change; return what each step answers.

    The same seed makes the same schedule, whatever the runner answers.
    """
    source, answers = random.Random(seed), []
    for _ in range(num_steps):
        rows, finished = driver.rows, []
        if rows and source.random() < 0.1:
            finished.append(source.choice(sorted(rows)))
        staying = [row for row in rows if row not in finished]
        finished += [row for row in staying if len(rows[row].token_ids) > 60]
        staying = [row for row in staying if row not in finished]
        scheduled = {}
        for row in staying:
            num_left = len(rows[row].token_ids) - rows[row].num_computed_tokens
            scheduled[row] = num_left if source.random() < 0.7 else source.randint(1, num_left)
        if source.random() < 0.1:  # a part of the rows, in another order
            scheduled = {row: scheduled[row] for row in source.sample(staying, source.randint(0, len(staying)))}
        free = [row for row in range(6) if row not in rows]
        if free and (not scheduled or source.random() < 0.15):
            row = free[0]
            prompt = [source.randrange(97) for _ in range(source.randint(1, 30))]
            driver.add(row, prompt, SamplingParams(temperature=0, presence_penalty=float(source.random() < 0.2)))
            scheduled[row] = source.randint(1, len(prompt))
            if scheduled[row] == len(prompt) and len(free) > 1:
                driver.add(free[1], prompt, fork_of=row)
                scheduled[free[1]] = 0
        _, output = driver.run(scheduled, finished)
        answers.append((scheduled, output.token_ids, output.errors))
    return answers


class Filled:
    """A view of what a runner's buffers held in each step, taken as the model is run on them."""

    def __init__(self, runner: ModelRunner) -> None:
        self.steps: list[list[Any]] = []
        self._forward = runner.forward
        runner.forward = self

    def __call__(self, model_input: ModelInput) -> Tensor:
        self._keep(model_input)
        return self._forward(model_input)

    def greedy(self, model_input: ModelInput) -> Likeliest:
        self._keep(model_input)
        return self._forward.greedy(model_input)

    def threads(self) -> AbstractContextManager[None]:
        return self._forward.threads()

    def _keep(self, given: ModelInput) -> None:
        ((block_table, slot_mapping),) = given.groups
        own = [given.token_ids, given.positions, given.query_start_loc, given.seq_lens, given.logits_indices]
        num_blocks = (given.seq_lens + 3) // 4  # entries behind a sequence's blocks mean nothing
        tables = [table[:num] for table, num in zip(block_table.tolist(), num_blocks.tolist(), strict=True)]
        self.steps.append([*(t.tolist() for t in (*own, slot_mapping)), tables, given.max_query_len])


@pytest.mark.parametrize("seed", range(6))
def test_decode_steps_answer_as_ragged_steps_op_by_op(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model = model_of(Packed())
    fast = Driver(make_runner(model, num_blocks=256))
    seen = Filled(fast.runner)
    answers = drive(fast, seed, 80)
    plain = Driver(make_runner(model, num_blocks=256))
    plain.runner.forward = OpByOp(model, model.greedy)
    expected = Filled(plain.runner)
    monkeypatch.setattr(DecodeStep, "of", lambda _: None)
    assert drive(plain, seed, 80) == answers
    assert seen.steps == expected.steps


def test_a_row_whose_logits_are_no_numbers_fails_alone() -> None:
    driver = Driver(make_runner(model_of(Packed())))
    for row in range(3):
        driver.add(row, [5, 6, 7 + row])
    driver.step({0: 3, 1: 3, 2: 3})
    driver.step({0: 1, 1: 1, 2: 1})
    k_cache, _ = driver.runner.storage.layer(0)
    k_cache[driver.rows[1].block_ids[0]] = float("nan")
    _, output = driver.run({0: 1, 1: 1, 2: 1})
    assert list(output.errors or {}) == [1]
    assert [len(ids) for ids in output.token_ids] == [1, 0, 1]


@native
def test_packed_models_are_recorded_and_expanded_ones_run_op_by_op() -> None:
    assert isinstance(runner_of(Packed()).forward, RecordedForward)
    assert not isinstance(runner_of(Unquantized()).forward, RecordedForward)


def test_another_backend_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    assert not isinstance(runner_of(Unquantized()).forward, RecordedForward)


def runner_of(quant: QuantMethod[Any]) -> ModelRunner:
    return make_runner(model_of(quant))


@native
@pytest.mark.parametrize(("quant", "expected"), [(Packed(), (1, 2)), (Unquantized(), (2, 2))], ids=["native", "torch"])
def test_torch_keeps_to_one_thread_in_a_recorded_step_alone(
    quant: QuantMethod[Any], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    update = InputBuilder.build

    def watched(*arguments: Any) -> ModelInput:
        seen.append((torch.get_num_threads(), octavo_kernels.num_native_threads()))
        return update(*arguments)

    monkeypatch.setattr(InputBuilder, "build", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        driver = Driver(make_runner(model_of(quant)))
        driver.add(0, [1, 2, 3])
        driver.step({0: 3})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [expected]
