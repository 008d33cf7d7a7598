"""Grouped weights: values bit for bit, products against fp64, bits against batches, in all kinds."""

import itertools

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import Finish, GroupedCodes, NestedScales
from octavo_kernels.errors import OptionError, ShapeError

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CODES = {"4": 4, "3": 3, "2": 2, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
SCALES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "powers": torch.uint8,
    "nested": NestedScales,
}
GROUPS = {  # their size, and inputs: whole groups, a smaller last one, inputs that fill no block
    "32 of 192": (32, 192),
    "64 of 416": (64, 416),
    "128 of 200": (128, 200),
    "all of 200": (200, 200),
    "more than 96": (128, 96),
}
CHAIN_ERROR = 8.0  # of sums of magnitudes, in units of 2**-24: a chain has 416 links at most

every_codes = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
every_scales = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
every_groups = pytest.mark.parametrize(("group_size", "in_features"), GROUPS.values(), ids=GROUPS)


def random_scales(kind, out_features, num_groups):
    if kind is NestedScales:
        codes, outer = (
            torch.randint(0, 256, (out_features, num_groups)).byte(),
            torch.rand(out_features * num_groups // 8 + 1),
        )
        return NestedScales(codes, torch.randn(256) / 8, outer, 8, 0.02)
    if kind == torch.uint8:
        return torch.randint(115, 127, (out_features, num_groups)).byte()
    return (torch.randn(out_features, num_groups) / 8).to(kind)


def random_codes(codes, scales, group_size, in_features, out_features=70, *, zeros=False, order=False, **finish):
    """Return a weight in random codes."""
    num_groups = -(-in_features // group_size)
    shape = out_features, in_features
    numbers = random_scales(scales, out_features, num_groups)
    bits, levels = 8, None
    if codes == torch.int8:
        stored = torch.randint(-128, 128, shape, dtype=torch.int8)
    elif codes == torch.float8_e4m3fn:
        stored = torch.randn(shape).to(codes)
    else:
        bits, levels = codes, torch.randn(1 << codes)
        stored = torch.randint(0, 1 << codes, shape, dtype=torch.uint8)
    middle = 0
    if zeros:
        middle = 1 << (bits - 1)
        levels = None if levels is None else torch.arange(1 << bits).float() - middle
    return GroupedCodes(
        stored,
        numbers,
        group_size,
        bits,
        levels,
        torch.randint(0, (1 << bits) + 1, (out_features, num_groups)) if zeros else None,
        middle,
        torch.randperm(in_features) if order else None,
        **finish,
    )


def stated(weight):
    """Return the values that a weight's codes mean, from the statement of the format."""
    groups = torch.arange(weight.codes.shape[1]) // weight.group_size
    values = weight.codes.float() if weight.levels is None else weight.levels[weight.codes.int()]
    if weight.zeros is not None:
        values = values + (weight.middle - weight.zeros)[:, groups]
    scales = weight.scales.values() if isinstance(weight.scales, NestedScales) else weight.scales
    scales = torch.exp2(scales.double() - 127).float() if scales.dtype == torch.uint8 else scales.float()
    finish = {
        Finish.NONE: lambda x: x,
        Finish.TIMES: lambda x: x * weight.factor,
        Finish.OVER: lambda x: x / weight.factor,
    }
    of_scales = not isinstance(weight.scales, NestedScales) and weight.scales.dtype == torch.float8_e4m3fn
    if of_scales:
        scales = finish[weight.finish](scales)
    values = values * scales[:, groups]
    if not of_scales:
        values = finish[weight.finish](values)
    if weight.order is None:
        return values
    inputs = torch.empty_like(values)
    inputs[:, weight.order] = values
    return inputs


def random_rows(num_tokens, in_features):
    """Rows that are a part of wider ones, so that their stride is not their length; NaN stands beside them."""
    wide = torch.full((num_tokens, in_features + 5), float("nan"))
    wide[:, :in_features] = torch.randn(num_tokens, in_features)
    return wide[:, :in_features]


def check_product(weight, values, num_tokens=17):
    x, bias = random_rows(num_tokens, weight.in_features), torch.randn(weight.out_features)
    wide = torch.full((num_tokens, weight.out_features + 3), float("nan"))
    product = ok.grouped_linear(x, weight, bias, out=wide[:, : weight.out_features])
    expected = x.double() @ values.double().T + bias.double()
    size = x.abs().double() @ values.abs().double().T + bias.abs().double()
    assert ((product - expected).abs() <= CHAIN_ERROR * 2**-24 * size).all()
    assert wide[:, weight.out_features :].isnan().all()
    return x, bias, product


@every_codes
@every_scales
@every_groups
def test_values_and_products_are_those_of_the_codes(codes, scales, group_size, in_features):
    for order in (False, True):
        stored = random_codes(codes, scales, group_size, in_features, order=order)
        weight, values = ok.pack_grouped(stored), stated(stored)
        assert torch.equal(ok.unpack_grouped(weight), values)
        check_product(weight, values)
        assert torch.equal(ok.grouped_linear(torch.eye(in_features), weight).T, values)


@every_groups
@pytest.mark.parametrize("codes", [4, 3, 2, torch.int8], ids=["4", "3", "2", "8"])
def test_zeros_of_groups_are_taken_off(codes, group_size, in_features):
    for order in (False, True):
        stored = random_codes(codes, torch.float16, group_size, in_features, zeros=True, order=order)
        weight, values = ok.pack_grouped(stored), stated(stored)
        assert torch.equal(ok.unpack_grouped(weight), values)
        check_product(weight, values)
        assert torch.equal(ok.grouped_linear(torch.eye(in_features), weight).T, values)


@pytest.mark.parametrize("finish", [Finish.TIMES, Finish.OVER], ids=["times", "over"])
@pytest.mark.parametrize(
    ("codes", "scales"), [(4, torch.float8_e4m3fn), (torch.int8, torch.float32)], ids=["scales", "values"]
)
def test_a_factor_is_for_scales_in_8_bits_or_for_values(codes, scales, finish):
    stored = random_codes(codes, scales, 16, 192, finish=finish, factor=1.7)
    weight, values = ok.pack_grouped(stored), stated(stored)
    assert torch.equal(ok.unpack_grouped(weight), values)
    check_product(weight, values)


@pytest.mark.parametrize("size", [8, 16, 24], ids=str)
def test_small_groups_have_4_bits(size):
    stored = random_codes(4, torch.float16, size, 208, zeros=True)
    weight, values = ok.pack_grouped(stored), stated(stored)
    assert torch.equal(ok.unpack_grouped(weight), values)
    check_product(weight, values)


@pytest.mark.parametrize("byte", [0, 1, 254, 255], ids=str)
def test_powers_of_two_reach_from_the_least_number_to_infinity(byte):
    codes = torch.ones(32, 32, dtype=torch.uint8)
    stored = GroupedCodes(codes, torch.full((32, 1), byte).byte(), 32, 4, E2M1)
    expected = {0: 2.0**-128, 1: 2.0**-127, 254: 2.0**126, 255: float("inf")}[byte]
    weight = ok.pack_grouped(stored)
    assert torch.equal(ok.unpack_grouped(weight), torch.full((32, 32), expected))
    if byte < 255:
        assert torch.equal(ok.grouped_linear(torch.eye(32), weight), torch.full((32, 32), expected))


@pytest.mark.parametrize("threads", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize(
    ("zeros", "order"), list(itertools.product([False, True], repeat=2)), ids=["plain", "order", "zeros", "both"]
)
@every_codes
def test_a_row_has_the_same_bits_in_every_batch(codes, zeros, order, threads):
    if codes == torch.float8_e4m3fn and zeros:
        pytest.skip("floats have no zeros")
    weight = ok.pack_grouped(random_codes(codes, torch.float16, 64, 416, 165, zeros=zeros, order=order))
    x = random_rows(65, 416)
    with ok.native_threads(threads):
        whole = ok.grouped_linear(x, weight)
        for num_rows in (1, 2, 3, 4, 5, 8, 9, 33, 64):
            assert torch.equal(ok.grouped_linear(x[65 - num_rows :], weight), whole[65 - num_rows :])


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_the_arg_max_is_that_of_the_products(num_tokens):
    weight = ok.pack_grouped(random_codes(4, torch.float16, 64, 192, 165, zeros=True, order=True))
    x = random_rows(num_tokens, 192)
    products = ok.grouped_linear(x, weight)
    ids, best = ok.grouped_argmax(x, weight)
    assert torch.equal(ids, products.argmax(dim=-1))
    assert torch.equal(best, products.amax(dim=-1))


def test_inputs_that_are_no_numbers_come_out_as_none_in_their_row_alone():
    weight = ok.pack_grouped(random_codes(4, torch.float16, 64, 192, zeros=True))
    x = torch.randn(9, 192)
    x[4, 100] = float("nan")
    product = ok.grouped_linear(x, weight)
    assert product[4].isnan().all()
    assert product[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_activations_of_16_bits_get_products_of_their_own(kind):
    stored = random_codes(4, torch.float16, 32, 96)
    x = torch.randn(5, 96).to(kind)
    product = ok.grouped_linear(x, ok.pack_grouped(stored))
    assert product.dtype == kind
    torch.testing.assert_close(product.float(), (x.double() @ stated(stored).double().T).to(kind).float())


MEMORY = {  # bytes of a file's 256 x 1024 inputs: codes, then scales, then zeros
    "GPTQ, 4 bits, groups of 128": ((4, torch.float16, 128, True), 128 * 1024 + 256 * 8 * 2 + 128 * 8),
    "GPTQ, 4 bits, groups of 32": ((4, torch.float16, 32, True), 128 * 1024 + 256 * 32 * 2 + 128 * 32),
    "GPTQ, 3 bits, groups of 32": ((3, torch.float16, 32, True), 96 * 1024 + 256 * 32 * 2 + 96 * 32),
    "GPTQ, 2 bits, groups of 32": ((2, torch.float16, 32, True), 64 * 1024 + 256 * 32 * 2 + 64 * 32),
    "GPTQ, 8 bits, groups of 32": ((torch.int8, torch.float16, 32, True), 256 * 1024 + 256 * 32 * 2 + 256 * 32),
    "nf4": ((4, torch.float32, 64, False), 128 * 1024 + 256 * 16 * 4),
    "nf4, double quantisation": ((4, NestedScales, 64, False), 128 * 1024 + 256 * 16 + 256 * 4 + 256 * 16 // 8 * 4),
    "MXFP4": ((4, torch.uint8, 32, False), 128 * 1024 + 256 * 32),
    "NVFP4": ((4, torch.float8_e4m3fn, 16, False), 128 * 1024 + 256 * 64),
}


@pytest.mark.parametrize(("kind", "file_bytes"), MEMORY.values(), ids=MEMORY)
def test_memory_is_that_of_the_file(kind, file_bytes):
    codes, scales, group_size, zeros = kind
    weight = ok.pack_grouped(random_codes(codes, scales, group_size, 1024, 256, zeros=zeros))
    assert 0.99 * file_bytes <= weight.num_bytes <= 1.05 * file_bytes


@pytest.mark.usefixtures("native_library")
def test_products_are_recorded():
    weight = ok.pack_grouped(random_codes(4, torch.float16, 64, 192, 33, zeros=True, order=True))
    x, out = torch.randn(6, 192), torch.empty(6, 33)
    with ok.Recording(6) as recording:
        ok.grouped_linear(x, weight, out=out)
        ids, _ = ok.grouped_argmax(x, weight)
    x.copy_(torch.randn(6, 192))
    recording.program.run(4, 4)
    assert torch.equal(out[:4], ok.grouped_linear(x, weight)[:4])
    assert torch.equal(ids[:4], out[:4].argmax(dim=-1))


def test_what_does_not_fit_is_refused():
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 4)
    with pytest.raises(ShapeError, match="group_size is 12"):
        ok.pack_grouped(GroupedCodes(codes, torch.ones(4, 6), 12, 4, torch.ones(16)))
    with pytest.raises(ShapeError, match="group_size is 16"):
        ok.pack_grouped(GroupedCodes(codes, scales, 16, 3, torch.ones(8)))
    with pytest.raises(ShapeError, match="scales has shape"):
        ok.pack_grouped(GroupedCodes(codes, scales, 32, 4, torch.ones(16)))
    with pytest.raises(OptionError, match="levels is None"):
        ok.pack_grouped(GroupedCodes(codes, scales, 16, 4))
    with pytest.raises(OptionError, match="zeros"):
        ok.pack_grouped(GroupedCodes(codes, scales, 16, 4, torch.ones(16), zeros=torch.full((4, 4), 256)))
    weight = ok.pack_grouped(GroupedCodes(codes, scales, 16, 4, torch.ones(16)))
    with pytest.raises(ShapeError, match="x has shape"):
        ok.grouped_linear(torch.zeros(1, 63), weight)
