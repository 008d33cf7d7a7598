"""Fixtures: the backend under test, its device, and the oracle.

OCTAVO_BACKEND forces a backend on tensors of the CPU. OCTAVO_TEST_DEVICE=cuda forces none: tensors of the fixture
`device` are on a GPU, where Triton serves, and those that a test has on the CPU are the `cpu` backend's.
"""

import os
import zlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from octavo_kernels import Backend, available_backends, cpu_isa


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if _on_gpu() or os.environ.get("OCTAVO_BACKEND", "") in ("triton", "cuda"):
        # These backends lack some ops on purpose; test_dispatch shows that the warning is given.
        config.addinivalue_line("filterwarnings", "ignore::octavo_kernels.BackendFallbackWarning")
    else:
        # Native code is for fp32; tests with other dtypes are served by torch, and test_native shows the warning.
        known = "ignore:.*torch serves it, not the native library:octavo_kernels.BackendFallbackWarning"
        config.addinivalue_line("filterwarnings", known)


def _on_gpu() -> bool:
    return os.environ.get("OCTAVO_TEST_DEVICE", "cpu") == "cuda"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Draw inputs from the test's name and OCTAVO_TEST_SEED, so that a failure comes again when it runs alone."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("OCTAVO_TEST_SEED", "0")))


@pytest.fixture(scope="session")
def backend() -> Backend:
    """The backend that OCTAVO_BACKEND forces, or the device's default."""
    wanted = Backend(os.environ.get("OCTAVO_BACKEND") or ("triton" if _on_gpu() else "cpu"))
    missing = "no GPU is visible" if _on_gpu() and not torch.cuda.is_available() else None
    if missing or wanted not in available_backends():
        found = f"available: {[item.value for item in available_backends()]}"
        reason = f"{wanted.value} cannot run here: {missing or found}"
        if os.environ.get("REQUIRE_BACKEND") in (wanted.value, *(("cuda", "rocm") if _on_gpu() else ())):
            pytest.fail(reason)
        pytest.skip(reason)
    return wanted


@pytest.fixture(scope="session")
def device(backend: Backend) -> str:
    forced = backend in (Backend.TRITON, Backend.CUDA) and os.environ.get("TRITON_INTERPRET") != "1"
    return "cuda" if forced or _on_gpu() else "cpu"


@pytest.fixture(scope="session")
def interpreted(backend: Backend) -> bool:
    """Whether kernels run in Triton's interpreter, thousands of times slower: tests then take fewer cases."""
    return backend is Backend.TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest, backend: Backend, interpreted: bool) -> torch.dtype:
    """Each dtype of activations that the backend computes with; fewer where that is slow."""
    if request.param == torch.float64 and backend is Backend.TRITON:
        pytest.skip("fp64 is for the reference and cpu")
    if request.param == torch.float16 and interpreted:
        pytest.skip("in the interpreter bf16 stands for both halves")
    return cast("torch.dtype", request.param)


@pytest.fixture(scope="session")
def native_library(backend: Backend) -> None:
    """Skip what is about native code where torch serves the CPU."""
    if backend is not Backend.CPU or cpu_isa() == "none":
        pytest.skip("the native library does not serve here")


@pytest.fixture
def not_triton(backend: Backend) -> None:
    """Skip what test_packed_linear asks of Triton in fewer cases, and what compares its bits with the cpu backend's."""
    if backend is Backend.TRITON:
        pytest.skip("products by packed weights in Triton are tested by test_packed_linear")


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call an op on the reference backend, whatever backend is under test."""

    def call(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("OCTAVO_BACKEND", "reference")
            return op(*arguments, **options)

    return call
