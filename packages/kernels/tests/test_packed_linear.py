"""Products by packed weights in every format and dtype of activations, against fp64 of the unpacked values."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat, _spans
from octavo_kernels.testing import assert_close

DENSE = {WeightFormat.F32: torch.float32, WeightFormat.BF16: torch.bfloat16, WeightFormat.F16: torch.float16}
HALVES = {  # where the f16 numbers of a stored block begin, and how large they are drawn
    WeightFormat.Q4_0: ((0,), 0.03),
    WeightFormat.Q4_1: ((0, 2), 0.03),
    WeightFormat.Q8_0: ((0,), 0.003),
    WeightFormat.Q5_0: ((0,), 0.03),
    WeightFormat.Q5_1: ((0, 2), 0.03),
    WeightFormat.Q2_K: ((80, 82), 0.01),
    WeightFormat.Q3_K: ((108,), 0.005),
    WeightFormat.Q4_K: ((0, 2), 0.001),
    WeightFormat.Q5_K: ((0, 2), 0.001),
    WeightFormat.Q6_K: ((208,), 0.0005),
    WeightFormat.IQ4_NL: ((0,), 0.003),
    WeightFormat.IQ4_XS: ((0,), 0.0003),
}

IN_ALL_DTYPES = (WeightFormat.F32, WeightFormat.Q4_1, WeightFormat.Q8_0, WeightFormat.Q6_K)

every_format = pytest.mark.parametrize("weight_format", [*DENSE, *HALVES], ids=lambda item: item.value)
block_formats = pytest.mark.parametrize("weight_format", HALVES, ids=lambda item: item.value)


@pytest.fixture
def spans(monkeypatch):
    """Cut even small weights into spans."""
    monkeypatch.setattr(_spans, "_LEAST_BLOCKS", 1)
    monkeypatch.setattr(_spans, "_PROGRAMS", 4)


def random_weight(weight_format, out_features, in_features, device):
    """A weight of random codes and scales of either sign."""
    rng = np.random.default_rng(0)
    if weight_format in DENSE:
        stored = torch.from_numpy(rng.standard_normal((out_features, in_features), np.float32)).to(DENSE[weight_format])
    else:
        blocks = in_features // weight_format.block_inputs
        raw = rng.integers(0, 256, (out_features, blocks, weight_format.block_bytes), dtype=np.uint8)
        starts, largest = HALVES[weight_format]
        for start in starts:
            halves = rng.uniform(-largest, largest, raw.shape[:2]).astype("<f2")
            raw[:, :, start : start + 2] = halves[..., None].view(np.uint8)
        stored = torch.from_numpy(raw.reshape(out_features, -1))
    return ok.pack_weight(stored.to(device), weight_format, in_features=in_features)


def random_rows(num_tokens, in_features, dtype, device):
    """Rows that are a part of wider ones, so that their stride is not their length."""
    wide = torch.randn(num_tokens, in_features + 16, generator=torch.Generator().manual_seed(1))
    return wide.to(dtype).to(device)[:, :in_features]


@every_format
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_products_equal_those_of_the_values(device, interpreted, spans, weight_format, kind):
    if interpreted and kind != torch.bfloat16 and weight_format not in IN_ALL_DTYPES:
        pytest.skip("in the interpreter a few formats stand for all")
    in_features = 512 if weight_format.block_inputs == 256 else 160  # two blocks, or a step and a part of one
    weight = random_weight(weight_format, 70, in_features, device)
    bias = torch.linspace(-1, 1, 70, device=device)
    values = ok.unpack_weight(weight).double()
    for num_tokens in (17,) if interpreted else (0, 1, 17, 33):
        x = random_rows(num_tokens, in_features, kind, device)
        wide = torch.full((num_tokens, 73), float("nan"), dtype=kind, device=device)
        workspace = torch.full((ok.packed_linear_workspace(num_tokens, weight),), 255, dtype=torch.uint8, device=device)
        out = ok.packed_linear(x, weight, bias, out=wide[:, :70], workspace=workspace)
        assert out.data_ptr() == wide.data_ptr()
        assert_close(out / 8, (x.double() @ values.T + bias.double()) / 8)
        assert wide[:, 70:].isnan().all()


@block_formats
def test_products_of_rounded_inputs_equal_the_reference_in_halves_too(device, oracle, weight_format):
    weight = random_weight(weight_format, 70, 256, device)
    x = random_rows(5, 256, torch.bfloat16, device)
    expected = oracle(ok.packed_linear, x.float(), weight, int8_activations=True)
    assert_close(ok.packed_linear(x, weight, int8_activations=True), expected.double())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_scales_are_not_rounded_to_the_dtype_of_the_activations(device, kind):
    """Rows of an identity bring the values out, rounded once; and sums are those of the values in full."""
    weight = random_weight(WeightFormat.Q4_0, 64, 32, device)
    values = ok.unpack_weight(weight)
    x = torch.eye(32, dtype=kind, device=device)
    assert torch.equal(ok.packed_linear(x, weight), values.T.to(kind))
    x = torch.full((1, 32), 1.0, dtype=kind, device=device)
    total = values.double().sum(dim=1)
    assert torch.equal(ok.packed_linear(x, weight)[0], total.float().to(kind))
    assert not torch.equal(values.to(kind).double().sum(dim=1).float().to(kind), total.float().to(kind))


@pytest.mark.parametrize("weight_format", [WeightFormat.Q4_1, WeightFormat.Q5_K], ids=lambda item: item.value)
def test_spans_have_the_same_sums_in_one_program_bit_for_bit(device, spans, monkeypatch, weight_format):
    weight = random_weight(weight_format, 70, 768, device)
    x = random_rows(7, 768, torch.float32, device)
    split = ok.packed_linear(x, weight)
    assert ok.packed_linear_workspace(7, weight) == 2 * 7 * 70 * 4
    monkeypatch.setattr(_spans, "_SPLIT_ROWS", 0)
    assert ok.packed_linear_workspace(7, weight) == 0
    assert torch.equal(ok.packed_linear(x, weight), split)


def test_inputs_that_end_within_a_step_are_all_that_counts(device, spans):
    """A step is 128 inputs; 160 end in the second one, and what stands behind them is another weight."""
    for weight_format, in_features in ((WeightFormat.Q8_0, 160), (WeightFormat.BF16, 131)):
        weight = random_weight(weight_format, 33, in_features, device)
        x = torch.full((2, 256), float("nan"), device=device)
        x[:, :in_features] = random_rows(2, in_features, torch.float32, device)
        expected = x[:, :in_features].double() @ ok.unpack_weight(weight).double().T
        assert_close(ok.packed_linear(x[:, :in_features], weight) / 8, expected / 8)


def test_what_is_compiled_is_what_is_launched(device):
    """The constants of compiled/products.py, which the gate compiles without torch's tensors."""
    pytest.importorskip("triton")
    from octavo_kernels.triton.matmul import _constants, _views

    listed = runpy.run_path(str(Path(__file__).parent / "compiled" / "products.py"))["PACKED"]
    for name, constants in listed.items():
        weight = random_weight(WeightFormat(name), 33, 512, device)
        assert _constants(weight) == constants, name
        assert [None if view is None else view.dtype for view in _views(weight)] == (
            [torch.bfloat16, None, None] if name == "bf16" else [torch.int32, torch.float16, torch.int8]
        )


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_a_row_of_fp32_does_not_depend_on_the_rows_beside_it_bit_for_bit(device, int8):
    weight = random_weight(WeightFormat.Q5_1, 70, 128, device)
    x = random_rows(65, 128, torch.float32, device)
    together = ok.packed_linear(x, weight, int8_activations=int8)
    for rows in (slice(0, 1), slice(64, 65), slice(3, 20), slice(1, 65)):
        assert torch.equal(ok.packed_linear(x[rows], weight, int8_activations=int8), together[rows])


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter is NumPy
def test_an_input_that_is_not_finite_spoils_its_row_alone_in_halves_too(device, int8, value):
    weight = random_weight(WeightFormat.Q4_1, 40, 64, device)
    x = random_rows(3, 64, torch.bfloat16, device).contiguous()
    good = ok.packed_linear(x, weight, int8_activations=int8)
    x[1, 40] = value
    product = ok.packed_linear(x, weight, int8_activations=int8)
    assert not product[1].isfinite().any()
    assert torch.equal(product[[0, 2]], good[[0, 2]])


def test_a_workspace_that_is_too_small_is_refused(device, spans):
    weight = random_weight(WeightFormat.Q4_0, 70, 512, device)
    x = random_rows(1, 512, torch.float32, device)
    with pytest.raises(ok.ShapeError, match="packed_linear: workspace has 4 bytes, expected at least 560"):
        ok.packed_linear(x, weight, workspace=torch.zeros(4, dtype=torch.uint8, device=device))


def test_half_precision_is_served_by_torch_on_a_cpu_and_counted(backend, native_library):
    weight = random_weight(WeightFormat.Q4_0, 33, 64, "cpu")
    ok.packed_linear(torch.zeros(1, 64, dtype=torch.bfloat16), weight)
    found = ok.fallbacks()["packed_linear"]
    assert (found.used, found.reason) == ("torch", "x is not float32; convert it with .float()")
