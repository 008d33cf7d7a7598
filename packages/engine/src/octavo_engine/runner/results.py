"""Results: where the draws of steps in flight lie, on the device and on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.device import Device
from octavo_engine.runner.device_draw import DrawnLater
from octavo_engine.runner.sampler import BARRED, Drawn

_DTYPES = (torch.int64, torch.float32, torch.float32)  # of DrawnLater


class _Slot(NamedTuple):
    """Of one step: each of DrawnLater's tensors [max_num_draws], on the device and on the host."""

    on_device: tuple[Tensor, ...]
    on_host: tuple[Tensor, ...]


class Results:
    """Memory for the draws of as many steps as there are slots.

    Args:
        device: where they come from.
        torch_device: the same, as torch calls it.
        max_num_draws: of a step.
        num_slots: steps that may be in flight.
    """

    def __init__(self, device: Device, torch_device: torch.device, *, max_num_draws: int, num_slots: int) -> None:
        self._device = device
        self._slots = []
        for _ in range(num_slots):
            on_device = tuple(torch.zeros(max_num_draws, dtype=dtype, device=torch_device) for dtype in _DTYPES)
            on_host = tuple(device.host_bytes(max_num_draws * dtype.itemsize).view(dtype) for dtype in _DTYPES)
            self._slots.append(_Slot(on_device, on_host))

    def put(self, slot: int, drawn: DrawnLater) -> None:
        """Keep a draw on the device, as part of the work that made it."""
        for kept, tensor in zip(self._slots[slot].on_device, drawn, strict=True):
            if tensor is not None:
                kept[: len(tensor)] = tensor

    def send(self, slot: int, num_draws: int, *, changed: bool) -> None:
        """Copy a draw to the host; `changed` says whether it has `given`."""
        on_device, on_host = self._slots[slot]
        for source, destination in zip(on_device[: 2 + changed], on_host, strict=False):
            self._device.download(source[:num_draws], destination[:num_draws])

    def drawn(self, slot: int, num_draws: int, *, changed: bool) -> Drawn:
        """Return a draw whose copy has come."""
        arrays: list[NDArray[Any]] = [tensor[:num_draws].numpy() for tensor in self._slots[slot].on_host]
        token_ids, best, given = arrays
        sound = np.isfinite(best)
        errors: dict[int, str] = {}
        if changed and not sound.all():
            errors = dict.fromkeys(np.flatnonzero(~sound & np.isfinite(given)).tolist(), BARRED)
        return Drawn(token_ids.copy(), sound, None, errors)
