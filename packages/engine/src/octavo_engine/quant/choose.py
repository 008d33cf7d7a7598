"""choose_method: which QuantMethod serves on a device."""

from __future__ import annotations

from typing import Any

import torch

from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_kernels import cpu_isa


def has_native_products(device: torch.device) -> bool:
    """Return whether the native kernels multiply packed weights on a device."""
    return device.type == "cpu" and cpu_isa() != "none"


def choose_method(device: torch.device, dtype: torch.dtype, *, int8_activations: bool = False) -> QuantMethod[Any]:
    """Return how matrices are held: packed for the native kernels if activations are fp32, else in torch's own form."""
    if dtype == torch.float32 and has_native_products(device):
        return Packed(int8_activations=int8_activations)
    assert not int8_activations
    return Unquantized()
