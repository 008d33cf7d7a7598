"""Packed weights: what they hold against the file format's definition, products against fp64, bits against batches."""

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat, matmul
from octavo_kernels.cpu.fallback import matmul as fallback
from octavo_kernels.packed_weight import block_words, dense_panels
from octavo_kernels.reference import matmul as reference

BLOCK_BYTES = {WeightFormat.Q4_0: 18, WeightFormat.Q4_1: 20, WeightFormat.Q8_0: 34}  # those without planes
DTYPES = {WeightFormat.F32: torch.float32, WeightFormat.BF16: torch.bfloat16, WeightFormat.F16: torch.float16}
OUT_FEATURES = [1, 31, 32, 33, 100]
# A product is a chain of up to 576 sums in fp32, each rounded, of summands of about 1: some last bits of its length.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-4}
CHAIN_ERROR = (
    4.0  # of one chain over 1536 inputs, against sums that torch takes in several: about the root of their length
)
INT8_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # exact within a group, so that the chain is one of groups

every_format = pytest.mark.parametrize("weight_format", [*DTYPES, *BLOCK_BYTES], ids=lambda item: item.value)
block_formats = pytest.mark.parametrize("weight_format", BLOCK_BYTES, ids=lambda item: item.value)
modes = pytest.mark.parametrize(
    ("weight_format", "int8"),
    [*((item, False) for item in (*DTYPES, *BLOCK_BYTES)), *((item, True) for item in BLOCK_BYTES)],
    ids=lambda item: item.value if isinstance(item, WeightFormat) else "int8" if item else "fp32",
)


