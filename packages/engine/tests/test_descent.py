"""Coordinate descent after GPTQ: errors fall, no single code could be better, scales solve their equations."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.errors import InvalidConfig
from octavo_engine.quant.calibrate import descent
from octavo_engine.quant.calibrate.descent import descend
from octavo_engine.quant.calibrate.gptq import GPTQSettings, damped, gptq
from octavo_engine.quant.calibrate.grid import Codes, round_to_nearest
from octavo_engine.quant.calibrate.options import QuantizeOptions

SETTINGS = {
    "asymmetric": GPTQSettings(4, 32, symmetric=False),
    "symmetric": GPTQSettings(4, 32, symmetric=True),
    "act_order": GPTQSettings(3, 24, symmetric=False, act_order=True),
    "a smaller last group": GPTQSettings(4, 40, symmetric=False),
    "one group": GPTQSettings(4, 96, symmetric=False),
}


def weight_and_hessian(seed: int = 3) -> tuple[Tensor, Tensor]:
    """A weight [40, 96] and the damped Hessian of inputs that go together and have a mean."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 96)) + rng.standard_normal((300, 96)) + 1.5
    weight = torch.from_numpy(rng.standard_normal((40, 96)).astype(np.float32))
    return weight, damped(torch.from_numpy(inputs.T @ inputs / 300), 0.01)


def errors(codes: Codes, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return what each output's error costs: [out_features] fp64."""
    difference = (codes.values() - weight).double()
    return ((difference @ hessian.double()) * difference).sum(dim=1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_round_lessens_what_gptq_left(settings: GPTQSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "_BLOCK", 36)
    weight, hessian = weight_and_hessian()
    codes = [gptq(weight, hessian, settings)]
    for _ in range(3):
        codes.append(descend(codes[-1], weight, hessian, 1))
    costs = [errors(found, weight, hessian).sum() for found in codes]
    assert costs[1] < 0.97 * costs[0]
    assert costs[3] <= costs[2] <= costs[1]
    assert torch.equal(codes[-1].zeros, codes[0].zeros)
    assert torch.equal(codes[-1].groups, codes[0].groups)
    assert int(codes[-1].codes.max()) <= 2**settings.bits - 1
    whole = descend(codes[0], weight, hessian, 3)
    assert torch.equal(whole.codes, codes[-1].codes)
    assert torch.equal(whole.scales, codes[-1].scales)
    assert torch.equal(descend(codes[0], weight, hessian, 0).codes, codes[0].codes)


def test_in_the_end_no_other_code_is_better() -> None:
    weight, hessian = weight_and_hessian()
    found = round_to_nearest(weight, 4, 32, symmetric=False)
    for _ in range(20):
        found = found._replace(codes=descent._nearer_codes(found, weight.T.contiguous(), hessian.float()))
    least = errors(found, weight, hessian)
    assert (least < errors(round_to_nearest(weight, 4, 32, symmetric=False), weight, hessian)).all()
    for row in range(0, 96, 7):
        for change in (-1, 1):
            codes = found.codes.clone()
            codes[row] = (codes[row].int() + change).clamp(0, 15).to(torch.uint8)
            assert (errors(found._replace(codes=codes), weight, hessian) >= least * (1 - 1e-5)).all()


def test_scales_are_those_of_least_squares() -> None:
    weight, hessian = weight_and_hessian()
    found = round_to_nearest(weight, 4, 32, symmetric=False)
    scales = descent._fitted_scales(found, weight.T.contiguous(), hessian.float())
    factor = np.linalg.cholesky(hessian.numpy()).T
    for output in range(0, 40, 9):
        steps = found.codes[:, output].double().numpy() - found.zeros.double().numpy()[found.groups, output]
        by_group = np.where(found.groups.numpy()[:, None] == np.arange(3), steps[:, None], 0)
        expected = np.linalg.lstsq(factor @ by_group, factor @ weight[output].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(scales[:, output].double().numpy(), expected, rtol=2e-3)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, hessian = weight_and_hessian()
    weight[:, 32:64] = 0
    before = gptq(weight, hessian, GPTQSettings(4, 32, symmetric=True))
    nothing = before._replace(codes=before.codes.clone())
    nothing.codes[32:64] = 8
    scales = descent._fitted_scales(nothing, weight.T.contiguous(), hessian.float())
    assert torch.equal(scales[1], before.scales[1])
    assert scales.isfinite().all()


def test_rounds_are_not_negative() -> None:
    with pytest.raises(InvalidConfig, match="descent_rounds must be 0 or more, got -1"):
        QuantizeOptions(descent_rounds=-1)
