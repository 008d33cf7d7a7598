"""The kernels of matrix products that are compiled without a GPU, in the variants that are launched."""

from typing import Any

KERNELS: dict[str, Any] = {}
