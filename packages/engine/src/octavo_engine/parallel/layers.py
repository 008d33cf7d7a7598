"""The layers of a model that need other ranks: products and mixtures that are added up, a part of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_engine.layers.embedding import Embedding
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mixture import MixtureOfExperts
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.models.llama import Llama
from octavo_engine.models.registry import Model
from octavo_engine.parallel.group import Group


class SummedLinear(Linear):
    """A linear layer that has some of its columns here and the others on other ranks.

    Args:
        part: with this rank's columns.
        group: the ranks.
    """

    __slots__ = ("_group",)

    def __init__(self, part: Linear, group: Group) -> None:
        self.in_features = part.in_features
        self.has_bias = part.has_bias
        self.shards = part.shards
        self.adapters = part.adapters
        self.parameters = part.parameters
        self._options = part._options
        self._quant = part._quant
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of all columns, from this rank's part of x, [num_tokens, rows of all shards]."""
        return self._group.sum(super().__call__(x))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of what all ranks give; each calls this at the same time."""
        return self._group.sum(x)


class PartialEmbedding(Embedding):
    """An embedding that has some of its rows here and the others on other ranks.

    Args:
        part: with this rank's rows.
        first_token_id: the token of its first row.
        group: the ranks.
    """

    __slots__ = ("_first_token_id", "_group", "_part")

    def __init__(self, part: Embedding, first_token_id: int, group: Group) -> None:
        self.vocab_size = part.vocab_size
        self.hidden_size = part.hidden_size
        self.options = part.options
        self.saved = part.saved
        self.parameters = part.parameters
        self._quant = part._quant
        self._part = part
        self._first_token_id = first_token_id
        self._group = group

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the rows of token_ids [num_tokens] int64, whichever rank has them: [num_tokens, hidden_size]."""
        own_ids = token_ids - self._first_token_id
        is_own = (own_ids >= 0) & (own_ids < self.vocab_size)
        rows = self._part(torch.where(is_own, own_ids, 0))
        return self._group.sum(torch.where(is_own[:, None], rows, 0))


class SummedMixture(MixtureOfExperts):
    """A mixture that has some of its experts here, or some columns of each, and the others on other ranks.

    Args:
        part: with this rank's experts; every rank's router chooses for every token.
        group: the ranks.
    """

    __slots__ = ("_group",)

    def __init__(self, part: MixtureOfExperts, group: Group) -> None:
        self.router = part.router
        self.experts = part.experts
        self.load = part.load
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum over all experts of each token, x and it [num_tokens, hidden_size]."""
        return self._group.sum(super().__call__(x))


def join_layers(model: Model, first_token_id: int, group: Group) -> None:
    """Let the finished layers of a rank's part of a model work together with those of the other ranks.

    Modified in place. The head stays: it makes this rank's part of the logits.
    """
    assert isinstance(model, Llama), "check_size lets no other architecture through"
    model.embedding = PartialEmbedding(model.embedding, first_token_id, group)
    for layer in model.layers:
        layer.attention.out = SummedLinear(layer.attention.out, group)
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp = SummedMixture(layer.mlp, group)
        else:
            assert isinstance(layer.mlp, GatedMLP)
            layer.mlp.down = SummedLinear(layer.mlp.down, group)
