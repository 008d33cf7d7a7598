"""choose_method: which QuantMethod serves on a device; native_isa: whether native kernels do."""

from __future__ import annotations

from typing import Any

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.packed_on_device import PackedOnDevice
from octavo_engine.quant.unquantized import Unquantized
from octavo_kernels import Backend, KernelError, choose, cpu_isa


def native_isa() -> str | None:
    """Return the instruction set of the native CPU kernels, None where torch serves instead.

    Raises:
        InvalidConfig: if OCTAVO_CPU_ISA asks for what this machine or installation does not have.
    """
    try:
        isa = cpu_isa()
    except KernelError as error:
        raise InvalidConfig(str(error)) from error
    return None if isa == "none" else isa


def has_native_products(device: torch.device) -> bool:
    """Return whether the native kernels multiply packed weights on a device; raises as `native_isa`."""
    return device.type == "cpu" and native_isa() is not None


def has_triton_products(device: torch.device) -> bool:
    """Return whether Triton multiplies packed weights on a device.

    Raises:
        InvalidConfig: if OCTAVO_BACKEND asks for a backend that cannot run.
    """
    try:
        return choose("packed_linear", device) is Backend.TRITON
    except KernelError as error:
        raise InvalidConfig(str(error)) from error


def holds_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether GGUF's blocks stay packed where activations have a dtype; raises as `choose_method`."""
    return (dtype == torch.float32 and has_native_products(device)) or has_triton_products(device)


def choose_method(
    device: torch.device, dtype: torch.dtype, *, int8_activations: bool = False, batch_invariant: bool = True
) -> QuantMethod[Any]:
    """Return how matrices are held: packed where native kernels or Triton multiply them so, else in torch's own form.

    Native kernels do for activations in fp32, and then hold every matrix; Triton does in any dtype, and holds those
    that come in blocks.

    Raises:
        InvalidConfig: if OCTAVO_CPU_ISA or OCTAVO_BACKEND asks for what this machine or installation does not have.
    """
    if dtype == torch.float32 and has_native_products(device):
        return Packed(int8_activations=int8_activations)
    assert not int8_activations
    if has_triton_products(device):
        return PackedOnDevice(batch_invariant=batch_invariant)
    return Unquantized(batch_invariant=batch_invariant)
