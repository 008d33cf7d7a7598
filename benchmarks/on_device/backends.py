"""Which backend of the kernels serves; the reference makes products and sums in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Have a backend serve all ops that it has."""
    before = os.environ.get("OCTAVO_BACKEND")
    os.environ["OCTAVO_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["OCTAVO_BACKEND"]
        else:
            os.environ["OCTAVO_BACKEND"] = before


@contextmanager
def compiled_attention() -> Iterator[None]:
    """Have the compiled kernel serve `paged_attention`, where a build of it is installed."""
    os.environ["OCTAVO_CUDA_OPS"] = "paged_attention"
    try:
        yield
    finally:
        del os.environ["OCTAVO_CUDA_OPS"]


def why_not_compiled() -> str | None:
    """Say why there is no compiled attention here, or None."""
    from octavo_kernels.cuda.load import why_not

    return why_not("cuda")


def by_compiled_attention(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call that does the same with compiled attention, and refuses to have Triton do it."""
    import octavo_kernels as ok

    def called() -> Tensor:
        with compiled_attention():
            result = call()
        if "paged_attention" in ok.fallbacks():
            raise RuntimeError(f"Triton served: {ok.fallbacks()['paged_attention'].reason}")
        return result

    return called


def in_reference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call that does the same in the reference."""

    def called() -> Tensor:
        with served_by("reference"):
            return call()

    return called
