"""Calibrated rounding: GPTQ against its definition and round-to-nearest, AWQ's scales, the walk through a model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import InvalidConfig, UnsupportedModel
from octavo_engine.quant.calibrate.awq import output_error, search_scales
from octavo_engine.quant.calibrate.batches import make_batches
from octavo_engine.quant.calibrate.gptq import GPTQSettings, gptq
from octavo_engine.quant.calibrate.grid import Grid, round_to_nearest
from octavo_engine.quant.calibrate.observed import Observed
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.quant.calibrate.statistics import InputStatistics
from octavo_engine.quant.calibrate.walk import walk
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource


def correlated_inputs(num_tokens: int, size: int, seed: int = 3) -> Tensor:
    """Inputs of a few directions, some of them much larger, as those of a model are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num_tokens, size)) @ rng.standard_normal((size, size)) / size**0.5
    return torch.from_numpy((mixed * rng.lognormal(0, 1, size)).astype(np.float32))


def weight_of(out_features: int, in_features: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).standard_normal((out_features, in_features)).astype(np.float32))


def stated_gptq(weight: np.ndarray, hessian: np.ndarray, settings: GPTQSettings) -> np.ndarray:
    """Round as the paper's equations 2 and 3 say, by the inverse Hessian of what is left: no Cholesky, no blocks."""
    work, size = weight.astype(np.float64), weight.shape[1]
    damped = hessian + settings.damping * np.diag(hessian).mean() * np.eye(size)
    values = np.zeros_like(work)
    for column in range(size):
        inverse = np.linalg.inv(damped[column:, column:])
        if column % settings.group_size == 0:
            group = torch.from_numpy(work[:, column : column + settings.group_size].astype(np.float32))
            grid = Grid.around(group, settings.bits, symmetric=settings.symmetric)
        found = grid.codes(torch.from_numpy(work[:, column].astype(np.float32)))
        values[:, column] = grid.values(found).numpy()
        error = (work[:, column] - values[:, column]) / inverse[0, 0]
        work[:, column:] -= np.outer(error, inverse[0])
    return values


@pytest.mark.parametrize("group_size", [16, 48, 192, 200], ids=lambda size: f"groups of {size}")
def test_gptq_rounds_as_its_equations_say(group_size: int) -> None:
    weight, x = weight_of(24, 192), correlated_inputs(400, 192)
    hessian = InputStatistics.of([x[:100], x[100:]]).hessian
    settings = GPTQSettings(4, group_size, symmetric=False)
    codes = gptq(weight, hessian, settings)
    expected = stated_gptq(weight.numpy(), hessian.numpy(), settings)
    differing = ~np.isclose(codes.values().numpy(), expected, atol=1e-6)
    if group_size <= 128:  # a larger group's grid is made before its last columns are made up for
        assert differing.mean() < 0.01  # where fp32 rounds a tie another way
    error, least = (
        output_error(torch.from_numpy(values).float() - weight, hessian.float())
        for values in (codes.values().numpy(), expected)
    )
    assert error < 1.05 * least


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
def test_gptq_changes_outputs_less_than_rounding_to_nearest(bits: int, symmetric: bool, act_order: bool) -> None:
    weight, x = weight_of(64, 96), correlated_inputs(300, 96)
    settings = GPTQSettings(bits, 32, symmetric, act_order)
    found = gptq(weight, InputStatistics.of([x]).hessian, settings)
    nearest = round_to_nearest(weight, bits, 32, symmetric=symmetric)
    exact = x.double() @ weight.T.double()
    errors = [float((x.double() @ codes.values().T.double() - exact).square().mean()) for codes in (found, nearest)]
    assert errors[0] < errors[1]
    assert int(found.codes.max()) <= 2**bits - 1
    assert sorted(found.groups.tolist()) == [0] * 32 + [1] * 32 + [2] * 32


def test_gptq_without_correlation_is_rounding_to_nearest() -> None:
    weight = weight_of(16, 64)
    found = gptq(weight, torch.eye(64, dtype=torch.float64), GPTQSettings(4, 32, symmetric=False))
    nearest = round_to_nearest(weight, 4, 32, symmetric=False)
    assert torch.equal(found.values(), nearest.values())


