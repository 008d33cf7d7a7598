"""Which class runs which architecture, and what such a class offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mixture import MixtureOfExperts
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama
from octavo_engine.models.mixtral import Mixtral
from octavo_engine.quant.base import WeightSlot
from octavo_engine.runner.model_input import ModelInput
from octavo_kvcache import KVCacheSpec


class Model(Protocol):
    """A decoder that reads its KV from the input it is given."""

    config: ModelConfig
    num_parameters: int

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Return the last hidden states, after the final norm: [num_tokens, hidden_size]."""
        ...

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the logits of some hidden states: [rows, hidden_size] -> [rows, vocab_size] fp32.

        `out`, [rows, vocab_size] fp32, is memory that the result may lie in.
        """
        ...

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return `logits(hidden).max(dim=-1)`, in whichever way is fastest, without the logits if need be.

        Returns:
            token_ids: [rows] int64, the lowest of equals.
            best: [rows] fp32, their logits; NaN if any logit of the row is.
        """
        ...

    def draw(self, hidden: Tensor, *, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Return `sample_tokens(logits(hidden), **options)`, in whichever way is fastest; no option is a filter.

        `out`, [rows, vocab_size] fp32, is memory that may be overwritten.
        """
        ...

    def kv_cache_specs(self, dtype: torch.dtype) -> list[KVCacheSpec]:
        """Say what each layer keeps per token, if it keeps it in `dtype`."""
        ...

    def slots(self) -> Iterator[WeightSlot]:
        """Yield where each tensor of a checkpoint goes."""
        ...

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the linears that adapters may change, each with what the names of its shards begin with."""
        ...

    def ends(self) -> tuple[Embedding, LMHead] | None:
        """Return the first and the last matrix; None where adapters cannot bring others along."""
        ...

    def mixtures(self) -> Iterator[tuple[str, MixtureOfExperts]]:
        """Yield the mixtures of experts in the order of their layers, each with what its tensors' names begin with."""
        ...

    def is_redundant(self, name: str) -> bool:
        """Return whether a tensor without a slot may be passed over."""
        ...

    def finish(self) -> None:
        """Prepare the filled weights for products; there are no slots to fill afterwards."""
        ...


class ModelClass(Protocol):
    """Makes a model whose weights are allocated and not initialised."""

    def __call__(self, config: ModelConfig, options: LayerOptions) -> Model:
        """Make the model."""
        ...


_MODELS: Mapping[str, ModelClass] = MappingProxyType({"LlamaForCausalLM": Llama, "MixtralForCausalLM": Mixtral})


def model_class(architecture: str) -> ModelClass:
    """Return the class that runs an architecture, by Hugging Face's class name.

    Raises:
        UnsupportedModel: if there is none; lists those there are.
    """
    if architecture not in _MODELS:
        raise UnsupportedModel(f"architecture {architecture!r} is not supported; these are: {', '.join(_MODELS)}")
    return _MODELS[architecture]
