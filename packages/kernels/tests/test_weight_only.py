"""Integer weights: values from what checkpoints store, and products against fp64, bit for bit in every batch."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat, _spans
from octavo_kernels.testing import assert_close

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture
def spans(monkeypatch):
    """Cut even small weights into spans."""
    monkeypatch.setattr(_spans, "_LEAST_BLOCKS", 1)
    monkeypatch.setattr(_spans, "_PROGRAMS", 4)


def random_codes(bits, in_features, out_features, group_size, seed=0):
    """Codes [in_features, out_features], fp16 scales and zeros [num_groups, out_features]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-in_features // group_size), out_features)
    codes = torch.randint(1 << bits, (in_features, out_features), generator=generator)
    zeros = torch.randint(1, (1 << bits) + 1, shape, generator=generator)
    return codes, (torch.rand(shape, generator=generator) * 0.03 + 0.001).half(), zeros


def joined(fields, bits):
    """Put the last dimension of fields into words, lowest bits first."""
    words = sum(fields[..., place].long() << (bits * place) for place in range(fields.shape[-1]))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights_keep_their_values(bits):
    codes, scales, zeros = random_codes(bits, 96, 64, 32)
    per_word = 32 // bits
    qweight = joined(codes.view(-1, per_word, 64).transpose(1, 2), bits)
    qzeros = joined((zeros - 1).view(3, -1, per_word), bits)
    expected = (scales.float().repeat_interleave(32, 0) * (codes - zeros.repeat_interleave(32, 0))).T
    assert torch.equal(ok.int_weight_values(ok.int_weight_from_gptq(qweight, qzeros, scales, bits=bits)), expected)
    symmetric = ok.int_weight_from_gptq(qweight, None, scales, bits=bits)
    expected = (scales.float().repeat_interleave(32, 0) * (codes - (1 << bits - 1))).T
    assert torch.equal(ok.int_weight_values(symmetric), expected)
    order = torch.randperm(96)
    sorted_inputs = ok.int_weight_from_gptq(qweight, None, scales, bits=bits, order=order)
    expected = (scales.float().repeat_interleave(32, 0) * (codes[order] - (1 << bits - 1))).T
    assert torch.equal(ok.int_weight_values(sorted_inputs), expected)


def test_awq_weights_keep_their_values():
    codes, scales, zeros = random_codes(4, 256, 24, 128)
    zeros -= 1
    qweight, qzeros = (joined(item.view(len(item), -1, 8)[..., list(AWQ_ORDER)], 4) for item in (codes, zeros))
    expected = (scales.float().repeat_interleave(128, 0) * (codes - zeros.repeat_interleave(128, 0))).T
    assert torch.equal(ok.int_weight_values(ok.int_weight_from_awq(qweight, qzeros, scales)), expected)


@pytest.mark.parametrize("weight_format", [WeightFormat.Q4_0, WeightFormat.Q4_1, WeightFormat.Q8_0], ids=str)
def test_packed_weights_keep_their_values(weight_format):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 60, (45, 5 * weight_format.block_bytes), generator=generator, dtype=torch.uint8)
    packed = ok.pack_weight(stored, weight_format, in_features=160)
    weight = ok.int_weight_from_packed(packed)
    assert torch.equal(ok.int_weight_values(weight), ok.unpack_weight(packed))
    assert (weight.out_features, weight.in_features, weight.num_groups) == (45, 160, 5)


def make_weight(bits, in_features, out_features, group_size, *, zeros=False, minimums=False, device="cpu"):
    codes, scales, drawn = random_codes(bits, in_features, out_features, group_size)
    added = torch.randn(scales.shape, generator=torch.Generator().manual_seed(9)).half().to(device)
    return ok.int_weight_from_codes(
        codes.to(device), scales.to(device), bits=bits, group_size=group_size,
        zeros=drawn.to(device) if zeros else None, minimums=added if minimums else None, zero_point=1 << (bits - 1),
    )  # fmt: skip


def random_rows(num_tokens, in_features, dtype, device):
    """Rows that are a part of wider ones, so that their stride is not their length."""
    wide = torch.randn(num_tokens, in_features + 16, generator=torch.Generator().manual_seed(1))
    return wide.to(dtype).to(device)[:, :in_features]


