"""The choice of a backend: default, forced, unknown, unavailable, and lacking an op."""

import subprocess
import sys
import warnings

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())


def test_cpu_tensors_are_served_by_the_cpu_backend():
    assert ok.choose("paged_attention", "cpu") is Backend.CPU


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_variable_is_read_at_each_call(monkeypatch, name):
    monkeypatch.setenv("OCTAVO_BACKEND", name)
    assert ok.choose("rms_norm", torch.device("cpu")) is Backend(name)
    monkeypatch.setenv("OCTAVO_BACKEND", "")
    assert ok.choose("rms_norm", "cpu") is Backend.CPU


def test_an_unknown_backend_is_refused_with_the_known_names(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cpuu")
    with pytest.raises(ok.OptionError, match="OCTAVO_BACKEND is 'cpuu', expected one of reference, cpu, triton, cuda"):
        ok.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-5)


def test_an_unknown_op_is_refused():
    with pytest.raises(ok.OptionError, match="op is 'softmax'"):
        ok.choose("softmax", "cpu")


def test_forced_cuda_without_a_library_says_how_to_build_one(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cuda")
    monkeypatch.setattr(_dispatch, "library_path", lambda: None)
    monkeypatch.setattr("octavo_kernels.cuda.load.library_path", lambda: None)
    with pytest.raises(ok.BackendUnavailable, match="OCTAVO_BACKEND=cuda: no compiled CUDA kernels are installed"):
        ok.choose("rms_norm", "cpu")
    assert Backend.CUDA not in ok.available_backends()


def test_forced_triton_without_triton_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    with pytest.raises(ok.BackendUnavailable, match=r"install octavo-kernels\[interpreter\]"):
        ok.choose("paged_attention", "cpu")
    assert ok.available_backends() == (Backend.REFERENCE, Backend.CPU)


def test_forced_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    with pytest.raises(ok.BackendUnavailable, match="TRITON_INTERPRET=1"):
        ok.choose("paged_attention", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ok.choose("paged_attention", "cpu") is Backend.TRITON
    assert Backend.TRITON in ok.available_backends()


def test_forced_triton_packs_on_the_host_where_there_is_a_gpu(monkeypatch):
    """A weight is packed before it goes to the GPU."""
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ok.BackendUnavailable, match="no GPU is visible"):
        ok.choose("pack_weight", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ok.choose("pack_weight", "cpu") is Backend.CPU
    with pytest.raises(ok.BackendUnavailable, match="the tensors are on the CPU"):
        ok.choose("packed_linear", "cpu")


def test_an_op_that_triton_lacks_falls_back_with_one_warning_and_a_record(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(_dispatch, "_OPS", {**_dispatch._OPS, Backend.TRITON: frozenset()})
    x, weight = torch.ones(1, 2), torch.ones(2)
    with pytest.warns(ok.BackendFallbackWarning, match="rms_norm: the triton backend does not serve it here, cpu does"):
        ok.rms_norm(x, weight, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ok.rms_norm(x, weight, 1e-5)
    assert ok.fallbacks() == {"rms_norm": ok.Fallback(Backend.TRITON, Backend.CPU, 2)}


@pytest.fixture
def op_for_gpus(monkeypatch):
    """Name an op that the `cpu` backend has no code for."""
    monkeypatch.setattr(_dispatch, "_OPS", {**_dispatch._OPS, Backend.CPU: _dispatch._OPS[Backend.CPU] - {"rms_norm"}})
    return "rms_norm"


@pytest.mark.parametrize("variable", ["", "cpu", "reference"])
def test_an_op_for_gpus_is_served_by_the_reference_on_the_cpu_without_a_warning(monkeypatch, op_for_gpus, variable):
    monkeypatch.setenv("OCTAVO_BACKEND", variable)
    assert ok.choose(op_for_gpus, "cpu") is Backend.REFERENCE
    x, weight = torch.randn(1, 2), torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ok.rms_norm(x, weight, 1e-5)
    assert ok.fallbacks() == {}
    assert _dispatch.implementation(op_for_gpus, torch.device("cpu")).__module__ == "octavo_kernels.reference.norm"


def test_an_op_for_gpus_goes_from_a_backend_that_lacks_it_to_the_reference_with_a_warning(monkeypatch, op_for_gpus):
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OCTAVO_BACKEND", "triton")
    monkeypatch.setattr(_dispatch, "_OPS", {**_dispatch._OPS, Backend.TRITON: frozenset()})
    with pytest.warns(ok.BackendFallbackWarning, match="the triton backend does not serve it here, reference does"):
        _dispatch.implementation(op_for_gpus, torch.device("cpu"))
    assert ok.fallbacks() == {op_for_gpus: ok.Fallback(Backend.TRITON, Backend.REFERENCE, 1)}


def test_gpu_tensors_without_triton_fall_back(monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    assert ok.choose("paged_attention", "cuda") is Backend.CPU
    with pytest.warns(ok.BackendFallbackWarning, match="paged_attention"):
        _dispatch.implementation("paged_attention", torch.device("cuda"))
    argmax = _dispatch.implementation("packed_argmax", torch.device("cuda"))
    assert argmax.__module__ == "octavo_kernels.cpu.fallback.matmul"  # native code serves tensors on the CPU alone
    assert list(ok.fallbacks()) == ["paged_attention"]


def test_a_call_that_native_code_does_not_serve_is_said_once_per_op_and_counted():
    def public_op():
        return wrapper()

    def wrapper():
        return _dispatch.note_fallback("rms_norm", "x is float64; pass float32")

    expected = "rms_norm: torch serves it, not the native library: x is float64; pass float32"
    with pytest.warns(ok.BackendFallbackWarning, match=expected) as said:
        public_op()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        public_op()
    assert ok.fallbacks() == {"rms_norm": ok.Fallback(Backend.CPU, "torch", 2, "x is float64; pass float32")}


def test_the_import_needs_neither_triton_nor_a_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, octavo_kernels as ok\n"
        "ok.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-5)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'octavo_kernels.triton' not in sys.modules\n"
        "assert 'octavo_kernels.testing' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
