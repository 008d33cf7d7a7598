"""AdapterReader: reads an adapter for one model from wherever it lies."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo_engine.adapters.info import Targets
from octavo_engine.adapters.peft import read_peft
from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.errors import InvalidAdapter


class AdapterReader:
    """Knows what an adapter must fit; it may be called from any thread.

    Args:
        targets: the model's linears.
        max_rank: the highest rank that is served.
        dtype: of the matrices in memory.
    """

    def __init__(self, targets: Targets, *, max_rank: int, dtype: torch.dtype) -> None:
        self._targets = targets
        self._max_rank = max_rank
        self._dtype = dtype

    def __call__(self, path: str) -> AdapterWeights:
        """Read the adapter at a path: a folder in the layout of PEFT.

        Raises:
            InvalidAdapter: there is none, or it cannot be served; says why.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InvalidAdapter(f"{path}: expected the folder of an adapter, with adapter_config.json, found none")
        return read_peft(folder, self._targets, max_rank=self._max_rank, dtype=self._dtype)
