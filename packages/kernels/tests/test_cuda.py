"""The kernels in CUDA C++: copies of blocks on the host, and when compiled kernels are chosen.

On a GPU with a build of the library `test_cache_ops.py` runs them by OCTAVO_BACKEND=cuda, against the reference.
"""

import ctypes
import shutil
import subprocess
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch
from octavo_kernels.cuda import cache_ops, load

SOURCES = Path(__file__).resolve().parents[1] / "csrc_cuda"
ON_HOST = Path(__file__).parent / "cuda_on_host" / "copy_blocks.cpp"
GPU = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def where_kernels_are_compiled(backend):
    """Skip everything where `test_compile.py` compiles nothing either: compilers take their time."""
    if backend not in (Backend.TRITON, Backend.CUDA):
        pytest.skip("compiled in the triton run only")


# -- the kernel on the host ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernel's own code, compiled by the host's compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH to compile the kernel for the host")
    library = tmp_path_factory.mktemp("on_host") / "copy_blocks.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    sanitizer = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-static-libubsan")  # misaligned vectors
    subprocess.run([compiler, *flags, *sanitizer, f"-I{SOURCES}", str(ON_HOST), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).copy_blocks_on_host
    function.restype = ctypes.c_int64
    return function


@pytest.fixture
def copy_on_host(on_host, monkeypatch):
    """`cuda.cache_ops.copy_blocks` as it is, with the kernel on the host behind it; see `copy_blocks.cpp`."""

    def op(parts, src, dst, aside, stream):
        assert stream == 5
        assert all(part.dim() == 2 and part.stride(1) == 1 for part in parts)
        assert src.is_contiguous()
        assert dst.is_contiguous()
        longs = ctypes.c_int64 * len(parts)
        taken = on_host(
            (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
            longs(*(part.stride(0) * part.element_size() for part in parts)),
            longs(*(part.shape[1] * part.element_size() for part in parts)),
            len(parts),
            ctypes.c_void_p(aside.data_ptr()),
            ctypes.c_int64(aside.numel()),
            ctypes.c_void_p(src.data_ptr()),
            ctypes.c_void_p(dst.data_ptr()),
            ctypes.c_int64(len(src)),
            copy.most_in_grid,
            len(src),
        )
        assert taken == aside.numel()

    def copy(caches, src, dst, most_in_grid):
        copy.most_in_grid = most_in_grid
        cache_ops.copy_blocks(caches, src, dst)

    monkeypatch.setattr(cache_ops, "ops", lambda: SimpleNamespace(copy_blocks=op))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    return copy


def make(shape, dtype=torch.float32, **options):
    values = torch.randint(0, 127, shape, **options)
    return values.to(dtype)


def cases():
    torch.manual_seed(0)
    pair = make((6, 2, 4, 3, 16))
    wide = make((6, 40), torch.uint8)
    yield "two layers", [make((6, 2, 3, 16)), make((6, 2, 3, 16))]
    yield "views of one allocation", [pair[:, 0], pair[:, 1]]
    yield "heads inside tokens", [make((6, 4, 3, 16), torch.bfloat16).transpose(1, 2)]
    yield "scales beside codes", [make((6, 3, 8, 16), torch.int8), make((6, 3, 8))]
    yield "rows of 8, 4, 2 and 1 bytes", [wide[:, 8:16], wide[:, 4:8], wide[:, 2:4], wide[:, 17:24]]
    yield "more parts than a table has", [make((6, 5), torch.int16) for _ in range(150)]
    yield "rows of several spans", [make((6, 50_000), torch.int16), make((6, 7))]
    yield "gaps inside a block", [make((6, 4, 9))[:, :, 1:6]]


CASES = dict(cases())
COPIES = {
    "one": ([0], [2]),
    "swap": ([0, 1], [1, 0]),
    "chain": ([0, 1, 2], [1, 2, 3]),
    "one to two": ([5, 5], [0, 1]),
    "onto itself": ([3], [3]),
    "all turned around": ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("copies", COPIES)
def test_the_kernel_copies_what_the_reference_copies(copy_on_host, name, copies, monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    ids = torch.tensor(COPIES[copies]).T.contiguous().T  # rows with gaps
    for most_in_grid in (1 << 30, 2):
        found, expected = (views_of_copies(CASES[name]) for _ in range(2))
        copy_on_host(found, *ids, most_in_grid)
        ok.copy_blocks(expected, *ids)
        assert all(torch.equal(one, other) for one, other in zip(whole(found), whole(expected), strict=True))


def views_of_copies(caches):
    """Copy the memory that caches are in or views of, and return the same views of the copies."""
    bases = {id(base): base.clone(memory_format=torch.preserve_format) for base in whole(caches)}
    return [
        bases[id(base)].as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for cache, base in zip(caches, whole(caches), strict=True)
    ]


def whole(caches):
    """Return all memory that caches are in, so that a write beside them shows."""
    return [cache if cache._base is None else cache._base for cache in caches]


# -- chosen ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A library that is there, on a machine with a GPU; return a function that says what loading it comes to."""
    path = tmp_path / load.NAME
    path.write_bytes(b"")
    outcome: list[str | None] = [None]
    monkeypatch.setenv("OCTAVO_CUDA_LIBRARY", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "_why_not_loaded", lambda _: outcome[0])
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    return lambda reason: outcome.__setitem__(0, reason)


def test_what_is_compiled_is_taken_before_triton_and_the_rest_is_tritons(installed):
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("paged_attention", GPU) is Backend.TRITON
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("copy_blocks", "cpu") is Backend.CPU
    assert _dispatch.implementation("copy_blocks", GPU) is cache_ops.copy_blocks
    assert Backend.CUDA in ok.available_backends()


def test_attention_is_compiled_where_it_is_asked_for(installed, monkeypatch):
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    for name, value in (("OCTAVO_CUDA_OPS", "copy_blocks, paged_attention"), ("OCTAVO_BACKEND", "cuda")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert ok.choose("paged_attention", GPU) is Backend.CUDA
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention")
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("paged_attention", "cpu") is Backend.CPU
    installed("it cannot be loaded")
    expected = r"paged_attention: the cuda backend does not serve it here, triton does \(it cannot be loaded\)"
    with pytest.warns(ok.BackendFallbackWarning, match=expected):
        assert _dispatch.implementation("paged_attention", GPU) is Backend.TRITON
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention,write_kv")
    expected = (
        "OCTAVO_CUDA_OPS is 'paged_attention,write_kv', expected names of copy_blocks, paged_attention, with comm"
    )
    with pytest.raises(ok.OptionError, match=expected):
        ok.choose("paged_attention", GPU)


def test_attention_that_is_asked_for_and_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(load, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "_unavailable", lambda backend, *_: "none" if backend is Backend.CUDA else None)
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention")
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    with pytest.warns(ok.BackendFallbackWarning, match=r"paged_attention: .* triton does \(none\)"):
        assert _dispatch.implementation("paged_attention", GPU) is Backend.TRITON


def test_attention_that_is_asked_for_without_triton_is_said(installed, monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention")
    expected = (
        r"paged_attention: the cuda .* cpu does \(triton, which plans and joins paged_attention, is not installed"
    )
    with pytest.warns(ok.BackendFallbackWarning, match=expected):
        assert _dispatch.implementation("paged_attention", GPU) is Backend.CPU
    monkeypatch.setenv("OCTAVO_BACKEND", "cuda")
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    with pytest.raises(ok.BackendUnavailable, match="OCTAVO_BACKEND=cuda: triton, which plans and joins"):
        ok.choose("paged_attention", GPU)


def test_a_library_that_cannot_be_loaded_is_said_and_triton_serves(installed, monkeypatch):
    installed("broken.so cannot be loaded")
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    assert ok.choose("copy_blocks", GPU) is Backend.TRITON
    expected = r"copy_blocks: the cuda backend does not serve it here, triton does \(broken.so cannot be loaded\)"
    with pytest.warns(ok.BackendFallbackWarning, match=expected):
        assert _dispatch.implementation("copy_blocks", GPU) is Backend.TRITON
    found = ok.Fallback(Backend.CUDA, Backend.TRITON, 1, "broken.so cannot be loaded")
    assert ok.fallbacks() == {"copy_blocks": found}


def test_forced_cuda_leaves_other_ops_to_triton_and_says_so(installed, monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cuda")
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("pack_weight", GPU) is Backend.CPU
    with pytest.warns(
        ok.BackendFallbackWarning, match="write_kv: the cuda backend does not serve it here, triton does"
    ):
        _dispatch.implementation("write_kv", GPU)
    installed("the library cannot be loaded")
    with pytest.raises(ok.BackendUnavailable, match="OCTAVO_BACKEND=cuda: the library cannot be loaded"):
        ok.choose("copy_blocks", GPU)


def test_without_a_library_triton_serves_without_a_word(monkeypatch):
    monkeypatch.setattr(load, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "_unavailable", lambda backend, *_: None)
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.implementation("copy_blocks", GPU) is Backend.TRITON


def test_a_file_that_is_no_library_is_the_reason(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    reason = load.load(path)
    assert reason is not None
    assert "broken.so cannot be loaded" in reason
    assert "build it again with csrc_cuda/build.py" in reason
