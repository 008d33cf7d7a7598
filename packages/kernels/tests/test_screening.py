"""Screened arg-max: the same bits as without, where rounding misleads most, and where inputs are at their limits."""

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat

OUT_FEATURES = [1, 31, 32, 33, 1000]
NUM_ROWS = (1, 2, 3, 5, 16, 17, 64, 65, 130, 257)


def q8_0(scales, codes):
    """Pack codes [out_features, in_features] int8 with scales [out_features, groups]."""
    num_outputs, in_features = codes.shape
    blocks = np.zeros((num_outputs, in_features // 32, 34), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)
    blocks[..., 2:] = codes.reshape(num_outputs, -1, 32).astype(np.int8).view(np.uint8)
    stored = torch.from_numpy(blocks.reshape(num_outputs, -1))
    return ok.pack_weight(stored, WeightFormat.Q8_0, in_features=in_features)


def random_q8_0(rng, num_outputs, in_features):
    scales = rng.uniform(-0.03, 0.03, (num_outputs, in_features // 32))
    return q8_0(scales, rng.integers(-127, 128, (num_outputs, in_features)))


def check(x, weight, norms=None):
    """Compare with the arg-max that is not screened, and with the largest of the products in full."""
    norms = ok.weight_norms(weight) if norms is None else norms
    ids, best = ok.packed_argmax(x, weight)
    screened_ids, screened_best = ok.packed_argmax(x, weight, norms=norms)
    spoilt = best.isnan()
    assert torch.equal(screened_ids[~spoilt], ids[~spoilt])
    assert torch.equal(screened_best.view(torch.int32)[~spoilt], best.view(torch.int32)[~spoilt])
    assert torch.equal(screened_best.isnan(), spoilt)
    products = ok.packed_linear(x, weight)
    assert torch.equal(screened_best[~spoilt], products.amax(dim=-1)[~spoilt])


def misleading(seed, num_rows=4, in_features=576):
    """Return equal rows, and a weight whose largest product is output 40, or output 3 if the rows are rounded.

    Inputs lie halfway between the numbers that they are rounded to, and the codes of output 40 have the signs of what is
    lost: no weights of their norm lose more. Output 3 has codes where nothing is lost, and a product in between.
    """
    rng = np.random.default_rng(seed)
    wanted = -1.0
    codes = np.zeros((64, in_features), np.int64)
    while wanted < 0:  # the other outputs' products are 0
        steps = rng.integers(-100, 100, in_features) + rng.choice((0.498, -0.498), in_features)
        steps[::32] = 127.0  # the largest input of a group: the scale is 1
        rounded = np.rint(steps)
        codes[40] = 20 * np.sign(steps - rounded)
        wanted = rounded @ codes[40] + 0.98 * ((steps - rounded) @ codes[40])
    whole, rest = divmod(int(wanted // 127), in_features // 32)
    codes[3, ::32] = whole
    codes[3, : 32 * rest : 32] += 1
    weight = q8_0(np.full((64, in_features // 32), 0.5), codes)
    return torch.from_numpy(steps.astype(np.float32)).expand(num_rows, -1).contiguous(), weight


@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_any_number_of_rows_and_outputs(device, out_features):
    rng = np.random.default_rng(out_features)
    weight = random_q8_0(rng, out_features, 576)
    for num_rows in NUM_ROWS:
        check(torch.randn(num_rows, 576), weight)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.usefixtures("native_library")
def test_any_number_of_threads(num_threads):
    rng = np.random.default_rng(1)
    weight = random_q8_0(rng, 3000, 96)
    with ok.native_threads(num_threads):
        check(torch.randn(40, 96), weight)


@pytest.mark.parametrize("seed", range(20))
def test_products_that_rounded_inputs_put_in_the_wrong_order(seed):
    x, weight = misleading(seed)
    assert ok.packed_argmax(x, weight, int8_activations=True)[0].tolist() == [3] * 4
    assert ok.packed_argmax(x, weight, norms=ok.weight_norms(weight))[0].tolist() == [40] * 4


def test_equal_products_go_to_the_lowest_index():
    rng = np.random.default_rng(3)
    codes = np.repeat(rng.integers(-127, 128, (1, 64)), 500, axis=0)
    weight = q8_0(np.full((500, 2), 0.01), codes)
    ids, _ = ok.packed_argmax(torch.randn(20, 64), weight, norms=ok.weight_norms(weight))
    assert ids.tolist() == [0] * 20
    check(torch.zeros(20, 64), weight)


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-20, 1e15, 1e33, 1e37])
def test_inputs_near_the_limits_of_fp32(factor):
    rng = np.random.default_rng(4)
    weight = random_q8_0(rng, 500, 96)
    check(torch.randn(20, 96) * factor, weight)
    check(torch.randn(20, 96) * torch.logspace(-30, 0, 20)[:, None] * factor, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_and_scales_that_are_not_finite(value):
    rng = np.random.default_rng(5)
    x = torch.randn(20, 96)
    x[3, 50] = value
    check(x, random_q8_0(rng, 500, 96))
    scales = rng.uniform(-0.03, 0.03, (500, 3))
    scales[321, 1] = value
    check(torch.randn(20, 96), q8_0(scales, rng.integers(-127, 128, (500, 96))))


def test_norms_are_no_smaller_than_those_of_the_weights():
    rng = np.random.default_rng(6)
    for scale in (0.0, 6e-8, 1.0, 60000.0):
        weight = q8_0(np.full((70, 18), scale), rng.integers(-127, 128, (70, 576)))
        truth = ok.unpack_weight(weight).double().norm(dim=-1)
        norms = ok.weight_norms(weight).double()
        assert (norms >= truth).all()
        torch.testing.assert_close(norms, truth, rtol=2e-4, atol=1e-15)


@pytest.mark.usefixtures("native_library")
def test_norms_are_what_native_code_goes_by():
    """Norms a fifth too small promise that less is lost by rounding than is."""
    x, weight = misleading(7)
    norms = 0.8 * ok.weight_norms(weight)
    assert ok.packed_argmax(x, weight, norms=norms)[0].tolist() == [3] * 4
    assert ok.packed_argmax(x[:1], weight, norms=norms)[0].tolist() == [40], "one row is not screened"


def test_norms_that_do_not_fit_are_refused():
    weight = random_q8_0(np.random.default_rng(8), 40, 32)
    with pytest.raises(ok.ShapeError, match="norms"):
        ok.packed_argmax(torch.randn(4, 32), weight, norms=torch.zeros(41))
    with pytest.raises(ok.DtypeError, match="norms"):
        ok.packed_argmax(torch.randn(4, 32), weight, norms=torch.zeros(40, dtype=torch.float64))
