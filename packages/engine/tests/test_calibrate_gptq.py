"""GPTQ against its definition and round-to-nearest, the grids it rounds to, and the statistics it goes by."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.calibrate.gptq import NEARER, SHIFTS, SHRINKS, GPTQSettings, gptq
from octavo_engine.quant.calibrate.grid import Grid, round_to_nearest
from octavo_engine.quant.calibrate.statistics import InputStatistics


def correlated_inputs(num_tokens: int, size: int, seed: int = 3) -> Tensor:
    """Inputs of a few directions, some of them much larger, as those of a model are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num_tokens, size)) @ rng.standard_normal((size, size)) / size**0.5
    return torch.from_numpy((mixed * rng.lognormal(0, 1, size)).astype(np.float32))


def weight_of(out_features: int, in_features: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).standard_normal((out_features, in_features)).astype(np.float32))


def output_error(difference: Tensor, hessian: Tensor) -> float:
    return float(((difference.double() @ hessian.double()) * difference).sum())


def stated_grid(work: np.ndarray, inverses: list[np.ndarray], settings: GPTQSettings) -> Grid:
    """Return for each output the grid of least cost, by rounding the group [out_features, size] by each of them."""
    found = Grid.around(torch.from_numpy(work.astype(np.float32)), settings.bits, symmetric=settings.symmetric)
    for shrinks, shifts in ((SHRINKS, SHIFTS), (NEARER, (0,))):
        tried = found.others(shrinks, shifts)
        costs = []
        for scales, zeros in zip(tried.scales.numpy(), tried.zeros.numpy(), strict=True):
            left, cost = work.copy(), np.zeros(len(work))
            for column, inverse in enumerate(inverses):
                values = (np.rint(left[:, column] / scales) + zeros).clip(0, found.most) - zeros
                error = left[:, column] - values * scales
                cost += error**2 / inverse[0, 0]
                left[:, column:] -= np.outer(error / inverse[0, 0], inverse[0, : len(inverses) - column])
            costs.append(cost)
        least = torch.from_numpy(np.argmin(costs, axis=0))[None]
        found = Grid(tried.scales.gather(0, least)[0], tried.zeros.gather(0, least)[0], found.most)
    return found


def stated_gptq(weight: np.ndarray, hessian: np.ndarray, settings: GPTQSettings) -> np.ndarray:
    """Round as the paper's equations 2 and 3 say, by the inverse Hessian of what is left: no Cholesky, no blocks."""
    work, size = weight.astype(np.float64), weight.shape[1]
    damped = hessian + settings.damping * np.diag(hessian).mean() * np.eye(size)
    inverses = [np.linalg.inv(damped[column:, column:]) for column in range(size)]
    values = np.zeros_like(work)
    for column, inverse in enumerate(inverses):
        if column % settings.group_size == 0:
            inputs = slice(column, column + settings.group_size)
            grid = stated_grid(work[:, inputs], inverses[inputs], settings)
        found = grid.codes(torch.from_numpy(work[:, column].astype(np.float32)))
        values[:, column] = grid.values(found).numpy()
        error = (work[:, column] - values[:, column]) / inverse[0, 0]
        work[:, column:] -= np.outer(error, inverse[0])
    return values


