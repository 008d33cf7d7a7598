"""AdapterReader: reads an adapter for one model from wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo_engine.adapters.gguf import read_gguf
from octavo_engine.adapters.info import Targets
from octavo_engine.adapters.peft import read_peft
from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.errors import InvalidAdapter

if TYPE_CHECKING:
    from octavo_engine.models.config import ModelConfig


class AdapterReader:
    """Knows what an adapter must fit; it may be called from any thread.

    Args:
        targets: the model's linears.
        config: the model's; None where GGUF files are not read.
        max_rank: the highest rank that is served.
        dtype: of the matrices in memory.
        ends_shape: [vocab_size, hidden_size] of embeddings and heads that adapters may bring along; None where they
            may bring none.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        max_rank: int,
        dtype: torch.dtype,
        config: ModelConfig | None = None,
        ends_shape: tuple[int, int] | None = None,
    ) -> None:
        self._targets = targets
        self._config = config
        self._max_rank = max_rank
        self._dtype = dtype
        self._ends_shape = ends_shape

    def __call__(self, path: str) -> AdapterWeights:
        """Read the adapter at a path: a folder in the layout of PEFT, or a GGUF file.

        Raises:
            InvalidAdapter: there is none, or it cannot be served; says why.
        """
        place = Path(path)
        if place.is_file() and self._config is not None:
            return read_gguf(place, self._targets, self._config, max_rank=self._max_rank, dtype=self._dtype)
        if not place.is_dir():
            raise InvalidAdapter(
                f"{path}: expected the folder of an adapter, with adapter_config.json, or a GGUF file, found none"
            )
        return read_peft(place, self._targets, max_rank=self._max_rank, dtype=self._dtype, ends_shape=self._ends_shape)
