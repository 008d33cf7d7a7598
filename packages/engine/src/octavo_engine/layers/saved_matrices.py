"""SavedMatrices: embeddings or heads that adapters bring along, which take the place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


class SavedMatrices(Generic[T]):
    """The matrices of the slots that have one, and which rows of the coming calls go by them. The runner writes it.

    It takes the place of an argument, as StepAdapters does. While nothing is held the model's own matrix is all there
    is. Every call multiplies the rows of one slot by themselves, with a product whose rows do not look at each other.

    Attributes:
        parts: while rows are held, the matrices that they go by, and their places, [rows of the slot] int64.
    """

    __slots__ = ("_by_slot", "_device", "parts")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, T] = {}
        self.parts: tuple[tuple[T, Tensor], ...] = ()

    def put(self, slot: int, matrix: T | None) -> None:
        """Give a slot another matrix, or none; the memory of the one that it had is free then."""
        self._by_slot.pop(slot, None)
        if matrix is not None:
            self._by_slot[slot] = matrix

    def any_of(self, slots: NDArray[np.int64]) -> bool:
        """Return whether some of these slots have a matrix."""
        return any(slot in self._by_slot for slot in np.unique(slots).tolist()) if self._by_slot else False

    def of(self, slots: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Hold the slots of all rows of the calls that come while this is open, [rows], -1 for the model's own."""
        return self._hold(slots) if self._by_slot else nullcontext()

    @contextmanager
    def _hold(self, slots: NDArray[np.int64]) -> Iterator[None]:
        self.parts = tuple(
            (matrix, torch.from_numpy(places).to(self._device))
            for slot, matrix in self._by_slot.items()
            if len(places := np.flatnonzero(slots == slot))
        )
        try:
            yield
        finally:
            self.parts = ()
