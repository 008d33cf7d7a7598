"""Embedding and LMHead: the first and the last matrix of a language model, which may be one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import WeightSlot
from octavo_engine.quant.packed import can_pack, linear, pack


class Embedding:
    """Turns token ids into vectors; `weight` is [vocab_size, hidden_size]."""

    __slots__ = ("weight",)

    def __init__(self, vocab_size: int, hidden_size: int, *, options: LayerOptions) -> None:
        self.weight = options.matrix(vocab_size, hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the rows of token_ids [num_tokens] int64: [num_tokens, hidden_size]."""
        return F.embedding(token_ids, self.weight)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensor goes."""
        yield WeightSlot(f"{prefix}.weight", self.weight)


class LMHead:
    """Turns hidden states into logits; made with an embedding, it is tied to it and has no weight of its own."""

    __slots__ = ("tied", "weight")

    def __init__(self, embedding: Embedding, *, tied: bool, options: LayerOptions) -> None:
        self.tied = tied
        self.weight = embedding.weight if tied else options.matrix(*embedding.weight.shape)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden [rows, hidden_size]: [rows, vocab_size] fp32."""
        return linear(hidden, self.weight).float()

    def finish(self) -> None:
        """Prepare the filled weight for products; a tied one is packed as a copy, since the embedding reads rows."""
        if can_pack(self.weight):
            self.weight = pack(self.weight)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensor goes; nothing if tied."""
        if not self.tied:
            yield WeightSlot(f"{prefix}.weight", self.weight)