CASES = {
    "4 bits, groups of 128, zeros": (torch.bfloat16, 4, 384, 128, {"zeros": True}, (0, 17, 65)),
    "4 bits, groups of 32, minimums": (torch.float16, 4, 160, 32, {"minimums": True}, (40,)),
    "4 bits, one group, fp32": (torch.float32, 4, 300, 300, {}, (1, 17)),
    "4 bits, one group, few inputs": (torch.bfloat16, 4, 33, 33, {}, (1,)),
    "8 bits, groups of 64, zeros": (torch.bfloat16, 8, 192, 64, {"zeros": True}, (1, 40)),
    "8 bits, groups of 32": (torch.float16, 8, 96, 32, {}, (17,)),
}


@pytest.mark.parametrize(("dtype", "bits", "in_features", "group_size", "options", "counts"), CASES.values(), ids=CASES)
def test_products_equal_those_of_the_values(device, spans, dtype, bits, in_features, group_size, options, counts):
    weight = make_weight(bits, in_features, 70, group_size, **options, device=device)
    bias = torch.linspace(-1, 1, 70, device=device)
    values = ok.int_weight_values(weight).double()
    for num_tokens in counts:
        x = random_rows(num_tokens, in_features, dtype, device)
        wide = torch.full((num_tokens, 73), float("nan"), dtype=dtype, device=device)
        workspace = torch.full((ok.weight_only_workspace(num_tokens, weight),), 255, dtype=torch.uint8, device=device)
        out = ok.weight_only_linear(x, weight, bias, out=wide[:, :70], workspace=workspace)
        assert out.data_ptr() == wide.data_ptr()
        assert_close(out / 8, (x.double() @ values.T + bias.double()) / 8)
        assert wide[:, 70:].isnan().all()


@pytest.mark.parametrize("num_tokens", [16, 65])
def test_a_row_does_not_depend_on_the_rows_beside_it_bit_for_bit(device, spans, num_tokens):
    """Among the batches of one tile height, whether or not the spans are programs of their own."""
    weight = make_weight(4, 384, 70, 64, zeros=True, device=device)
    x = random_rows(num_tokens, 384, torch.bfloat16, device)
    together = ok.weight_only_linear(x, weight)
    first = {16: 15, 65: 0}[num_tokens]
    least = {16: 1, 65: 33}[num_tokens]
    part = ok.weight_only_linear(x[first : first + least], weight)
    assert torch.equal(part, together[first : first + least])


def test_spans_have_the_same_sums_in_one_program_bit_for_bit(device, spans, monkeypatch):
    weight = make_weight(4, 384, 70, 64, device=device)
    x = random_rows(7, 384, torch.float32, device)  # one tile for fp32, however many rows
    split = ok.weight_only_linear(x, weight)
    assert ok.weight_only_workspace(7, weight) == 2 * 7 * 70 * 4
    monkeypatch.setattr(_spans, "_SPLIT_ROWS", 0)
    assert ok.weight_only_workspace(7, weight) == 0
    assert torch.equal(ok.weight_only_linear(x, weight), split)


def test_an_input_that_is_not_finite_spoils_its_row_alone(device):
    weight = make_weight(4, 64, 20, 32, minimums=True, device=device)
    x = random_rows(3, 64, torch.float16, device).contiguous()
    good = ok.weight_only_linear(x, weight)
    x[1, 40] = float("nan")
    out = ok.weight_only_linear(x, weight)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], good[[0, 2]])


def test_arguments_that_do_not_fit_are_refused():
    weight = make_weight(4, 64, 20, 32)
    with pytest.raises(ok.ShapeError, match=r"x has shape \[2, 63\], expected \[num_tokens, 64\]"):
        ok.weight_only_linear(torch.zeros(2, 63), weight)
    with pytest.raises(ok.DtypeError, match="out has dtype float16, expected float32"):
        ok.weight_only_linear(torch.zeros(2, 64), weight, out=torch.zeros(2, 20, dtype=torch.float16))
    with pytest.raises(ok.OptionError, match="group_size is 48, expected a power of two from 16 on, or in_features"):
        make_weight(4, 96, 20, 48)
    with pytest.raises(ok.ShapeError, match="scales has 5 groups, expected a divisor of the 64 inputs"):
        ok.int_weight_from_gptq(torch.zeros(8, 3, dtype=torch.int32), None, torch.zeros(5, 3))
    large = make_weight(4, 2048, 64, 32)
    with pytest.raises(ok.ShapeError, match="workspace has 4 bytes, expected at least 512; pass a larger one"):
        ok.weight_only_linear(torch.zeros(1, 2048), large, workspace=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ok.OptionError, match=r"weight\.format is .*F32.*, expected a format with blocks"):
        ok.int_weight_from_packed(ok.pack_weight(torch.zeros(4, 32), WeightFormat.F32, in_features=32))
