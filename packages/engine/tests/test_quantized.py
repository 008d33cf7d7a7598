"""Matrices of quantised checkpoints: fused shards of any formats, their biases, tables, and the memory they take."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import Shard
from octavo_engine.quant.blocks import as_blocks
from octavo_engine.quant.grouped import GroupedProduct
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.products import IntegerProduct
from octavo_engine.quant.quantized import Quantized
from octavo_engine.quant.schemes.bitsandbytes import RowBytes, Table4
from octavo_engine.quant.schemes.gptq import GPTQTensor
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import Float4, ScaledFloats
from octavo_kernels import Recording

METHODS = {"packed": Quantized(Packed()), "torch": Quantized(Unquantized())}


def integers(
    num_rows: int, num_columns: int, *, bits: int = 4, group_size: int = 32, zeros: bool = True, shuffled: bool = False
) -> GPTQTensor:
    """Return a random GPTQ linear."""
    num_groups = -(-num_columns // group_size)
    groups = torch.arange(num_columns) // group_size
    return GPTQTensor(
        shape=(num_rows, num_columns),
        bits=bits,
        group_size=group_size,
        scales=(torch.rand(num_groups, num_rows) * 0.1).half(),
        zeros=torch.randint(2**bits, (num_groups, num_rows), dtype=torch.int16) if zeros else None,
        zero_point=2 ** (bits - 1),
        groups=groups[torch.randperm(num_columns)] if shuffled else None,
        words=torch.randint(-(2**31), 2**31, (num_columns * bits // 32, num_rows)).int(),
    )


def floats(block: tuple[int, int]) -> ScaledFloats:
    """Return a random matrix [512, 512] in FP8."""
    codes = torch.randn(512, 512).to(torch.float8_e4m3fn)
    return ScaledFloats((512, 512), codes, torch.rand(512 // block[0], 512 // block[1]), block)


def nf4(*, nested: bool) -> Table4:
    """Return a random matrix [512, 512] of bitsandbytes' 4 bits."""
    codes, num_blocks = torch.randint(256, (512 * 256,), dtype=torch.uint8), 512 * 512 // 64
    if not nested:
        return Table4((512, 512), 64, codes, torch.randn(16), torch.rand(num_blocks))
    absmax, outer = torch.randint(256, (num_blocks,), dtype=torch.uint8), torch.rand(num_blocks // 256)
    return Table4((512, 512), 64, codes, torch.randn(16), absmax, 256, torch.randn(256), outer, 0.5)


SHARED: dict[str, tuple[Callable[[], QuantizedTensor], tuple[float, float]]] = {
    "GPTQ": (lambda: integers(512, 512, group_size=128), (1, 1)),
    "GPTQ by channel": (lambda: integers(512, 512, group_size=512), (1, 1.05)),
    "GPTQ, desc_act": (lambda: integers(512, 512, group_size=128, shuffled=True), (1.1, 1.2)),
    "FP8 by block": (lambda: floats((128, 128)), (1, 1)),
    "FP8 by channel": (lambda: floats((1, 512)), (1, 1.03)),
    "4-bit floats": (
        lambda: Float4((512, 512), 16, torch.randint(256, (512, 256), dtype=torch.uint8), torch.rand(512, 32).half()),
        (1, 1),
    ),
    "nf4": (lambda: nf4(nested=False), (1.01, 1.01)),
    "nf4, double quantisation": (lambda: nf4(nested=True), (1.05, 1.1)),
}


@pytest.mark.parametrize(("make", "most"), SHARED.values(), ids=SHARED)
def test_four_ranks_keep_their_share(make: Callable[[], QuantizedTensor], most: tuple[float, float]) -> None:
    """Together they take as much as the whole, or as many times that as `most` says, by rows and by columns."""
    whole = make()
    for axis, times in enumerate(most):
        parts = [whole.part(Cut(axis, start, start + 128, 512)) for start in range(0, 512, 128)]
        assert torch.equal(torch.cat([part.values() for part in parts], dim=axis), whole.values())
        assert sum(part.num_bytes for part in parts) <= times * whole.num_bytes


def values(tensor: Tensor | QuantizedTensor) -> Tensor:
    return tensor.float() if isinstance(tensor, Tensor) else tensor.values()


def fused(tensors: Sequence[Any], biases: Sequence[Tensor] | None, options: LayerOptions) -> Linear:
    """Return a finished linear of these shards, filled from the last to the first."""
    names = "abcdef"[: len(tensors)]
    shards = [Shard(name, tensor.shape[0]) for name, tensor in zip(names, tensors, strict=True)]
    linear = Linear(tensors[0].shape[1], shards, bias=biases is not None, options=options)
    slots = {slot.name: slot for slot in linear.slots("")}
    for index in reversed(range(len(tensors))):
        slots[f"{names[index]}.weight"].fill(tensors[index])
        if biases is not None:
            slots[f"{names[index]}.bias"].fill(biases[index])
    linear.finish()
    return linear


SHARDS = {
    "one": lambda: [integers(40, 96)],
    "several layouts": lambda: [integers(40, 96), integers(33, 96, bits=8, group_size=96), integers(7, 96, bits=2)],
    "orders of inputs": lambda: [integers(8, 96, shuffled=True), integers(9, 96, bits=3, shuffled=True)],
    "groups of three": lambda: [integers(8, 96, group_size=3, zeros=False)],
    "some native": lambda: [integers(8, 96, zeros=False), integers(7, 96), integers(9, 96, bits=8, zeros=False)],
    "some dense": lambda: [torch.randn(5, 96), integers(8, 96), torch.randn(9, 96).bfloat16(), torch.randn(4, 96)],
    "all dense": lambda: [torch.randn(5, 96), torch.randn(9, 96).bfloat16()],
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", SHARDS.values(), ids=SHARDS)
def test_shards_of_any_formats_write_their_columns(make: Any, method: Quantized, with_bias: bool) -> None:
    tensors = make()
    biases = [torch.randn(tensor.shape[0]) for tensor in tensors] if with_bias else None
    linear = fused(tensors, biases, LayerOptions(quant=method))
    x = torch.randn(7, 96)
    expected = torch.cat([x.double() @ values(tensor).double().T for tensor in tensors], dim=-1)
    if biases is not None:
        expected += torch.cat(list(biases))
    torch.testing.assert_close(linear(x), expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(linear(x[3:4]), linear(x)[3:4])


def test_activations_of_16_bits_get_products_of_their_own_dtype() -> None:
    options = LayerOptions(quant=METHODS["torch"], dtype=torch.bfloat16)
    tensors = [integers(8, 96), integers(8, 96, bits=2)]
    product = fused(tensors, [torch.randn(8), torch.randn(8)], options)(torch.randn(3, 96).bfloat16())
    assert product.dtype == torch.bfloat16
    assert product.isfinite().all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("quantised", [True, False], ids=["codes", "dense"])
def test_a_table_is_read_and_multiplied(quantised: bool, method: Quantized) -> None:
    options = LayerOptions(quant=method)
    table = integers(50, 64) if quantised else torch.randn(50, 64)
    embedding = Embedding(50, 64, options=options)
    head = LMHead(embedding, tied=True, options=options)
    (slot,) = embedding.slots("table")
    slot.fill(table)
    embedding.finish()
    head.finish()
    assert torch.equal(embedding(torch.tensor([49, 0])), values(table)[[49, 0]])
    x = torch.randn(3, 64)
    torch.testing.assert_close(head(x), x @ values(table).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_arg_max_of_a_quantised_head_is_that_of_its_products(method: Quantized) -> None:
    options = LayerOptions(quant=method)
    head = LMHead(Embedding(50, 64, options=options), tied=False, options=options)
    (slot,) = head.slots("lm_head")
    slot.fill(integers(50, 64))
    head.finish()
    x = torch.randn(3, 64)
    ids, best = head.greedy(x)
    assert torch.equal(ids, head(x).argmax(dim=-1))
    assert torch.equal(best, head(x).amax(dim=-1))


def float4(scales: Tensor, **factor: Tensor) -> Float4:
    """Return a random matrix [512, 512] of 4-bit floats."""
    codes = torch.randint(256, (512, 256), dtype=torch.uint8)
    return Float4((512, 512), 512 // scales.shape[1], codes, scales, **factor)


def powers() -> Tensor:
    return torch.randint(110, 127, (512, 16), dtype=torch.uint8)


def e4m3() -> Tensor:
    return torch.rand(512, 32).to(torch.float8_e4m3fn)


NATIVE: dict[str, tuple[Callable[[], QuantizedTensor], float]] = {  # and the bytes of each input's code in a file
    "zeros": (lambda: integers(512, 512), 0.5),
    "zeros, 8 bits": (lambda: integers(512, 512, bits=8), 1),
    "zeros, 3 bits": (lambda: integers(512, 512, bits=3), 0.375),
    "zeros, 2 bits": (lambda: integers(512, 512, bits=2), 0.25),
    "zeros, one group": (lambda: integers(512, 512, group_size=512), 0.5),
    "groups of 128": (lambda: integers(512, 512, group_size=128, zeros=False), 0.5),
    "shuffled": (lambda: integers(512, 512, group_size=128, zeros=False, shuffled=True), 0.5),
    "shuffled, zeros": (lambda: integers(512, 512, bits=8, shuffled=True), 1),
    "bf16 scales": (lambda: replace(integers(512, 512), scales=torch.rand(16, 512).bfloat16() * 1e-6), 0.5),
    "FP8 by block": (lambda: floats((128, 128)), 1),
    "FP8 by channel": (lambda: floats((1, 512)), 1),
    "FP8 by tensor": (lambda: floats((512, 512)), 1),
    "MXFP4": (lambda: float4(powers()), 0.5),
    "NVFP4, divisor": (lambda: float4(e4m3(), divisor=torch.tensor([3.7])), 0.5),
    "NVFP4, factor": (lambda: float4(e4m3(), factor=torch.tensor(0.37)), 0.5),
    "nf4": (lambda: nf4(nested=False), 0.5),
    "nf4, double quantisation": (lambda: nf4(nested=True), 0.5),
    "int8": (lambda: RowBytes((512, 512), torch.randint(-127, 128, (512, 512)).to(torch.int8), torch.rand(512)), 1),
}


@pytest.mark.parametrize("int8_activations", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize(("make", "code_bytes"), NATIVE.values(), ids=NATIVE)
def test_all_formats_are_multiplied_natively_in_the_memory_of_their_files(
    make: Any, code_bytes: float, int8_activations: bool
) -> None:
    weight = make()
    quant = Quantized(Packed(int8_activations=int8_activations))
    linear = fused([weight], None, LayerOptions(quant=quant))
    if not linear.parameters.parts:  # in mode `fast` blocks, whose inputs are rounded
        assert int8_activations
        return
    (part,) = linear.parameters.parts
    assert isinstance(part.product, GroupedProduct)
    x = torch.randn(70, 512)
    product = linear(x)
    values = weight.values().double()
    expected, size = x.double() @ values.T, x.abs().double() @ values.abs().T
    assert ((product - expected).abs() <= 8 * 2**-24 * size).all()
    for rows in (1, 2, 13, 33):
        assert torch.equal(linear(x[20 : 20 + rows]), product[20 : 20 + rows])
    packed_bytes = int(512 * 512 * code_bytes) + bytes_beside_codes(weight)
    assert 0.99 * packed_bytes <= linear.parameters.num_bytes <= 1.05 * packed_bytes


def bytes_beside_codes(weight: QuantizedTensor) -> int:
    """Return the bytes of a file's scales, zeros and order, of which zeros have as many bits as codes."""
    if isinstance(weight, GPTQTensor):
        zeros = 0 if weight.zeros is None else weight.zeros.numel() * weight.bits // 8
        return zeros + weight.scales.nbytes + (0 if weight.groups is None else 4 * weight.shape[1])
    return weight.num_bytes - weight.codes.nbytes  # type: ignore[attr-defined]


def fp8_with_nan() -> ScaledFloats:
    weight = floats((1, 512))
    weight.codes[7, 9] = float("nan")
    return weight


EXPANDED: dict[str, Callable[[], QuantizedTensor]] = {
    "groups of three": lambda: integers(8, 96, group_size=3),
    "3 bits, groups of 16": lambda: integers(8, 96, bits=3, group_size=16),
    "uneven groups": lambda: integers(8, 512, group_size=128, shuffled=True).part(Cut(1, 0, 256, 512)),
    "FP8 with a NaN": fp8_with_nan,
    "e5m2": lambda: replace(floats((1, 512)), codes=torch.randn(512, 512).to(torch.float8_e5m2)),
    "blocks across rows": lambda: Table4(
        (64, 96), 64, torch.randint(256, (64 * 48,), dtype=torch.uint8), torch.randn(16), torch.rand(96)
    ),
    "two factors": lambda: float4(e4m3(), divisor=torch.tensor(3.7), factor=torch.tensor(2.1)),
}


@pytest.mark.parametrize("make", EXPANDED.values(), ids=EXPANDED)
def test_what_has_no_native_product_is_expanded(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    weight = make()
    with caplog.at_level("INFO", "octavo_engine.quant.products"):
        linear = fused([weight], None, LayerOptions(quant=METHODS["packed"]))
    assert "torch expands it" in caplog.text
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(linear(x), x @ weight.values().T, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_parts_are_recorded(with_bias: bool) -> None:
    tensors = [integers(40, 512), nf4(nested=True), integers(512, 512, bits=3), float4(powers())]
    biases = [torch.randn(tensor.shape[0]) for tensor in tensors] if with_bias else None
    linear = fused(tensors, biases, LayerOptions(quant=METHODS["packed"]))
    x = torch.randn(5, 512)
    with Recording(5) as recording:
        product = linear(x)
    recording.program.run(5, 5)
    assert torch.equal(product, linear(x))


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_by_integers_is_that_of_the_values(bits: int, shuffled: bool) -> None:
    weight = integers(40, 96, bits=bits, shuffled=shuffled)
    x, bias = torch.randn(7, 96), torch.randn(40)
    product = IntegerProduct(weight, torch.device("cpu"))
    torch.testing.assert_close(product(x, bias), x @ weight.values().T + bias, rtol=1e-4, atol=1e-4)


PACKED = {
    "4 bits": (integers(256, 512, group_size=128, zeros=False), 256 * 512 // 2 + 2 * 256 * 4),
    "4 bits with zeros": (integers(256, 512, group_size=128), 256 * 512 // 2 + 2 * 256 * 4 + 256 * 4 // 2),
    "8 bits with zeros": (integers(256, 512, bits=8, group_size=64), 256 * 512 + 2 * 256 * 8 + 256 * 8),
    "3 bits": (integers(256, 512, bits=3, group_size=128, zeros=False), 256 * 512 * 3 // 8 + 2 * 256 * 4),
}


@pytest.mark.parametrize(("tensor", "packed_bytes"), PACKED.values(), ids=PACKED)
def test_memory_is_that_of_the_packed_weight(tensor: GPTQTensor, packed_bytes: int) -> None:
    linear = fused([tensor], None, LayerOptions(quant=METHODS["torch"]))
    assert packed_bytes <= linear.parameters.num_bytes <= 1.05 * packed_bytes
    assert not linear.parameters.stored
    native = fused([tensor], None, LayerOptions(quant=METHODS["packed"])).parameters
    num_bytes = native.num_bytes or sum(part.weight.num_bytes for part in native.dense.parts)
    assert packed_bytes <= num_bytes <= 1.05 * packed_bytes
    if tensor.bits != 3:
        assert packed_bytes <= IntegerProduct(tensor, torch.device("cpu")).num_bytes <= 1.05 * packed_bytes


HELD_BY_BLOCKS = {
    "4 bits": (lambda: integers(40, 96, zeros=False), TensorType.Q4_0),
    "8 bits": (lambda: integers(40, 96, bits=8, zeros=False), TensorType.Q8_0),
    "groups of 64": (lambda: integers(33, 128, group_size=64, zeros=False), TensorType.Q4_0),
    "one group": (lambda: integers(33, 96, group_size=96, zeros=False), TensorType.Q4_0),
    "zeros that are all 8": (lambda: with_zeros(8), TensorType.Q4_0),
    "zeros that are not": (lambda: with_zeros(7), None),
    "3 bits": (lambda: integers(32, 96, bits=3, zeros=False), None),
    "groups of 16": (lambda: integers(32, 96, group_size=16, zeros=False), None),
    "groups in another order": (lambda: integers(32, 96, zeros=False, shuffled=True), None),
    "inputs that fill no block": (lambda: integers(32, 72, group_size=72, zeros=False), None),
    "scales that fp16 has not": (
        lambda: replace(integers(32, 96, zeros=False), scales=torch.full((3, 32), 1e-9)),
        None,
    ),
}


def with_zeros(zero: int) -> GPTQTensor:
    weight = integers(32, 96)
    assert weight.zeros is not None
    zeros = torch.full_like(weight.zeros, 8)
    zeros[1, 2] = zero
    return replace(weight, zeros=zeros)


@pytest.mark.parametrize(("make", "kind"), HELD_BY_BLOCKS.values(), ids=HELD_BY_BLOCKS)
def test_what_blocks_hold_exactly_is_multiplied_natively(make: Any, kind: TensorType | None) -> None:
    weight = make()
    blocks = as_blocks(weight)
    assert (blocks and blocks.type) == kind
    if blocks is not None:
        assert torch.equal(blocks.values(), weight.values())
        fast = LayerOptions(quant=Quantized(Packed(int8_activations=True)))
        assert fused([weight, weight], None, fast).parameters.dense is not None
        exact = fused([weight, weight], None, LayerOptions(quant=METHODS["packed"])).parameters
        assert (exact.dense is not None) == (weight.group_size == 32)  # larger groups would take more memory
        assert fused([weight, weight], None, LayerOptions(quant=METHODS["torch"])).parameters.dense is None
