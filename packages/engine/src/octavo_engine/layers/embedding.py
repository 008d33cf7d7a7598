"""Embedding and LMHead: the first and the last matrix of a language model, which may be one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from octavo_engine.layers.options import LayerOptions
from octavo_engine.layers.saved_matrices import SavedMatrices
from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_kernels import sample_tokens


class Embedding:
    """Turns token ids into vectors by a matrix [vocab_size, hidden_size].

    Attributes:
        options: how the matrix was made.
        saved: those of adapters.
    """

    __slots__ = ("_quant", "hidden_size", "options", "parameters", "saved", "vocab_size")

    def __init__(self, vocab_size: int, hidden_size: int, *, options: LayerOptions) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.options = options
        self.saved: SavedMatrices[Embedding] = SavedMatrices(options.device)
        self._quant: QuantMethod[Any] = options.quant
        self.parameters = options.matrix(vocab_size, hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the rows of token_ids [num_tokens] int64: [num_tokens, hidden_size]."""
        rows = self._quant.embed(self.parameters, token_ids)
        for embedding, places in self.saved.parts:
            rows[places] = embedding(token_ids[places])
        return rows

    def finish(self) -> None:
        """Prepare the filled weight for lookups; before the head, which may be tied to it."""
        self.parameters = self._quant.finish_table(self.parameters)

    def slots(self, name: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensor `<name>.weight` goes."""
        return self._quant.slots(self.parameters, (Shard(name, self.vocab_size),), "")


class LMHead:
    """Turns hidden states into logits; made with an embedding, it may be tied to it: one weight for both.

    Attributes:
        saved: the heads of adapters, which are tied to nothing.
    """

    __slots__ = ("_embedding", "_quant", "parameters", "saved", "tied")

    def __init__(self, embedding: Embedding, *, tied: bool, options: LayerOptions) -> None:
        self.tied = tied
        self.saved: SavedMatrices[LMHead] = SavedMatrices(options.device)
        self._embedding = embedding
        self._quant: QuantMethod[Any] = options.quant
        self.parameters = embedding.parameters if tied else options.matrix(embedding.vocab_size, embedding.hidden_size)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits of hidden [rows, hidden_size]: [rows, vocab_size] fp32, possibly in `out`."""
        logits = self._quant.apply(self.parameters, hidden, out).float()
        for head, places in self.saved.parts:
            logits[places] = head(hidden[places])
        return logits

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token of hidden [rows, hidden_size], the lowest id of equals, and its logit.

        ids [rows] int64, best [rows] fp32; best is NaN if any logit of the row is.
        """
        token_ids, best = self._quant.argmax(self.parameters, hidden)
        for head, places in self.saved.parts:
            token_ids[places], best[places] = head.greedy(hidden[places])
        return token_ids, best

    def draw(self, hidden: Tensor, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Return `sample_tokens` of the logits of hidden [rows, hidden_size] and options that hold no filter.

        `out`, [rows, vocab_size] fp32, is memory that may be overwritten.
        """
        if self.saved.parts:
            return sample_tokens(self(hidden, out), **options)
        return self._quant.draw(self.parameters, hidden, out, **options)

    def finish(self) -> None:
        """Prepare the filled weight for products; a tied one is the embedding's, if that form multiplies too."""
        self.parameters = self._quant.finish_head(self._embedding.parameters if self.tied else self.parameters)

    def slots(self, name: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensor `<name>.weight` goes; nothing if tied."""
        if not self.tied:
            yield from self._quant.slots(self.parameters, (Shard(name, self._embedding.vocab_size),), "")