def test_inputs_that_are_always_zero_do_not_stop_gptq() -> None:
    weight, x = weight_of(16, 64), correlated_inputs(200, 64)
    x[:, 10:20] = 0
    found = gptq(weight, InputStatistics.of([x]).hessian, GPTQSettings(4, 32, symmetric=False))
    assert float((found.values() - weight).abs().max()) < 1.0
    with pytest.raises(UnsupportedModel, match="not finite"):
        gptq(weight, torch.full((64, 64), float("nan")).double(), GPTQSettings(4, 32, symmetric=False))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_values_are_within_half_a_step_of_weights(symmetric: bool) -> None:
    weight = weight_of(8, 80)
    weight[0, :32] = 0
    weight[1, :32] = weight[1, :32].abs() + 3  # a zero outside of them
    codes = round_to_nearest(weight, 4, 32, symmetric=symmetric)
    steps = codes.scales.float()[codes.groups].T
    assert codes.scales.shape == (3, 8)
    assert int(codes.zeros.min()) >= 1
    assert ((codes.values() - weight).abs() <= steps * 1.01).all()
    assert (codes.values()[0, :32] == 0).all()
    inside = (codes.values() - weight).abs() <= steps * 0.51
    assert inside.float().mean() > 0.95


def test_weights_too_large_for_the_scales_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="needs a scale of"):
        round_to_nearest(torch.full((1, 32), 1.5e9), 4, 32, symmetric=False)


def test_awq_scales_lower_the_error_where_some_inputs_are_large() -> None:
    weight, x = weight_of(64, 96), correlated_inputs(300, 96)
    x[:, ::17] *= 30
    statistics = InputStatistics.of([x])
    scales = search_scales(weight, statistics, QuantizeOptions(method="awq"))
    hessian = statistics.hessian.float()
    scaled = round_to_nearest(weight * scales, 4, 32, symmetric=False).values() / scales
    plain = round_to_nearest(weight, 4, 32, symmetric=False).values()
    assert output_error(scaled - weight, hessian) < 0.7 * output_error(plain - weight, hessian)
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)


def test_the_walk_halts_at_every_linear_and_goes_on_with_what_is_written(tiny_llama: tuple[Path, Any]) -> None:
    folder, oracle = tiny_llama[0], copy.deepcopy(tiny_llama[1])
    quant = Observed()
    model = load_model(FolderSource(folder), quant=quant, batch_invariant=False)
    sequences = [[3, 14, 15, 92], [65, 35, 89, 79], [32, 38, 46, 26]]
    batches = [*make_batches(model, sequences[:2]), *make_batches(model, sequences[2:])]
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))

    modules = {name: module for name, module in oracle.named_modules() if name.endswith("_proj")}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    names = []
    with torch.inference_mode():
        for halt in walk(model, quant, batches):
            start = 0
            for name, num_rows in halt.shards:
                names.append(f"{halt.prefix}{name}")
                rows = halt.parameters.weight[start : start + num_rows]
                rows.mul_(0.9)
                modules[names[-1]].weight.data.mul_(0.9)
                start += num_rows
            seen.clear()
            oracle(torch.tensor(sequences))
            found = torch.cat(halt.inputs)
            expected = seen[names[-1]][0]
            assert torch.allclose(found, expected, atol=1e-4), names[-1]
    for hook in hooks:
        hook.remove()
    assert sorted(names) == sorted(modules)


def test_an_error_on_the_way_reaches_whoever_walks(tiny_llama: tuple[Path, Any]) -> None:
    quant = Observed()
    model = load_model(FolderSource(tiny_llama[0]), quant=quant, batch_invariant=False)
    halts = walk(model, quant, make_batches(model, [[1, 2, 3]]))
    halt = next(halts)
    halt.parameters.weight.resize_(1, 1)
    with pytest.raises(RuntimeError):
        next(halts)
    assert quant.observer is None


def test_perplexity_is_that_of_transformers(tiny_llama: tuple[Path, Any]) -> None:
    folder, oracle = tiny_llama
    sequences = [[(7 * i + 3 * j) % 131 for i in range(20)] for j in range(3)]
    with torch.inference_mode():
        loss = oracle(torch.tensor(sequences), labels=torch.tensor(sequences)).loss
    assert perplexity(load_model(FolderSource(folder)), sequences) == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "best"}, "method 'best' is not one of gptq, awq, rtn"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"method": "awq", "bits": 8}, "method 'awq' is stored in 4 bits, got bits 8"),
        ({"method": "awq", "symmetric": True}, "method 'awq' is stored with zeros"),
        ({"method": "rtn", "act_order": True}, "act_order goes with method 'gptq', got 'rtn'"),
        ({"group_size": 0}, "group_size must be from 1 to"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"num_sequences": 0}, "num_sequences must be at least 1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        QuantizeOptions(**values)
