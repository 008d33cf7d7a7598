"""Parcels: all arrays of a step in one piece of memory, so that one copy takes them to the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.device import Device

_ALIGNMENT = 16  # bytes, of each array in a parcel

_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class Parcels:
    """Sends arrays to a device, which has memory for one parcel; on the host each of some slots has its own.

    Args:
        device: where they go.
        torch_device: the same, as torch calls it.
        num_bytes: of the largest parcel, as `parcel_bytes` counts them.
        num_slots: parcels that may be under way at once.
    """

    def __init__(self, device: Device, torch_device: torch.device, *, num_bytes: int, num_slots: int) -> None:
        self._device = device
        self._sources = [device.host_bytes(num_bytes) for _ in range(num_slots)]
        self._destination = torch.zeros(num_bytes, dtype=torch.uint8, device=torch_device)

    def send(self, slot: int, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Copy arrays to the device, where they hold until work that is launched after the next parcel.

        Args:
            slot: whose last parcel has arrived.
            arrays: int64, int32 or float32, of any strides.

        Returns:
            A tensor on the device for each array. Nothing is copied if there is none.
        """
        source, offset = self._sources[slot], 0
        tensors: list[Tensor] = []
        if not arrays:
            return tensors
        for array in arrays:
            np.ndarray(array.shape, array.dtype, buffer=source.numpy().data, offset=offset)[...] = array
            memory = self._destination[offset : offset + array.nbytes]
            tensors.append(memory.view(_DTYPES[array.dtype]).view(array.shape))
            offset += _aligned(array.nbytes)
        self._device.upload(source[:offset], self._destination[:offset])
        return tensors


def parcel_bytes(shapes: Iterable[tuple[tuple[int, ...], type[np.generic]]]) -> int:
    """Return the bytes of a parcel of arrays of some shapes and types."""
    return sum(_aligned(prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in shapes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
