"""Recorded forward passes: the same bits as op by op, in steps of every shape, and when there is none."""

from __future__ import annotations

import random
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
from octavo_engine.runner.forward import RecordedForward
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.testing import Driver, make_runner, random_model, tiny_config

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

        runner.forward = plain
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


@native
def test_packed_models_are_recorded_and_expanded_ones_run_op_by_op() -> None:
    assert isinstance(runner_of(Packed()).forward, RecordedForward)
    assert not isinstance(runner_of(Unquantized()).forward, RecordedForward)


def test_another_backend_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    assert not isinstance(runner_of(Unquantized()).forward, RecordedForward)


def runner_of(quant: QuantMethod[Any]) -> ModelRunner:
    return make_runner(model_of(quant))
