"""Formats with planes or parts: values against the gguf package, products against fp64, bits against batches."""

import os

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat, matmul
from octavo_kernels.cpu.fallback import matmul as fallback
from octavo_kernels.packed_parts import native_grid
from octavo_kernels.packed_planes import read_panels
from octavo_kernels.packed_weight import plane_panels

ON_TRITON = os.environ.get("OCTAVO_BACKEND") == "triton"  # which multiplies no parts
FORMATS = [item for item in WeightFormat if item.layout is not None and not (ON_TRITON and item.parts is not None)]
HALVES = {  # where the f16 numbers of a stored block begin
    WeightFormat.Q5_0: (0,),
    WeightFormat.Q5_1: (0, 2),
    WeightFormat.Q2_K: (80, 82),
    WeightFormat.Q3_K: (108,),
    WeightFormat.Q4_K: (0, 2),
    WeightFormat.Q5_K: (0, 2),
    WeightFormat.Q6_K: (208,),
    WeightFormat.IQ4_NL: (0,),
    WeightFormat.IQ4_XS: (0,),
    WeightFormat.TQ2_0: (64,),
    WeightFormat.TQ1_0: (52,),
    **dict.fromkeys((item for item in WeightFormat if item.value.startswith(("iq2", "iq3"))), (0,)),
    WeightFormat.IQ1_S: (0,),
}
LARGEST_UNITS = {  # of formats with parts: what makes weights of about 1
    **dict.fromkeys((WeightFormat.TQ2_0, WeightFormat.TQ1_0), 1.0),
    **dict.fromkeys((WeightFormat.IQ2_XXS, WeightFormat.IQ2_XS, WeightFormat.IQ2_S), 0.006),
    **dict.fromkeys((WeightFormat.IQ3_XXS, WeightFormat.IQ3_S), 0.002),
    **dict.fromkeys((WeightFormat.IQ1_S, WeightFormat.IQ1_M), 0.06),
    WeightFormat.Q8_K: 0.008,
}
UNIT = 0.03  # of weights: about what 32 codes of a model's blocks reach
TOLERANCE = {"rtol": 2e-5, "atol": 1e-4}
INT8_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
CHAIN_ERROR = 4.0  # as in test_matmul

plane_formats = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda item: item.value)
int8_or_not = pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])


