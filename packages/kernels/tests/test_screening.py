"""Screened arg-max: the same bits as without, where rounding misleads most, and where inputs are at their limits."""

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat

pytestmark = pytest.mark.usefixtures("not_triton")

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


def misleading(seed, *, falls, num_rows=4, in_features=576):
    """Return equal rows, and a weight whose largest product is output 40, or output 3 if the rows are rounded.

    Inputs lie halfway between the numbers that they are rounded to, and the codes of one output have the signs of what
    is lost: no weights of their norm gain or lose more. The other has codes where nothing is lost, and a product in
    between. Rounding lowers the first, or with `falls` raises it.
    """
    rng = np.random.default_rng(seed)
    lossy, other, size = (3, 40, -20) if falls else (40, 3, 20)
    wanted = -1.0
    codes = np.zeros((64, in_features), np.int64)
    while wanted < 0:  # the other outputs' products are 0
        steps = rng.integers(-100, 100, in_features) + rng.choice((0.498, -0.498), in_features)
        steps[::32] = 127.0  # the largest input of a group: the scale is 1
        rounded = np.rint(steps)
        codes[lossy] = size * np.sign(steps - rounded)
        wanted = rounded @ codes[lossy] + 0.98 * ((steps - rounded) @ codes[lossy])
    steps_of_other = int(wanted // 127) + falls  # towards the product of the rounded rows
    whole, rest = divmod(steps_of_other, in_features // 32)
    codes[other, ::32] = whole
    codes[other, : 32 * rest : 32] += 1
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


@pytest.mark.parametrize("falls", [False, True], ids=["rises", "falls"])
@pytest.mark.parametrize("seed", range(20))
def test_products_that_rounded_inputs_put_in_the_wrong_order(seed, falls):
    x, weight = misleading(seed, falls=falls)
    x *= 2.0 ** (10 * seed - 100)  # whose squares fp32 does not hold
    assert ok.packed_argmax(x, weight, int8_activations=True)[0].tolist() == [3] * 4
    assert ok.packed_argmax(x, weight, norms=ok.weight_norms(weight))[0].tolist() == [40] * 4


def test_products_that_only_the_order_of_sums_tells_apart():
    """Every output has the same groups in another order, and nothing is lost where inputs are rounded."""
    rng = np.random.default_rng(9)
    x = torch.from_numpy(rng.integers(-127, 128, (50, 32)).astype(np.float32))
    x[:, 0] = 127.0
    scales, codes = rng.uniform(0.001, 0.03, 18), rng.integers(-127, 128, (18, 32))
    orders = [rng.permutation(18) for _ in range(640)]
    weight = q8_0(np.stack([scales[order] for order in orders]), np.stack([codes[order].ravel() for order in orders]))
    check(x.repeat(1, 18), weight)


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
    if ok.cpu_isa() == "baseline":
        pytest.skip("without vectors of bytes nothing is screened")
    x, weight = misleading(7, falls=False)
    norms = 0.8 * ok.weight_norms(weight)
    assert ok.packed_argmax(x, weight, norms=norms)[0].tolist() == [3] * 4
    assert ok.packed_argmax(x[:1], weight, norms=norms)[0].tolist() == [40], "one row is not screened"


def test_norms_that_do_not_fit_are_refused():
    weight = random_q8_0(np.random.default_rng(8), 40, 32)
    with pytest.raises(ok.ShapeError, match="norms"):
        ok.packed_argmax(torch.randn(4, 32), weight, norms=torch.zeros(41))
    with pytest.raises(ok.DtypeError, match="norms"):
        ok.packed_argmax(torch.randn(4, 32), weight, norms=torch.zeros(40, dtype=torch.float64))


# ---- draws ----------------------------------------------------------------------------------------------------------

TEMPERATURES = (0.0, 1e-3, 0.1, 0.7, 1.0, 5.0, 1e4)


def draw_options(num_draws, seed):
    generator = torch.Generator().manual_seed(seed)
    names = ("seeds", "sequence_index", "positions")
    options = {name: torch.randint(0, 1 << 40, (num_draws,), generator=generator) for name in names}
    choice = torch.randint(0, len(TEMPERATURES), (num_draws,), generator=generator)
    return torch.tensor(TEMPERATURES)[choice], options


def check_draws(x, weight, seed, source_rows=None):
    """Compare with draws from logits in full."""
    temperature, options = draw_options(len(x) if source_rows is None else len(source_rows), seed)
    options["source_rows"] = source_rows
    expected = ok.sample_tokens(ok.packed_linear(x, weight), temperature, **options)
    for norms in (None, ok.weight_norms(weight)):
        token_ids, best = ok.packed_sample(x, weight, temperature, norms=norms, **options)
        sound = expected[1].isfinite()
        assert torch.equal(token_ids[sound], expected[0][sound])
        assert torch.equal(best.isfinite(), sound)
        assert torch.equal(best[sound].view(torch.int32), expected[1][sound].view(torch.int32))


@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_draws_are_those_of_logits_in_full(device, out_features):
    weight = random_q8_0(np.random.default_rng(out_features), out_features, 576)
    for num_rows in NUM_ROWS:
        check_draws(torch.randn(num_rows, 576), weight, num_rows)


@pytest.mark.parametrize("spread", [1e-6, 0.01, 1.0, 30.0])
def test_draws_from_flat_and_from_steep_rows(spread):
    weight = random_q8_0(np.random.default_rng(1), 4000, 64)
    for seed in range(10):
        check_draws(torch.randn(30, 64) * spread, weight, seed)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.usefixtures("native_library")
def test_draws_by_any_number_of_threads(num_threads):
    weight = random_q8_0(np.random.default_rng(2), 1000, 96)
    with ok.native_threads(num_threads):
        check_draws(torch.randn(40, 96), weight, num_threads)


def test_draws_that_share_rows():
    weight = random_q8_0(np.random.default_rng(3), 1000, 96)
    check_draws(torch.randn(7, 96), weight, 1, torch.tensor([6, 0, 0, 3, 3, 3, 5, 1, 6, 6]))


@pytest.mark.parametrize("falls", [False, True], ids=["rises", "falls"])
@pytest.mark.parametrize("seed", range(10))
def test_draws_that_rounded_inputs_would_change(seed, falls):
    x, weight = misleading(seed, falls=falls, num_rows=64)
    logits = ok.packed_linear(x, weight)
    apart = logits[0, 40] - logits[0, 3]
    rough = ok.packed_linear(x, weight, int8_activations=True)
    changed = False
    for factor in (0.0, 0.3, 1.0, 30.0):
        temperature = torch.full((64,), float(apart * factor))
        options = draw_options(64, seed)[1]
        expected = ok.sample_tokens(logits, temperature, **options)[0]
        drawn = ok.packed_sample(x, weight, temperature, norms=ok.weight_norms(weight), **options)[0]
        assert torch.equal(drawn, expected)
        changed |= not torch.equal(expected, ok.sample_tokens(rough, temperature, **options)[0])
    assert changed


def test_a_token_far_from_the_likeliest_wins_by_rare_noise():
    """All tokens but one are as unlikely as lets the largest of 40 million noises win; the rows hold another ten."""
    num_rows, vocab_size = 10_000, 4096
    index = torch.arange(num_rows)
    noise = ok.gumbel_noise(index, index % 3, index, vocab_size)
    row, column = divmod(int(noise.argmax()), vocab_size)
    likeliest = (column + 2000) % vocab_size
    apart = noise[row, column] - noise[row, likeliest] - 0.5
    codes = np.zeros((vocab_size, 32))
    codes[likeliest] = 1
    x = torch.ones(11, 32)
    rows = torch.arange(row - 5, row + 6) % num_rows
    temperature = torch.full((11,), float(32 / apart))
    options = {"seeds": rows, "sequence_index": rows % 3, "positions": rows}
    weight = q8_0(np.ones((vocab_size, 1)), codes)
    token_ids, _ = ok.packed_sample(x, weight, temperature, norms=ok.weight_norms(weight), **options)
    assert noise[row, column] > 15
    assert token_ids[5] == column


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e37])
def test_draws_from_rows_at_the_limits(value):
    rng = np.random.default_rng(5)
    x = torch.randn(20, 96)
    x[3, 50] = value
    check_draws(x, random_q8_0(rng, 500, 96), 1)
    check_draws(torch.zeros(20, 96), random_q8_0(rng, 500, 96), 2)


@pytest.mark.parametrize("weight_format", [WeightFormat.F32, WeightFormat.BF16], ids=lambda item: item.value)
def test_draws_from_weights_that_are_not_screened(weight_format):
    stored = torch.randn(500, 96).to(weight_format.dtype)
    check_draws(torch.randn(20, 96), ok.pack_weight(stored, weight_format, in_features=96), 1)


def test_arguments_of_draws_that_do_not_fit_are_refused():
    weight = random_q8_0(np.random.default_rng(8), 40, 32)
    temperature, options = draw_options(4, 1)
    x = torch.randn(4, 32)
    with pytest.raises(ok.ShapeError, match="norms"):
        ok.packed_sample(x, weight, temperature, norms=torch.zeros(41), **options)
    with pytest.raises(ok.ShapeError, match="logits"):
        ok.packed_sample(x, weight, temperature, logits=torch.zeros(4, 41), **options)
    with pytest.raises(ok.ShapeError, match="temperature"):
        ok.packed_sample(x, weight, temperature[:3], **options)
    with pytest.raises(ok.DtypeError, match="x has dtype"):
        ok.packed_sample(x.double(), weight, temperature, **options)
