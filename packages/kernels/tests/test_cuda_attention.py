"""Decode attention in CUDA C++: its own code on the host, between Triton's plan and join in the interpreter.

`cuda_on_host/device.h` has what a GPU would do. On a GPU with a build of the library, OCTAVO_BACKEND=cuda runs the same
cases there.
"""

import importlib.util
import shutil
import subprocess
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch
from octavo_kernels import attention as public
from octavo_kernels.testing import assert_close, make_paged_inputs

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc_cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
HOST_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZER = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")  # of vectors


def load_build():
    spec = importlib.util.spec_from_file_location("octavo_kernels_cuda_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_for_host(folder):
    """Compile the kernel and its binding for tensors of the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH to compile the kernel for the host")
    build = load_build()
    kernel, ops, library = folder / "attention.o", folder / "ops.o", folder / "on_host.so"
    source = str(TESTS / "cuda_on_host" / "attention.cpp")
    subprocess.run([compiler, "-c", source, "-o", str(kernel), *HOST_FLAGS, *SANITIZER, f"-I{SOURCES}"], check=True)
    build.compile_binding(compiler, ops, "-DOCTAVO_DEVICE=CPU", "-O0")
    linked = (f"-L{build.torch_folder() / 'lib'}", "-ltorch_cpu", "-fsanitize=undefined", "-static-libubsan")
    subprocess.run([compiler, "-shared", str(kernel), str(ops), "-o", str(library), *linked], check=True)
    return library


@pytest.fixture(scope="module")
def on_host(backend, interpreted, tmp_path_factory):
    """Load the kernel as an op on CPU tensors, unless a GPU serves."""
    if backend is Backend.CUDA:
        return False
    if not interpreted:
        pytest.skip("the plan and the join run in Triton's interpreter")
    torch.ops.load_library(str(build_for_host(tmp_path_factory.mktemp("on_host"))))
    return True


@pytest.fixture
def attend(on_host, monkeypatch, oracle):
    """`paged_attention` by the compiled kernel, on outputs poisoned beforehand, and the same in float64."""
    from octavo_kernels.cuda import attention

    if on_host:
        monkeypatch.setattr(public, "implementation", lambda *_: attention.paged_attention)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))  # seeds the order

    def call(arguments, wide, **options):
        q = arguments["q"]
        out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:2], float("nan"), device=q.device)
        expected_lse = torch.empty_like(lse)
        ok.paged_attention(**arguments, **options, batch_invariant=False, out=out, lse=lse)
        options.pop("workspace", None)
        with monkeypatch.context() as patch:
            patch.setattr(public, "implementation", _dispatch.implementation)
            expected = oracle(ok.paged_attention, **wide, **options, lse=expected_lse)
        return out, lse, expected, expected_lse

    return call


@pytest.fixture
def check(attend):
    """Compare a call with the reference; every row of it, and that padding keeps its poison."""

    def compare(inputs, **options):
        _dispatch._log.clear()
        out, lse, expected, expected_lse = attend(inputs.arguments(), inputs.to(torch.float64).arguments(), **options)
        rows = inputs.num_rows
        assert_close(out[:rows], expected[:rows])
        assert_close(lse[:rows], expected_lse[:rows])
        assert out[rows:].isnan().all()
        assert lse[rows:].isnan().all()
        assert "paged_attention" not in ok.fallbacks()  # it was the compiled kernel

    return compare


EDGES = ([1, 1, 0, 2, 1, 1, 0], [257, 17, 5, 33, 1, 256, 0])  # of blocks, tiles and chunks


@pytest.mark.parametrize(
    ("dtype", "head_dim", "num_heads", "num_kv_heads", "block_size", "layout"),
    [
        (BF16, 128, 8, 2, 16, "hnd"),
        (BF16, 128, 16, 1, 8, "nhd"),
        (BF16, 64, 7, 1, 32, "hnd"),
        (BF16, 256, 2, 1, 16, "nhd"),
        (FP16, 128, 3, 1, 24, "nhd"),
        (FP16, 64, 2, 2, 16, "hnd"),
        (FP32, 128, 4, 1, 16, "hnd"),
        (FP32, 64, 9, 3, 1, "nhd"),
    ],
)
def test_every_kernel_agrees_with_float64(
    check, device, dtype, head_dim, num_heads, num_kv_heads, block_size, layout
):  # fmt: skip
    check(
        make_paged_inputs(
            *EDGES, dtype=dtype, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
            block_size=block_size, layout=layout, num_padding_rows=2, device=device,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("codes", "head_dim", "scaled"), [(torch.int8, 128, True), (FP8, 64, True), (FP8, 128, False)])
def test_caches_of_codes(attend, device, codes, head_dim, scaled):
    inputs = make_paged_inputs(*EDGES, dtype=BF16, head_dim=head_dim, layout="nhd", device=device)
    arguments, wide = inputs.arguments(), inputs.to(torch.float64).arguments()
    for name in ("k", "v"):
        cache = inputs.arguments()[f"{name}_cache"].float()
        vectors = cache.nan_to_num()
        scales = vectors.abs().amax(-1) / 100 + 0.01 if scaled else torch.ones(cache.shape[:3], device=device)
        stored = vectors / scales[..., None]
        stored = (stored.round() if codes == torch.int8 else stored).to(codes)
        wide[f"{name}_cache"] = stored.double() * scales.double()[..., None]
        stored.view(torch.uint8)[cache.isnan()] = 0xFF  # NaN, of e4m3
        arguments[f"{name}_cache"] = stored
        if scaled:
            arguments[f"{name}_scale"] = scales.masked_fill(cache.isnan().any(-1), float("nan"))
    out, lse, expected, expected_lse = attend(arguments, wide)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_a_code_that_is_nan_stays_nan(attend, device):
    inputs = make_paged_inputs([1], [5], dtype=BF16, head_dim=64, device=device)
    arguments = inputs.arguments()
    for name in ("k_cache", "v_cache"):
        arguments[name] = torch.ones(inputs.k_cache.shape, device=device).to(FP8)
    arguments["v_cache"].view(torch.uint8)[inputs.block_table[0, 0], 1, 2, 17] = 0x7F
    out = attend(arguments, inputs.to(torch.float64).arguments())[0]
    found = out.isnan().nonzero().tolist()
    assert found == [[0, 2, 17], [0, 3, 17]]  # the two heads that share key head 1


@pytest.mark.parametrize(
    "options",
    [
        {"window": 300},
        {"window": 1},
        {"window": 20, "causal": False},
        {"soft_cap": 1.5},
        {"window": 280, "soft_cap": 1.5, "alibi_slopes": [0.5, 0.1, 0.01, 0.0], "sinks": [-1.0, 0.0, 1.0, 2.0]},
    ],
    ids=["window", "window of 1", "both sides", "soft cap", "all"],
)
def test_options(check, device, options):
    inputs = make_paged_inputs([1, 2, 1], [600, 301, 16], dtype=BF16, device=device)
    if "window" in options:  # what no query sees may be NaN
        for row, seq_len, query_len in ((0, 600, 1), (1, 301, 2), (2, 16, 1)):
            unseen = torch.arange(max(0, seq_len - query_len - options["window"] + 1), device=device)
            blocks = inputs.block_table[row, unseen // 16].long()
            for cache in (inputs.k_cache, inputs.v_cache):
                cache[blocks, :, unseen % 16] = float("nan")
    check(inputs, **{k: torch.tensor(v, device=device) if isinstance(v, list) else v for k, v in options.items()})


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_queries_of_several_tiles_and_long_ones_in_one_call(check, device, dtype):
    """Up to 64 rows are split, sixteen to a tile; a sequence with more is Triton's."""
    inputs = make_paged_inputs([1, 6, 16, 40, 11], [290, 300, 16, 70, 40], dtype=dtype, num_heads=6, device=device)
    check(inputs)


@pytest.mark.parametrize("num_bytes", [9000, 80], ids=["some slots", "no slots"])
def test_sequences_without_slots_are_left_to_triton(check, device, num_bytes):
    inputs = make_paged_inputs([1, 1, 2, 1], [256, 700, 300, 9], dtype=BF16, num_padding_rows=1, device=device)
    check(inputs, workspace=torch.empty(num_bytes, dtype=torch.uint8, device=device))


def test_positions_behind_the_near_chunks_and_other_strides_for_values(check, device):
    inputs = make_paged_inputs([1], [17_500], dtype=BF16, num_heads=1, num_kv_heads=1, device=device)
    inputs = replace(inputs, k_cache=inputs.k_cache.nan_to_num(), v_cache=inputs.v_cache.nan_to_num())
    inputs = replace(inputs, k_cache=inputs.k_cache.transpose(0, 2).contiguous().transpose(0, 2))
    assert inputs.v_cache.stride() != inputs.k_cache.stride()
    check(inputs, window=1500)  # from before position 16384, where chunks begin to be longer


@pytest.mark.parametrize("num_seqs", [40, 97])
def test_many_sequences_are_found(check, device, num_seqs):
    """More than a warp finds in one step, with idle ones between them."""
    query_lens = [int(index % 3 != 1) for index in range(num_seqs)]
    seq_lens = [1 + index % 4 for index in range(num_seqs)]
    check(make_paged_inputs(query_lens, seq_lens, dtype=BF16, head_dim=64, num_heads=1, num_kv_heads=1, device=device))


NOT_SERVED = {
    "batch-invariant": ({}, {"batch_invariant": True}, "batch_invariant is True"),
    "head_dim": ({"head_dim": 80}, {}, "q is bfloat16, k_cache bfloat16, v_cache bfloat16, and head_dim 80, expected"),
    "wide group": ({"num_heads": 34}, {}, "17 query heads share a key head, expected at most 16"),
    "dtypes": ({"dtype": FP32, "head_dim": 256}, {}, "head_dim 256"),
}


@pytest.mark.parametrize("name", NOT_SERVED)
@pytest.mark.usefixtures("attend")
def test_what_it_does_not_serve_is_tritons_and_said_once(device, monkeypatch, name):
    shape, options, reason = NOT_SERVED[name]
    inputs = make_paged_inputs([1], [17], **{"dtype": BF16} | shape, device=device)
    _dispatch._log.clear()
    options = {"batch_invariant": False} | options
    with pytest.warns(ok.BackendFallbackWarning, match="paged_attention: triton serves it, not the compiled kernel: "):
        out = ok.paged_attention(**inputs.arguments(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ok.paged_attention(**inputs.arguments(), **options)
    found = ok.fallbacks()["paged_attention"]
    assert (found.wanted, found.used, found.num_calls) == (Backend.CUDA, Backend.TRITON, 2)
    assert reason in found.reason
    monkeypatch.setattr(public, "implementation", _dispatch.implementation)
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    assert_close(out, ok.paged_attention(**inputs.to(torch.float64).arguments()))
