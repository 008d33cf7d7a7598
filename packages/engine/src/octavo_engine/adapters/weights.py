"""AdapterWeights: one version of an adapter in the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """What an adapter adds to a linear: scale * x A^T B^T (LoRA, arXiv 2106.09685).

    a [rank, in_features] and b [out_features, rank], in one floating dtype. With a magnitude, [out_features] fp32, the
    rows of W + scale * B A are brought to that length (DoRA, arXiv 2402.09353).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of a."""
        return len(self.a)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter's matrices and biases by the names of the linears in a checkpoint; nobody writes to them.

    Attributes:
        digest: 32 bytes that are others when the files are.
        modules: what is added to the products.
        biases: [out_features] fp32, which take the places of the base's own.
        extra_biases: [out_features] fp32, which are added beside them.
        embedding: [vocab_size, hidden_size] as it is stored, which takes the place of the base's; None to keep that.
        head: likewise.
    """

    digest: bytes
    modules: Mapping[str, LowRank]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    extra_biases: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    head: Tensor | None = None

    @cached_property
    def rank(self) -> int:
        """The highest rank."""
        return max((module.rank for module in self.modules.values()), default=0)

    @cached_property
    def has_magnitudes(self) -> bool:
        """Whether some linear has a magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())

    @cached_property
    def num_bytes(self) -> int:
        """Of all tensors."""
        matrices = [tensor for module in self.modules.values() for tensor in (module.a, module.b, module.magnitude)]
        every = (*matrices, *self.biases.values(), *self.extra_biases.values(), self.embedding, self.head)
        return sum(tensor.nbytes for tensor in every if tensor is not None)
