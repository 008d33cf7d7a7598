"""run_ops: the one call into the native library, and the clock of what it takes."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from octavo_kernels.cpu import abi
from octavo_kernels.cpu.load import library
from octavo_kernels.threads import num_native_threads


class _Clock:
    """Nanoseconds spent in native code by this process. Only `run_ops` writes it."""

    def __init__(self) -> None:
        self.num_nanoseconds = 0


_clock = _Clock()


def run_ops(ops: Any, num_ops: int, step: abi.Step | None) -> None:
    """Run an array of ops natively, on `num_native_threads()`; the interpreter lock is released meanwhile."""
    prepare_ops(ops, num_ops, step)()


def prepare_ops(ops: Any, num_ops: int, step: abi.Step | None) -> Callable[[], None]:
    """Return what runs an array of ops each time it is called, with what `step` holds then; it keeps both alive."""
    call = functools.partial(_entry(), ctypes.byref(ops), num_ops, None if step is None else ctypes.byref(step))

    def run() -> None:
        _clock.num_nanoseconds += call(num_native_threads())

    return run


def kernel_seconds() -> float:
    """Return the seconds that native ops have taken in this process so far."""
    return _clock.num_nanoseconds * 1e-9


@functools.cache
def _entry() -> Callable[..., int]:
    loaded = library()
    assert loaded is not None, "native ops need the native library"
    function = loaded.handle.octavo_run
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_int64
    return function