@pytest.mark.parametrize("group_size", [8, 24, 72, 80], ids=lambda size: f"groups of {size}")
def test_gptq_rounds_as_its_equations_say(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo_engine.quant.calibrate.gptq._BLOCK", 48)
    weight, x = weight_of(24, 72), correlated_inputs(400, 72)
    hessian = InputStatistics.of([x[:100], x[100:]]).hessian
    settings = GPTQSettings(4, group_size, symmetric=False)
    codes = gptq(weight, hessian, settings)
    expected = stated_gptq(weight.numpy(), hessian.numpy(), settings)
    differing = ~np.isclose(codes.values().numpy(), expected, atol=1e-6)
    if group_size <= 48:  # a larger group's grid is made before its last columns are made up for
        assert differing.mean() < 0.01  # where fp32 rounds a tie another way
    error, least = (
        output_error(torch.from_numpy(values) - weight, hessian) for values in (codes.values().numpy(), expected)
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
    by_group = Grid(found.scales.float()[found.groups].T, found.zeros.float()[found.groups].T, 15)
    assert torch.equal(by_group.codes(weight), found.codes.T.float())
    nearest = round_to_nearest(weight, 4, 32, symmetric=False)
    assert (found.values() - weight).square().sum() < 0.95 * (nearest.values() - weight).square().sum()


def test_a_few_huge_tokens_do_not_drown_the_others() -> None:
    weight, x = weight_of(64, 96), correlated_inputs(300, 96)
    huge = x.clone()
    huge[::100] = 3e3 * correlated_inputs(3, 96, seed=5)
    settings = GPTQSettings(4, 32, symmetric=False)
    hessians = {name: InputStatistics.of([values]).hessian for name, values in (("plain", x), ("huge", huge))}
    hessians["drowned"] = (huge.double().T @ huge.double()) / len(huge)
    kept = (torch.arange(300) % 100 != 0).float()[:, None] * x
    ordinary = kept.T @ kept / 297
    errors = {
        name: output_error(gptq(weight, hessian, settings).values() - weight, ordinary)
        for name, hessian in hessians.items()
    }
    assert errors["huge"] < 1.5 * errors["plain"]
    assert errors["drowned"] > 2 * errors["huge"]  # what is guarded against


def test_statistics_are_the_mean_outer_product_and_the_same_in_parts() -> None:
    x = correlated_inputs(300, 24)
    x[7] *= 1e4
    whole, parts = InputStatistics.of([x]), InputStatistics.of([x[:100], x[100:]])
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.mean_abs, x.abs().mean(dim=0))
    squares = x.double().square().sum(dim=1)
    most = 10 * squares.median()
    shrunk = x.double() * (most / squares).clamp(max=1).sqrt()[:, None]
    assert float(squares[7]) > float(most)
    torch.testing.assert_close(whole.hessian, shrunk.T @ shrunk / 300, rtol=1e-4, atol=1e-5)
    assert not InputStatistics.of([torch.zeros(5, 24)]).hessian.any()
    mostly = torch.zeros(5, 24)
    mostly[1] = 2.0
    assert (InputStatistics.of([mostly]).hessian == 0.8).all()  # a median of 0 shrinks none


def searched(weight: np.ndarray, importance: np.ndarray, zeros: list[int]) -> float:
    """Return the least weighed error of one group of weights in 4 bits, by trying 3000 scales for each zero."""
    span = max(float(weight.max()), 0.0) - min(float(weight.min()), 0.0)
    scales = (np.linspace(0.4, 1.4, 3000) * span / 15).astype(np.float16).astype(np.float64)[:, None]
    found = []
    for zero in zeros:
        values = scales * (np.clip(np.rint(weight / scales) + zero, 0, 15) - zero)
        found.append(float((np.square(values - weight) * importance).sum(axis=1).min()))
    return min(found)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("lies_on", ["nothing", "a grid with half a zero"])
def test_a_fitted_grid_is_nearly_the_best_there_is(symmetric: bool, lies_on: str) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((16, 32))
    if lies_on != "nothing":
        weight = 0.1 * (rng.integers(0, 16, (16, 32)) - 7.5)
    importance = rng.lognormal(0, 1, 32)
    group, costs = torch.from_numpy(weight).float(), torch.from_numpy(importance).float()
    spanning = Grid.around(group, 4, symmetric=symmetric)
    fitted = Grid.fitting(group, 4, symmetric=symmetric, importance=costs)
    errors = fitted.error(group, costs)
    assert (errors <= spanning.error(group, costs)).all()
    best = np.array([searched(row, importance, [8] if symmetric else list(range(1, 16))) for row in weight])
    assert float(errors.sum()) < 1.1 * best.sum()
    assert float(errors.sum()) < 0.9 * float(spanning.error(group, costs).sum())
    assert torch.equal(fitted.scales, fitted.scales.half().float())


def test_a_fitted_grid_of_nothing_is_zero() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e-12
    grid = Grid.fitting(weight, 4, symmetric=False, importance=torch.ones(32))
    assert grid.scales.isfinite().all()
    assert (grid.scales > 0).all()
    assert not grid.values(grid.codes(weight[:, 0])).any()
    unseen = Grid.fitting(weight_of(3, 32), 4, symmetric=False, importance=torch.zeros(32))
    assert torch.equal(unseen.scales, Grid.around(weight_of(3, 32), 4, symmetric=False).scales)


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
