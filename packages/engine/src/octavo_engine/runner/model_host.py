"""LocalModel: the model in this process, with its KV cache and the runner on both, put aside and brought back."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo_engine.errors import IncompatibleWeights
from octavo_engine.executor.inline import InlineExecutor, Runner
from octavo_engine.kv_dtype import why_not_kept
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.memory import resident_bytes
from octavo_engine.text.fingerprint import fingerprint
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import Source, open_source
from octavo_kvcache.storage import KVStorage

_SHAPE = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "num_experts",
    "num_experts_per_token",
    "max_position_embeddings",
    "sliding_window",
)
"""What must be the same in weights that replace others: all that memory and limits were set up for."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """A model that can run, and where it came from; `root` is what the hashes of its cached blocks begin with."""

    path: Path
    model: Model
    digest: bytes
    root: bytes


@dataclass(frozen=True, slots=True)
class ModelParts:
    """How what a model takes in memory is made: the weights of a source, the KV cache, and the runner on both.

    `numerics` distinguishes KV of the same tokens and weights; it ends the root of the prefix cache. `kv_dtype` is that
    of the KV cache. `make_executor` makes what runs batches, on the first runner and on others later.
    """

    make_model: Callable[[Source], Model]
    make_storage: Callable[[], KVStorage]
    make_runner: Callable[[Model, KVStorage], Runner]
    numerics: bytes
    kv_dtype: torch.dtype
    make_executor: Callable[[Runner | None], InlineExecutor] = InlineExecutor

    def weights(self, source: Source, model: Model) -> LoadedWeights:
        """Return the weights of a source that were loaded."""
        return LoadedWeights(source.path, model, source.digest, source.digest + self.numerics)


class LocalModel:
    """A `ModelHost` in this process.

    Args:
        weights: to begin with.
        storage: the KV cache to begin with.
        config: of the weights, which others must fit.
        tokenizer: of the model; others must have the same.
        parts: makes what was dropped.
        device: where the model runs.

    Attributes:
        executor: runs batches on what there is.
        weights: those in memory, or None.
    """

    def __init__(
        self,
        weights: LoadedWeights,
        storage: KVStorage,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer,
        parts: ModelParts,
        device: torch.device,
    ) -> None:
        self.executor = parts.make_executor(parts.make_runner(weights.model, storage))
        self.weights: LoadedWeights | None = weights
        self._storage: KVStorage | None = storage
        self._path = weights.path
        self._config = config
        self._tokenizer = tokenizer
        self._parts = parts
        self._device = device

    def load(self, model: str | None, digest: bytes | None) -> LoadedWeights:
        """Read weights beside those that are there. See `ModelHost.load`."""
        source = open_source(self._path if model is None else model)
        if digest is None:
            self._check(source)
        elif source.digest != digest:
            raise IncompatibleWeights(
                f"{source.path}: the files have changed while the engine slept; serve what they hold now by "
                "update_weights_from_disk"
            )
        return self._parts.weights(source, self._parts.make_model(source))

    def use(self, weights: LoadedWeights) -> None:
        """Run on these weights. The old ones go once the new ones run, so that an error leaves them in place."""
        if self._storage is not None:
            self.executor.use(self._parts.make_runner(weights.model, self._storage))
        self.weights, self._path = weights, weights.path
        _give_back(self._device)

    def allocate(self) -> None:
        """Take memory for the KV cache."""
        if self._storage is None:
            storage = self._parts.make_storage()
            if self.weights is not None:
                self.executor.use(self._parts.make_runner(self.weights.model, storage))
            self._storage = storage

    def drop(self) -> None:
        """Let go of everything."""
        self.executor.use(None)
        self.weights = self._storage = None
        _give_back(self._device)

    def bytes_in_use(self) -> int | None:
        """Return the resident pages of this process, or what the driver has given out of its GPU's memory."""
        if self._device.type == "cuda":
            num_free, num_bytes = torch.cuda.mem_get_info(self._device)
            return num_bytes - num_free
        return resident_bytes()

    def _check(self, source: Source) -> None:
        """Refuse a model for whose sizes, scales or text this engine was not set up."""
        for name in _SHAPE:
            expected, found = getattr(self._config, name), getattr(source.config, name)
            if expected != found:
                raise IncompatibleWeights(
                    f"{source.path}: expected {name} {expected} as in the model that is served, found {found}; "
                    "start an engine of its own for another model"
                )
        if (reason := why_not_kept(source, self._parts.kv_dtype)) is not None:
            raise IncompatibleWeights(f"{reason}; start an engine of its own for it")
        if fingerprint(source.tokenizer()) != fingerprint(self._tokenizer):
            raise IncompatibleWeights(
                f"{source.path}: its tokenizer is another than that of the model that is served; start an engine of "
                "its own for another tokenizer"
            )


def _give_back(device: torch.device) -> None:
    """Return memory that nothing uses to the system.

    A runner's parts refer to each other, so only the collector finds them, and a server keeps what there was at its
    start out of the collector's way.
    """
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps what was freed, for later
