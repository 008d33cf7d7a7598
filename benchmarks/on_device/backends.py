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


def in_reference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call that does the same in the reference."""

    def called() -> Tensor:
        with served_by("reference"):
            return call()

    return called