def random_stored(weight_format, out_features, in_features, seed=0, device="cpu"):
    """Rows as a file has them: random bytes, but scales of either sign that make weights of about 1 at most."""
    rng = np.random.default_rng(seed)
    layout = weight_format.layout
    blocks = rng.integers(
        0, 256, (out_features, in_features // layout.block_inputs, layout.stored_bytes), dtype=np.uint8
    )
    if weight_format.parts is not None:
        put_small_scales(weight_format, blocks, rng)
        return torch.from_numpy(blocks.reshape(out_features, -1)).to(device)
    largest = UNIT / (64 if layout.num_scales and not layout.nibble_scales else 16 if layout.num_scales else 1)
    if weight_format in (WeightFormat.IQ4_NL, WeightFormat.IQ4_XS):
        largest /= 8
    for start in HALVES[weight_format]:
        halves = rng.uniform(-largest, largest, blocks.shape[:2]).astype("<f2")
        blocks[:, :, start : start + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(out_features, -1)).to(device)


def put_small_scales(weight_format, blocks, rng):
    """Scale blocks of a format with parts: what a file has for d becomes a small number of either sign."""
    if weight_format is WeightFormat.MXFP4:
        blocks[..., 0] = rng.integers(115, 125, blocks.shape[:2])
    elif weight_format is WeightFormat.NVFP4:
        blocks[..., :4] %= 0x21
    elif weight_format is WeightFormat.Q8_K:
        blocks[..., :4] = units(weight_format, blocks, rng, "<f4")
    elif weight_format is WeightFormat.IQ1_M:
        halves = units(weight_format, blocks, rng, "<f2")
        pieces = np.stack([halves[..., 0] << 4, halves[..., 0] & 0xF0, halves[..., 1] << 4, halves[..., 1] & 0xF0], -1)
        blocks[..., 49::2] = blocks[..., 49::2] & 15 | pieces
    else:
        (start,) = HALVES[weight_format]
        blocks[..., start : start + 2] = units(weight_format, blocks, rng, "<f2")


def units(weight_format, blocks, rng, dtype):
    largest = LARGEST_UNITS[weight_format]
    return rng.uniform(-largest, largest, (*blocks.shape[:2], 1)).astype(dtype).view(np.uint8)


def random_weight(weight_format, out_features, in_features, seed=0, device="cpu"):
    stored = random_stored(weight_format, out_features, in_features, seed, device)
    return ok.pack_weight(stored, weight_format, in_features=in_features)


def random_rows(num_tokens, in_features, device, seed=1):
    """Rows that are a part of wider ones, so that their stride is not their length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, in_features + 5, generator=generator).to(device)[:, :in_features]


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int32)


def gguf_values(weight_format, stored):
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    if weight_format is WeightFormat.Q8_K:  # which the package does not read: d f32, 256 numbers, 16 sums of them
        blocks = stored.cpu().numpy().reshape(len(stored), -1, 292)
        d = np.ascontiguousarray(blocks[..., :4]).view("<f4")
        with np.errstate(all="ignore"):
            return torch.from_numpy((d * blocks[..., 4:260].view(np.int8)).reshape(len(stored), -1))
    with np.errstate(all="ignore"):
        values = gguf.dequantize(stored.cpu().numpy(), gguf.GGMLQuantizationType[weight_format.name])
    return torch.from_numpy(values)


@plane_formats
@pytest.mark.parametrize("out_features", [1, 33, 64])
def test_values_are_those_of_the_gguf_package_bit_for_bit(device, weight_format, out_features):
    stored = random_stored(weight_format, out_features, 512, device=device)
    weight = ok.pack_weight(stored, weight_format, in_features=512)
    expected = bits(gguf_values(weight_format, stored))
    assert torch.equal(bits(ok.unpack_weight(weight)), expected)
    token_ids = torch.tensor([out_features - 1, 0, out_features // 2], device=device)
    wide = torch.full((3, 515), float("nan"), device=device)
    assert torch.equal(bits(ok.packed_embedding(weight, token_ids, out=wide[:, :512])), expected[token_ids.cpu()])
    assert wide[:, 512:].isnan().all()


@plane_formats
def test_zeros_keep_the_sign_that_the_file_gives_them(device, oracle, weight_format):
    """Scales below zero times codes that mean zero, and minimums of zero."""
    stored = torch.zeros(2, weight_format.layout.stored_bytes, dtype=torch.uint8)
    halves = np.array([[-0.5], [0.5]], "<f2").view(np.uint8)
    if weight_format is WeightFormat.Q8_K:
        stored[:, 2:4] = torch.from_numpy(halves)  # the upper half of a small number of 32 bits
    elif weight_format in HALVES:
        stored[:, HALVES[weight_format][0] :][:, :2] = torch.from_numpy(halves)
    zero_codes = {
        WeightFormat.Q5_0: (slice(2, 6), 0xFF),
        WeightFormat.Q3_K: (slice(0, 32), 0xFF),
        WeightFormat.Q6_K: (slice(128, 192), 0xAA),
        WeightFormat.MXFP4: (slice(1, 17), 0x80),  # two zeros in a byte
        WeightFormat.NVFP4: (slice(4, 36), 0x08),
        WeightFormat.TQ2_0: (slice(0, 64), 0x55),
        WeightFormat.TQ1_0: (slice(0, 52), 0x80),
    }
    if weight_format in zero_codes:
        where, byte = zero_codes[weight_format]
        stored[:, where] = byte
    packed = ok.pack_weight(stored.to(device), weight_format, in_features=weight_format.block_inputs)
    expected = bits(gguf_values(weight_format, stored))
    assert torch.equal(bits(ok.unpack_weight(packed)), expected)
    assert torch.equal(bits(oracle(ok.unpack_weight, packed)), expected)


@plane_formats
def test_any_bytes_mean_what_the_gguf_package_says(device, weight_format):
    """Scales and codes at random: infinite ones, numbers that are none, too small ones; NaN may have any bits."""
    if weight_format.parts is None:
        pytest.skip("formats with planes keep f16 scales as they are")
    rng = np.random.default_rng(7)
    stored = rng.integers(0, 256, (600, weight_format.layout.stored_bytes), dtype=np.uint8)
    stored[:256, 0] = np.arange(256)  # every scale of 8 bits
    weight = ok.pack_weight(
        torch.from_numpy(stored).to(device), weight_format, in_features=weight_format.layout.block_inputs
    )
    found, expected = ok.unpack_weight(weight).cpu(), gguf_values(weight_format, torch.from_numpy(stored))
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(bits(found)[~nan], bits(expected)[~nan])


@plane_formats
def test_packed_bytes_are_equal_on_every_backend(device, oracle, weight_format):
    stored = random_stored(weight_format, 100, 768, device=device)
    weight = ok.pack_weight(stored, weight_format, in_features=768)
    assert torch.equal(weight.data, oracle(ok.pack_weight, stored, weight_format, in_features=768).data)
    assert weight.data.data_ptr() % 64 == 0


@plane_formats
def test_memory_at_rest_is_that_of_the_file_within_5_percent(weight_format):
    stored = random_stored(weight_format, 96, 512)
    weight = ok.pack_weight(stored, weight_format, in_features=512)
    assert weight.data.untyped_storage().nbytes() <= 1.05 * stored.numel()
    assert weight.num_bytes == ok.packed_num_bytes(weight_format, 96, 512)


def test_q4_k_lies_as_the_layout_says(device):
    """Output 1 of the second panel, group 3 of the second block: code k at input k, scale 7, minimum 9."""
    codes = torch.arange(32, dtype=torch.uint8) % 16
    block = torch.zeros(144, dtype=torch.uint8)
    block[:4] = torch.tensor([1.0, 2.0], dtype=torch.float16).view(torch.uint8)
    block[4 + 3], block[8 + 3] = 7, 9
    block[16 + 32 : 16 + 64] = codes << 4  # groups 2 and 3 share 32 bytes
    stored = torch.zeros(34, 288, dtype=torch.uint8)
    stored[33, 144:] = block
    packed = plane_panels(ok.pack_weight(stored.to(device), WeightFormat.Q4_K, in_features=512))[1, 1].cpu()
    assert packed[:128].view(torch.float16).view(2, 32)[:, 1].tolist() == [1.0, 2.0]
    assert packed[128:384].view(8, 32)[:, 1].tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    assert packed[384:640].view(8, 32)[:, 1].tolist() == [0, 0, 0, 9, 0, 0, 0, 0]
    words = packed[640:].view(8, 4, 32, 4)[3, :, 1]
    assert (words & 15).tolist() == [[(8 * row + byte) % 16 for byte in range(4)] for row in range(4)]
    assert (words >> 4).tolist() == [[(8 * row + 4 + byte) % 16 for byte in range(4)] for row in range(4)]
    assert packed.numel() == 640 + 8 * 512


@plane_formats
@int8_or_not
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 256), (31, 512), (100, 768)], ids=str)
@pytest.mark.usefixtures("not_triton")
def test_products_equal_the_reference(device, oracle, weight_format, int8, out_features, in_features):
    weight = random_weight(weight_format, out_features, in_features, device=device)
    bias = torch.linspace(-1, 1, out_features, device=device)
    for num_tokens in (0, 1, 2, 7, 17, 65):
        x = random_rows(num_tokens, in_features, device)
        wide = torch.full((num_tokens, out_features + 3), float("nan"), device=device)
        out = wide[:, :out_features]
        assert ok.packed_linear(x, weight, bias, int8_activations=int8, out=out) is out
        expected = oracle(ok.packed_linear, x, weight, bias, int8_activations=int8)
        torch.testing.assert_close(out, expected, **(INT8_TOLERANCE if int8 else TOLERANCE))
        assert wide[:, out_features:].isnan().all()


@plane_formats
def test_8_bit_products_of_whole_numbers_are_exact(device, weight_format):
    weight = random_weight(weight_format, 33, 256, device=device)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-126, 127, (5, 256), generator=generator).float()
    codes[:, ::32] = 127
    x = (codes / 64).to(device)  # a scale of 1 / 64: no rounding anywhere
    expected = x.double() @ ok.unpack_weight(weight).double().T
    torch.testing.assert_close(ok.packed_linear(x, weight, int8_activations=True).double(), expected, **TOLERANCE)


@plane_formats
@pytest.mark.parametrize("byte", [0x00, 0xFF], ids=["least codes", "largest codes"])
@pytest.mark.usefixtures("not_triton")
def test_products_of_whole_numbers_are_exact_up_to_the_largest_codes(device, weight_format, byte):
    """Inputs of 23 bits and codes at their limits: no sum of 32 of them may overflow or be rounded before its end."""
    stored = torch.full((33, weight_format.layout.stored_bytes), byte, dtype=torch.uint8)
    for start in HALVES.get(weight_format, ()):
        stored[:, start : start + 2] = torch.from_numpy(np.array([1.0], "<f2").view(np.uint8))
    if weight_format is WeightFormat.Q8_K:
        stored[:, :4] = torch.from_numpy(np.array([1.0], "<f4").view(np.uint8))
    if weight_format is WeightFormat.MXFP4:
        stored[:, 0] = 128
    if weight_format is WeightFormat.IQ1_M:
        stored[:, 49::2] = stored[:, 49::2] & 15 | torch.tensor([0x00, 0x00, 0xC0, 0x30], dtype=torch.uint8)
    weight = ok.pack_weight(stored.to(device), weight_format, in_features=weight_format.block_inputs)
    x = torch.full((3, weight_format.block_inputs), 8_355_711.0)
    x[1], x[2] = -8_355_711.0, 4_194_304.0
    expected = x.double() @ ok.unpack_weight(weight).cpu().double().T
    product = ok.packed_linear(x.to(device), weight).double().cpu()
    torch.testing.assert_close(product, expected, rtol=2e-5, atol=1e-6 * float(expected.abs().max()))


@plane_formats
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["even", "a few large inputs"])
@pytest.mark.usefixtures("not_triton")
def test_products_in_full_are_as_near_the_truth_as_float32(device, weight_format, spread):
    weight = random_weight(weight_format, 128, 1536, device=device)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 1536, generator=generator) * torch.exp(spread * torch.randn(16, 1536, generator=generator))
    x = x.to(device)
    values = ok.unpack_weight(weight)
    truth = x.double() @ values.double().T

    def error(product):
        return (product - truth).square().mean().sqrt()

    assert error(ok.packed_linear(x, weight)) < CHAIN_ERROR * error(x @ values.T)


@plane_formats
@int8_or_not
@pytest.mark.usefixtures("not_triton")
def test_a_row_does_not_depend_on_the_rows_beside_it_bit_for_bit(device, weight_format, int8):
    weight = random_weight(weight_format, 70, 768, device=device)
    x = random_rows(65, 768, device)
    alone = torch.cat([ok.packed_linear(x[row : row + 1], weight, int8_activations=int8) for row in range(65)])
    ids, best = ok.packed_argmax(x, weight, int8_activations=int8)
    assert ids.tolist() == alone.argmax(dim=-1).tolist()
    assert torch.equal(bits(best), bits(alone.amax(dim=-1)))
    screened_ids, screened_best = ok.packed_argmax(x, weight, norms=ok.weight_norms(weight), int8_activations=int8)
    assert torch.equal(screened_ids, ids)
    assert torch.equal(bits(screened_best), bits(best))
    for num_tokens in (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 64, 65):
        together = ok.packed_linear(x[:num_tokens], weight, int8_activations=int8)
        assert torch.equal(bits(together), bits(alone[:num_tokens])), num_tokens
        last = ok.packed_linear(x[65 - num_tokens :], weight, int8_activations=int8)
        assert torch.equal(bits(last), bits(alone[65 - num_tokens :])), num_tokens


@plane_formats
@int8_or_not
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.usefixtures("not_triton")
def test_an_input_that_is_not_finite_spoils_its_row_alone(device, weight_format, int8, value):
    weight = random_weight(weight_format, 40, 256, device=device)
    x = random_rows(3, 256, device).contiguous()
    good = ok.packed_linear(x, weight, int8_activations=int8)
    x[1, 40] = value
    for rows in (slice(0, 3), slice(1, 2)):
        product = ok.packed_linear(x[rows], weight, int8_activations=int8)
        assert not product[1 - rows.start].isfinite().any()
    together = ok.packed_linear(x, weight, int8_activations=int8)
    assert torch.equal(together[[0, 2]], good[[0, 2]])


@plane_formats
@int8_or_not
def test_torch_alone_equals_the_reference(monkeypatch, oracle, weight_format, int8):
    monkeypatch.setattr(matmul, "implementation", lambda op, device: getattr(fallback, op))
    weight = random_weight(weight_format, 50, 512)
    x = random_rows(17, 512, "cpu")
    bias = torch.linspace(-1, 1, 50)
    product = ok.packed_linear(x, weight, bias, int8_activations=int8)
    values, rows = ok.unpack_weight(weight), ok.packed_embedding(weight, torch.tensor([49, 0, 33]))
    alone = torch.cat([ok.packed_linear(x[row : row + 1], weight, bias, int8_activations=int8) for row in range(17)])
    monkeypatch.undo()
    assert torch.equal(bits(product), bits(alone))
    assert torch.equal(values, gguf_values(weight_format, random_stored(weight_format, 50, 512)))
    assert torch.equal(rows, values[[49, 0, 33]])
    expected = oracle(ok.packed_linear, x, weight, bias, int8_activations=int8)
    torch.testing.assert_close(product, expected, **TOLERANCE)


def test_blocks_are_whole():
    with pytest.raises(ok.ShapeError, match="in_features is 288, expected a multiple of 256 for q4_k"):
        ok.packed_num_bytes(WeightFormat.Q4_K, 4, 288)
    with pytest.raises(ok.ShapeError, match=r"stored has shape \[1, 144\], expected \[out_features, 288\]"):
        ok.pack_weight(torch.zeros(1, 144, dtype=torch.uint8), WeightFormat.Q4_K, in_features=512)


def test_products_on_gpus_take_no_planes():
    with pytest.raises(ok.OptionError, match=r"weight.format is .*Q4_K.*, expected a format with blocks: q4_0"):
        ok.int_weight_from_packed(random_weight(WeightFormat.Q4_K, 4, 256))


@pytest.mark.usefixtures("native_library")
def test_the_first_product_of_a_grid_can_be_recorded():
    native_grid.cache_clear()
    weight, x = random_weight(WeightFormat.IQ3_S, 64, 256), random_rows(3, 256, "cpu")
    out = torch.empty(3, 64)
    with ok.Recording(3) as recording:
        ok.packed_linear(x, weight, out=out)
    recording.program.run(3, 3)
    assert torch.equal(bits(out), bits(ok.packed_linear(x, weight)))


def test_triton_says_that_it_multiplies_no_parts(backend):
    if backend is not ok.Backend.TRITON:
        pytest.skip("only Triton lacks them")
    weight = random_weight(WeightFormat.IQ2_XXS, 4, 256)
    with pytest.raises(ok.OptionError, match=r"weight.format is .*iq2_xxs.*, expected a format that Triton multiplies"):
        ok.packed_linear(torch.ones(1, 256), weight)


def test_panels_come_apart_as_they_were_put_together():
    weight = random_weight(WeightFormat.Q2_K, 32, 256)
    blocks = read_panels(plane_panels(weight), weight.format.planes)
    assert blocks.codes.shape == (1, 32, 1, 256)
    assert blocks.scales.max() <= 15
    assert blocks.minimums is not None
    assert blocks.minimums.max() <= 15
