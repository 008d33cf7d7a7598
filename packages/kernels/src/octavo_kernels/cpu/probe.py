"""What this machine can do at best, and what native code has taken: for benchmarks, which hold kernels against it."""

import ctypes

import torch

from octavo_kernels.cpu.load import library
from octavo_kernels.cpu.run import kernel_seconds
from octavo_kernels.errors import BackendUnavailable

__all__ = ["kernel_seconds", "read_bandwidth", "vnni_peak"]


def read_bandwidth(num_bytes: int) -> float:
    """Return bytes per second at which as many threads as torch uses read a buffer of `num_bytes`, the best of five.

    Raises:
        BackendUnavailable: there is no native library.
    """
    return float(_export("octavo_read_bandwidth", ctypes.c_int64, ctypes.c_int)(num_bytes, torch.get_num_threads()))


def vnni_peak() -> float:
    """Return operations per second of AVX-512 VNNI, a product and a sum being two; 0 where the library has none.

    Raises:
        BackendUnavailable: there is no native library.
    """
    return float(_export("octavo_vnni_peak", ctypes.c_int)(torch.get_num_threads()))


def _export(name: str, *argument_types: type) -> "ctypes._NamedFuncPointer":
    loaded = library()
    if loaded is None:
        raise BackendUnavailable(f"{name}: there is no native library; unset OCTAVO_CPU_ISA, or build one with g++")
    function = getattr(loaded.handle, name)
    function.argtypes, function.restype = argument_types, ctypes.c_double
    return function  # type: ignore[no-any-return]  # ctypes leaves attributes of a library untyped