def random_stored(weight_format, out_features, in_features, seed=0, device="cpu"):
    """Rows as a file has them: random codes, scales of either sign below 0.03."""
    rng = np.random.default_rng(seed)
    if weight_format in DTYPES:
        values = torch.from_numpy(rng.standard_normal((out_features, in_features), np.float32))
        return values.to(DTYPES[weight_format]).to(device)
    block_bytes = BLOCK_BYTES[weight_format]
    blocks = rng.integers(0, 256, (out_features, in_features // 32, block_bytes), dtype=np.uint8)
    for start in range(0, 4 if weight_format is WeightFormat.Q4_1 else 2, 2):
        halves = rng.uniform(-0.03, 0.03, blocks.shape[:2]).astype("<f2")
        blocks[:, :, start : start + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(out_features, -1)).to(device)


def random_weight(weight_format, out_features, in_features, seed=0, device="cpu"):
    stored = random_stored(weight_format, out_features, in_features, seed, device)
    return ok.pack_weight(stored, weight_format, in_features=in_features)


def random_rows(num_tokens, in_features, device, seed=1):
    """Rows that are a part of wider ones, so that their stride is not their length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, in_features + 5, generator=generator).to(device)[:, :in_features]


def file_values(stored, weight_format):
    """The values by the definition of the file format, element by element of a block."""
    if weight_format in DTYPES:
        return stored.float()
    block_bytes = BLOCK_BYTES[weight_format]
    blocks = stored.cpu().numpy().reshape(len(stored), -1, block_bytes)
    out = np.empty((*blocks.shape[:2], 32), np.float32)

    def half(start):
        return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0].astype(np.float32)

    for element in range(32):
        if weight_format is WeightFormat.Q8_0:
            out[..., element] = half(0) * blocks[..., 2 + element].view(np.int8)
            continue
        byte = blocks[..., block_bytes - 16 + element % 16]
        code = (byte >> 4 if element >= 16 else byte & 15).astype(np.float32)
        out[..., element] = half(0) * (code - 8) if weight_format is WeightFormat.Q4_0 else half(0) * code + half(2)
    return torch.from_numpy(out.reshape(len(stored), -1))


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int32)


@every_format
@pytest.mark.parametrize("in_features", [32, 64, 576])
@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_unpacked_values_are_the_files_bit_for_bit(device, weight_format, out_features, in_features):
    stored = random_stored(weight_format, out_features, in_features, device=device)
    weight = ok.pack_weight(stored, weight_format, in_features=in_features)
    assert torch.equal(bits(ok.unpack_weight(weight)), bits(file_values(stored, weight_format)))


@every_format
def test_unpacked_values_are_those_of_the_gguf_package(device, weight_format):
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    stored = random_stored(weight_format, 33, 96)
    weight = ok.pack_weight(stored.to(device), weight_format, in_features=96)
    data = stored.view(torch.uint8).numpy()
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[weight_format.name])
    assert torch.equal(bits(ok.unpack_weight(weight)), torch.from_numpy(expected.view(np.int32)))


@every_format
def test_packed_bytes_are_equal_on_every_backend(device, oracle, weight_format):
    stored = random_stored(weight_format, 100, 576, device=device)
    weight = ok.pack_weight(stored, weight_format, in_features=576)
    expected = oracle(ok.pack_weight, stored, weight_format, in_features=576)
    assert torch.equal(weight.data, expected.data)
    assert weight.num_bytes == ok.packed_num_bytes(weight_format, 100, 576)
    assert weight.data.data_ptr() % 64 == 0


@block_formats
def test_codes_lie_where_the_layout_says(device, weight_format):
    is_q8 = weight_format is WeightFormat.Q8_0
    codes = torch.arange(32, dtype=torch.uint8)
    block = torch.zeros(34 if is_q8 else BLOCK_BYTES[weight_format], dtype=torch.uint8)
    if is_q8:
        block[2:] = codes
    else:
        block[-16:] = (codes[:16] & 15) | (codes[16:] & 15) << 4
    stored = torch.zeros(34, 2 * len(block), dtype=torch.uint8)
    stored[33, len(block) :] = block  # output 1 of the second panel, second group
    words = block_words(ok.pack_weight(stored.to(device), weight_format, in_features=64))[1, 1, :, 1].cpu()
    if is_q8:
        assert words.tolist() == [[128 + 4 * row + byte for byte in range(4)] for row in range(8)]
    else:
        low = [[(8 * row + byte) % 16 for byte in range(4)] for row in range(4)]
        high = [[(8 * row + 4 + byte) % 16 for byte in range(4)] for row in range(4)]
        assert (words & 15).tolist() == low
        assert (words >> 4).tolist() == high


def test_dense_panels_hold_the_outputs_of_an_input_side_by_side(device):
    stored = random_stored(WeightFormat.F16, 33, 3, device=device)
    panels = dense_panels(ok.pack_weight(stored, WeightFormat.F16, in_features=3))
    assert torch.equal(panels[0], stored[:32].T)
    assert torch.equal(panels[1, :, 0], stored[32])
    assert panels[1, :, 1:].abs().max() == 0


def test_rows_may_lie_apart(device):
    stored = random_stored(WeightFormat.Q4_1, 40, 96, device=device)
    apart = torch.cat([stored, stored], dim=1)[:, : stored.shape[1]]
    weight = ok.pack_weight(apart, WeightFormat.Q4_1, in_features=96)
    assert torch.equal(weight.data, ok.pack_weight(stored, WeightFormat.Q4_1, in_features=96).data)


@modes
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("in_features", [32, 64, 576])
@pytest.mark.parametrize("out_features", OUT_FEATURES)
@pytest.mark.usefixtures("not_triton")
def test_products_equal_the_reference(device, oracle, weight_format, int8, out_features, in_features, bias):
    weight = random_weight(weight_format, out_features, in_features, device=device)
    added = torch.linspace(-1, 1, out_features, device=device) if bias else None
    for num_tokens in (0, 1, 2, 7, 16, 17, 65):
        x = random_rows(num_tokens, in_features, device)
        wide = torch.full((num_tokens, out_features + 3), float("nan"), device=device)
        out = wide[:, :out_features]
        assert ok.packed_linear(x, weight, added, int8_activations=int8, out=out) is out
        expected = oracle(ok.packed_linear, x, weight, added, int8_activations=int8)
        torch.testing.assert_close(out, expected, **(INT8_TOLERANCE if int8 else TOLERANCE))
        assert wide[:, out_features:].isnan().all()


@pytest.mark.parametrize("weight_format", DTYPES, ids=lambda item: item.value)
@pytest.mark.parametrize("in_features", [1, 3, 33, 577])
def test_dense_weights_may_have_any_number_of_inputs(device, weight_format, in_features):
    stored = random_stored(weight_format, 33, in_features, device=device)
    weight = ok.pack_weight(stored, weight_format, in_features=in_features)
    assert torch.equal(ok.unpack_weight(weight), stored.float())
    x = random_rows(7, in_features, device)
    torch.testing.assert_close(ok.packed_linear(x, weight).double(), x.double() @ stored.double().T, **TOLERANCE)


@block_formats
def test_8_bit_products_are_near_the_products_in_full(device, weight_format):
    weight = random_weight(weight_format, 100, 576, device=device)
    x = random_rows(17, 576, device)
    rounded, full = ok.packed_linear(x, weight, int8_activations=True), ok.packed_linear(x, weight)
    assert not torch.equal(rounded, full)
    assert (rounded - full).norm() / full.norm() < 0.01


@block_formats
def test_8_bit_products_of_whole_numbers_are_exact(device, weight_format):
    weight = random_weight(weight_format, 33, 64, device=device)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-126, 127, (5, 64), generator=generator).float()
    codes[:, ::32] = 127
    x = (codes / 64).to(device)  # a scale of 1 / 64: no rounding anywhere
    expected = x.double() @ ok.unpack_weight(weight).double().T
    torch.testing.assert_close(ok.packed_linear(x, weight, int8_activations=True).double(), expected, **TOLERANCE)


def codes_of_scale_one(weight_format, out_features, in_features):
    """A weight whose values are its codes, those of Q4_1 up to 15, and these values."""
    weight = random_stored(weight_format, out_features, in_features).view(out_features, in_features // 32, -1)
    weight[..., :2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    if weight_format is WeightFormat.Q4_1:
        weight[..., 2:4] = 0
    packed = ok.pack_weight(weight.flatten(1), weight_format, in_features=in_features)
    return packed, ok.unpack_weight(packed).double()


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("weight_format", [WeightFormat.Q4_0, WeightFormat.Q8_0], ids=lambda item: item.value)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_the_sum_of_a_group_in_8_bits_is_rounded_once(weight_format, num_tokens):
    weight, codes = codes_of_scale_one(weight_format, 40, 32)
    x = random_rows(num_tokens, 32, "cpu").contiguous()
    scale = (x.abs().amax(1, keepdim=True).numpy() / np.float32(127)).astype(np.float32)
    rounded = torch.from_numpy(x.numpy() * (np.float32(1) / scale)).round().double()  # half to even
    scale_of_22_bits = ((scale.view(np.uint32) + 2) & np.uint32(0xFFFFFFFC)).view(np.float32)
    expected = ((rounded @ codes.T) * torch.from_numpy(scale_of_22_bits).double()).float()
    assert torch.equal(ok.packed_linear(x, weight, int8_activations=True), expected)


@block_formats
@pytest.mark.parametrize("exponent", [-90, 108])
def test_8_bit_products_by_inputs_of_any_size_have_the_same_digits(device, weight_format, exponent):
    weight = random_weight(weight_format, 40, 64, device=device)
    x = random_rows(17, 64, device)
    product = ok.packed_linear(x, weight, int8_activations=True)
    far = ok.packed_linear(x * 2.0**exponent, weight, int8_activations=True)
    assert torch.equal(far, product * 2.0**exponent)


@pytest.mark.usefixtures("native_library")
@block_formats
def test_an_input_in_8_bits_that_is_too_large_counts_as_not_finite(weight_format):
    weight = random_weight(weight_format, 40, 64)
    x = random_rows(17, 64, "cpu").contiguous()
    x[3, 5] = 2.0**111
    product = ok.packed_linear(x, weight, int8_activations=True)
    assert product[3].isnan().all()
    assert product[[*range(3), *range(4, 17)]].isfinite().all()


@block_formats
@pytest.mark.parametrize("sign", [1, -1], ids=["largest", "least"])
@pytest.mark.usefixtures("not_triton")
def test_products_of_whole_numbers_are_exact_up_to_the_largest_codes(device, weight_format, sign):
    """Inputs of 23 bits and codes at their limits: no sum of 32 of them may overflow or be rounded before its end."""
    block_bytes = BLOCK_BYTES[weight_format]
    stored = np.zeros((33, 64 // 32, block_bytes), np.uint8)
    stored[..., :2] = np.array(1.0, "<f2").reshape(1).view(np.uint8)
    stored[0, ..., block_bytes - 16 :] = 0xFF
    if weight_format is WeightFormat.Q8_0:
        stored[0, ..., 2:], stored[1, ..., 2:] = 127, 128
    weight = ok.pack_weight(torch.from_numpy(stored.reshape(33, -1)).to(device), weight_format, in_features=64)
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-8_355_711, 8_355_712, (6, 64), generator=generator)
    x[1], x[2], x[3, ::2], x[4] = sign * 8_355_711, sign * 4_194_304, -8_355_711, 0
    expected = (x @ ok.unpack_weight(weight).cpu().long().T).double()
    for times in (1, 7):  # few rows, and enough of them for tiles
        product = ok.packed_linear(x.float().to(device).repeat(times, 1), weight).double().cpu()
        torch.testing.assert_close(product, expected.repeat(times, 1), rtol=2e-6, atol=0)  # an overflow is far more


@block_formats
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["even", "a few large inputs"])
@pytest.mark.usefixtures("not_triton")
def test_products_in_full_are_as_near_the_truth_as_float32(device, weight_format, spread):
    """Against float64, no further off than twice what one product by torch in float32 is."""
    weight = random_weight(weight_format, 256, 1536, device=device)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 1536, generator=generator) * torch.exp(spread * torch.randn(64, 1536, generator=generator))
    x = x.to(device)
    values = ok.unpack_weight(weight)
    truth = x.double() @ values.double().T

    def error(product):
        return (product - truth).square().mean().sqrt()

    assert error(ok.packed_linear(x, weight)) < CHAIN_ERROR * error(x @ values.T)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-33, 1e30, 1e35], ids=str)
@block_formats
def test_products_of_very_small_and_very_large_inputs(device, weight_format, scale):
    weight = random_weight(weight_format, 33, 64, device=device)
    x = (random_rows(3, 64, device) * scale).contiguous()
    truth = x.double() @ ok.unpack_weight(weight).double().T
    tolerance = 2e-5 * float(x.abs().max()) + 2e-36  # inputs may be rounded to multiples of the least normal number
    torch.testing.assert_close(ok.packed_linear(x, weight).double(), truth, rtol=2e-5, atol=tolerance)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # Triton's interpreter is NumPy
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-39], ids=["zero", "subnormal", "reciprocal overflows"])
def test_groups_whose_scale_has_no_reciprocal_count_as_zero(device, value):
    weight = random_weight(WeightFormat.Q4_1, 33, 64, device=device)
    x = random_rows(2, 64, device).contiguous()
    x[0, 32:] = value
    product = ok.packed_linear(x, weight, int8_activations=True)
    x[0, 32:] = 0
    assert torch.equal(product, ok.packed_linear(x, weight, int8_activations=True))


@modes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("num_rows", [5, 37])
@pytest.mark.usefixtures("not_triton")
def test_an_input_that_is_not_finite_spoils_its_row_alone(device, weight_format, int8, num_rows, value):
    weight = random_weight(weight_format, 100, 64, device=device)
    x = random_rows(num_rows, 64, device).contiguous()
    good = ok.packed_linear(x, weight, int8_activations=int8)
    x[2, 40] = value
    product = ok.packed_linear(x, weight, int8_activations=int8)
    others = [row for row in range(num_rows) if row != 2]
    assert not product[2].isfinite().any()
    assert torch.equal(product[others], good[others])
    _, best = ok.packed_argmax(x, weight, int8_activations=int8)
    assert not best[2].isfinite()
    assert best[others].isfinite().all()


@modes
@pytest.mark.usefixtures("not_triton")
def test_a_row_does_not_depend_on_the_rows_beside_it_bit_for_bit(device, weight_format, int8):
    weight = random_weight(weight_format, 100, 576, device=device)
    norms = ok.weight_norms(weight)
    x = random_rows(65, 576, device)
    alone = torch.cat([ok.packed_linear(x[row : row + 1], weight, int8_activations=int8) for row in range(65)])
    ids, best = ok.packed_argmax(x, weight, int8_activations=int8)
    for num_tokens in range(1, 66):
        together = ok.packed_linear(x[:num_tokens], weight, int8_activations=int8)
        assert torch.equal(bits(together), bits(alone[:num_tokens])), num_tokens
        last = ok.packed_linear(x[65 - num_tokens :], weight, int8_activations=int8)
        assert torch.equal(bits(last), bits(alone[65 - num_tokens :])), num_tokens
        some_ids, some_best = ok.packed_argmax(x[:num_tokens], weight, norms=norms, int8_activations=int8)
        assert torch.equal(some_ids, ids[:num_tokens])
        assert torch.equal(bits(some_best), bits(best[:num_tokens])), num_tokens


@modes
@pytest.mark.usefixtures("native_library")
def test_rows_of_many_blocks_have_the_same_bits(weight_format, int8):
    weight = random_weight(weight_format, 100, 320)
    x = random_rows(300, 320, "cpu")
    few = torch.cat([ok.packed_linear(x[row : row + 15], weight, int8_activations=int8) for row in range(0, 300, 15)])
    for num_tokens in (127, 130, 144, 200, 257, 300):
        together = ok.packed_linear(x[:num_tokens], weight, int8_activations=int8)
        assert torch.equal(bits(together), bits(few[:num_tokens])), num_tokens
        _, best = ok.packed_argmax(x[:num_tokens], weight, int8_activations=int8)
        assert torch.equal(bits(best), bits(few[:num_tokens].amax(1))), num_tokens


@block_formats
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.usefixtures("native_library")
def test_outputs_larger_than_the_caches_have_the_same_bits(weight_format, int8, offset):
    num_tokens, out_features = 12, 100_001  # 4.8 MB: written past the caches if aligned, all but the last panel
    weight = random_weight(weight_format, out_features, 64)
    x = random_rows(num_tokens, 64, "cpu")
    out = torch.full((num_tokens, 100_064), torch.nan)
    filled = out[:, offset : offset + out_features]
    with ok.native_threads(3):
        ok.packed_linear(x, weight, int8_activations=int8, out=filled)
    alone = torch.cat([ok.packed_linear(row[None], weight, int8_activations=int8) for row in x])
    assert torch.equal(bits(filled), bits(alone))
    assert out[:, :offset].isnan().all()
    assert out[:, offset + out_features :].isnan().all()


@block_formats
@pytest.mark.parametrize("scale", [0.0, 6e-8, 65504.0, float("inf")], ids=str)
@pytest.mark.usefixtures("native_library")
def test_inputs_and_scales_of_any_size_have_the_same_bits_among_many_rows(weight_format, scale):
    block_bytes = BLOCK_BYTES[weight_format]
    blocks = random_stored(weight_format, 96, 320).view(96, 10, block_bytes).clone()
    blocks[:32, 3, :2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    weight = ok.pack_weight(blocks.flatten(1), weight_format, in_features=320)
    sizes = 2.0 ** torch.linspace(-149, 127, 300, dtype=torch.float64)
    x = (torch.randn(300, 320, dtype=torch.float64) * sizes[:, None]).clamp(-3e38, 3e38).float()
    x[:, 160:192] = 0
    x[:, 192:] *= 2.0**-9
    few = torch.cat([ok.packed_linear(x[row : row + 5], weight) for row in range(0, 300, 5)])
    assert few[:, 32:].isfinite().all(1).sum() > 250
    assert torch.equal(bits(ok.packed_linear(x, weight)), bits(few))


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("out_features", [1, 31, 64, 90, 576, 1000])
@pytest.mark.parametrize("num_rows", [1, 2, 40, 270])
def test_any_number_of_threads_takes_every_panel_once(out_features, num_rows):
    weight = random_weight(WeightFormat.Q4_1, out_features, 64)
    x = torch.randn(num_rows, 64)
    results = []
    for num_threads in (1, 2, 3, 4, 7, 16):
        out = torch.full((num_rows, out_features), torch.nan)
        with ok.native_threads(num_threads):
            ok.packed_linear(x, weight, out=out)
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def torch_alone(monkeypatch):
    """Have torch serve the cpu backend, whether or not native code could."""
    monkeypatch.setattr(matmul, "implementation", lambda op, device: getattr(fallback, op))


@modes
def test_torch_alone_equals_the_reference(torch_alone, monkeypatch, weight_format, int8):
    weight = random_weight(weight_format, 100, 576)
    added = torch.linspace(-1, 1, 100)
    ids = torch.tensor([99, 0, 33])
    results = []
    for module in (fallback, reference):
        monkeypatch.setattr(matmul, "implementation", lambda op, device, module=module: getattr(module, op))
        x = random_rows(17, 576, "cpu")
        products = ok.packed_linear(x, weight, added, int8_activations=int8)
        results.append((products, ok.packed_argmax(x, weight, int8_activations=int8)[0]))
        assert torch.equal(ok.packed_embedding(weight, ids), ok.unpack_weight(weight)[ids])
    torch.testing.assert_close(results[0][0], results[1][0], **TOLERANCE)
    assert torch.equal(results[0][1], results[1][1])


@modes
def test_torch_alone_gives_a_row_the_same_bits_in_every_batch(torch_alone, weight_format, int8):
    weight = random_weight(weight_format, 100, 576)
    x = random_rows(65, 576, "cpu")
    alone = torch.cat([ok.packed_linear(x[row : row + 1], weight, int8_activations=int8) for row in range(65)])
    for num_tokens in range(1, 66):
        together = ok.packed_linear(x[:num_tokens], weight, int8_activations=int8)
        assert torch.equal(bits(together), bits(alone[:num_tokens])), num_tokens


@modes
@pytest.mark.parametrize("out_features", [1, 33, 1000])
@pytest.mark.usefixtures("not_triton")
def test_argmax_is_the_products_largest(device, weight_format, int8, out_features):
    weight = random_weight(weight_format, out_features, 576, device=device)
    for num_tokens in (0, 1, 5, 17):
        x = random_rows(num_tokens, 576, device)
        ids, best = ok.packed_argmax(x, weight, int8_activations=int8)
        products = ok.packed_linear(x, weight, int8_activations=int8)
        assert ids.dtype == torch.int64
        assert ids.tolist() == products.argmax(dim=-1).tolist()
        assert torch.equal(bits(best), bits(products.gather(1, ids[:, None])[:, 0]))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["above zero", "below zero"])
def test_argmax_takes_the_lowest_of_equals(device, sign):
    stored = torch.full((1500, 576), -2 * sign, device=device)
    stored[[7, 40, 1200]] = 0.5 if sign > 0 else 0.25
    x = torch.ones(3, 576, device=device)
    x[1] *= -1
    ids, best = ok.packed_argmax(x, ok.pack_weight(stored, WeightFormat.F32, in_features=576))
    expected = (x @ stored.T).max(dim=-1)
    assert best.tolist() == expected.values.tolist()
    assert ids.tolist() == [int((row == row.max()).nonzero()[0, 0]) for row in x @ stored.T]


def test_argmax_of_products_that_hold_nan_says_so(device):
    stored = torch.zeros(100, 32, device=device)
    stored[70, 3] = float("nan")
    x = torch.ones(2, 32, device=device)
    ids, best = ok.packed_argmax(x, ok.pack_weight(stored, WeightFormat.F32, in_features=32))
    assert best.isnan().all()
    assert all(0 <= index < 100 for index in ids.tolist())


@every_format
@pytest.mark.parametrize("out_features", OUT_FEATURES)
def test_embedding_gives_rows_of_the_weight_bit_for_bit(device, weight_format, out_features):
    weight = random_weight(weight_format, out_features, 96, device=device)
    values = ok.unpack_weight(weight)
    for num_tokens in (0, 1, 37):
        token_ids = torch.randint(out_features, (num_tokens,), generator=torch.Generator().manual_seed(4)).to(device)
        wide = torch.full((num_tokens, 99), float("nan"), device=device)
        out = wide[:, :96]
        assert ok.packed_embedding(weight, token_ids, out=out) is out
        assert torch.equal(bits(out), bits(values[token_ids]))
        assert wide[:, 96:].isnan().all()


def test_block_formats_want_whole_blocks():
    with pytest.raises(ok.ShapeError, match="in_features is 48, expected a multiple of 32 for q4_0"):
        ok.pack_weight(torch.zeros(1, 27, dtype=torch.uint8), WeightFormat.Q4_0, in_features=48)
    with pytest.raises(ok.ShapeError, match=r"stored has shape \[1, 27\], expected \[out_features, 36\]"):
        ok.pack_weight(torch.zeros(1, 27, dtype=torch.uint8), WeightFormat.Q4_0, in_features=64)


def test_dense_formats_want_their_own_dtype():
    with pytest.raises(ok.DtypeError, match="stored has dtype float32, expected bfloat16"):
        ok.pack_weight(torch.zeros(1, 32), WeightFormat.BF16, in_features=32)


def test_8_bit_inputs_are_for_block_formats():
    weight = random_weight(WeightFormat.F32, 4, 32)
    with pytest.raises(ok.OptionError, match="int8_activations is True, expected False for f32 weights"):
        ok.packed_linear(torch.zeros(1, 32), weight, int8_activations=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": torch.zeros(2, 31)}, ok.ShapeError),
        ({"x": torch.zeros(2, 32, dtype=torch.float64)}, ok.DtypeError),
        ({"x": torch.zeros(32, 2).T}, ok.ShapeError),
        ({"bias": torch.zeros(5)}, ok.ShapeError),
        ({"bias": torch.zeros(4, dtype=torch.float16)}, ok.DtypeError),
        ({"out": torch.zeros(2, 5)}, ok.ShapeError),
        ({"out": torch.zeros(2, 4, device="meta")}, ok.DeviceError),
    ],
    ids=["x too narrow", "x of fp64", "x transposed", "bias too long", "bias of fp16", "out too wide", "out elsewhere"],
)
def test_arguments_that_do_not_fit_are_refused(arguments, error):
    weight = random_weight(WeightFormat.Q8_0, 4, 32)
    with pytest.raises(error, match="packed_linear: "):
        ok.packed_linear(**{"x": torch.zeros(2, 32), "weight": weight, **arguments})


def test_data_that_does_not_fit_is_no_weight():
    with pytest.raises(ok.ShapeError, match=r"data has shape \[64\], expected \[576\]"):
        ok.PackedWeight(torch.zeros(64, dtype=torch.uint8), WeightFormat.Q4_0, 4, 32)
    shifted = torch.zeros(577, dtype=torch.uint8)[1:]
    with pytest.raises(ok.OptionError, match=r"data.data_ptr\(\) % 64 is 1, expected 0"):
        ok.PackedWeight(shifted, WeightFormat.Q4_0, 4, 32)
    with pytest.raises(ok.OptionError, match="out_features is 0, expected at least 1"):
        ok.packed_num_bytes(WeightFormat.F32, 0, 4)
