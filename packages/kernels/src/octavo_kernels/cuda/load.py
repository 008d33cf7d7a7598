"""The compiled CUDA library: where it lies, what stands in its way here, and its ops once it is loaded."""

import functools
import os
from pathlib import Path
from typing import Any

import torch

NAME = "octavo_kernels_cuda.so"
_LEAST_CAPABILITY = (8, 0)
_LIB = Path(__file__).resolve().parent / "lib"


def library_path() -> Path | None:
    """Return the library that is used: OCTAVO_CUDA_LIBRARY if it is set, else the installed one; None without any."""
    named = os.environ.get("OCTAVO_CUDA_LIBRARY", "")
    if named:
        return Path(named)
    path = _LIB / NAME
    return path if path.is_file() else None


def why_not(device_type: str | None = None) -> str | None:
    """Say why no compiled kernel runs here, or on a kind of device, or None; loads nothing unless tensors are there."""
    path = library_path()
    if path is None:
        return (
            "no compiled CUDA kernels are installed; build them with csrc_cuda/build.py of the source tree, use "
            "triton, or unset the variable"
        )
    if device_type is not None and device_type != "cuda":
        return "the tensors are on the CPU; pass GPU tensors, or unset the variable"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no GPU of NVIDIA is visible; use a machine with one, or unset the variable"
    return None if device_type is None else _why_not_loaded(path)


def ops() -> Any:
    """Return the library's ops, which `why_not` has loaded."""
    return torch.ops.octavo_cuda


@functools.cache
def _why_not_loaded(path: Path) -> str | None:
    """Load a library, once."""
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, the compiled kernels need 8.0; use triton"
        )
    return load(path)


def load(path: Path) -> str | None:
    """Load a library and with it its ops; say why it cannot be, or None."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    except OSError as error:
        return f"{path} cannot be loaded: {error}; build it again with csrc_cuda/build.py, or remove it"
    return None
