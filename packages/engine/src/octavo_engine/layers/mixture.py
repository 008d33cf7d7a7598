"""MixtureOfExperts: a router and the feed-forward blocks that it chooses from; ExpertLoad: how often it chose which."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo_engine.layers.experts import Experts, make_experts
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import Shard, WeightSlot


class Router:
    """Chooses each token's experts: the likeliest, weighted by their probabilities among themselves.

    It compares logits and not probabilities, so that processes with the same logits choose alike: torch's exponential
    may differ between machines in its last bit, which can make neighbours equal.

    Args:
        hidden_size: of tokens.
        num_experts: to choose from.
        top_k: how many a token has.
        options: how the weight is made.
    """

    __slots__ = ("_top_k", "linear")

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, options: LayerOptions) -> None:
        self.linear = Linear(hidden_size, (Shard("gate", num_experts),), bias=False, options=options)
        self._top_k = top_k

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and ids of each token's experts, the likeliest first.

        x [num_tokens, hidden_size] -> [num_tokens, top_k] fp32, which add up to 1, and [num_tokens, top_k] int64.
        """
        logits, ids = self.linear(x).float().topk(self._top_k, dim=-1)
        return logits.softmax(dim=-1), ids


class ExpertLoad:
    """How many tokens each expert got. The mixture alone adds to it.

    Attributes:
        num_tokens: [num_experts] int64, where the model is, so that counting waits for nothing.
    """

    __slots__ = ("num_tokens",)

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_tokens = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def add(self, ids: Tensor) -> None:
        """Count the experts of some tokens, [num_tokens, top_k] int64."""
        flat = ids.flatten()
        self.num_tokens.scatter_add_(0, flat, torch.ones_like(flat))

    def clear(self) -> None:
        """Begin anew, at 0."""
        self.num_tokens.zero_()


class MixtureOfExperts:
    """The weighted sum of what a token's experts make of it (arXiv 1701.06538, 2401.04088).

    Args:
        hidden_size: of tokens.
        intermediate_size: of each expert.
        num_experts: in all.
        top_k: experts of a token.
        own: the experts whose weights are here; the others add nothing to the sum. None is all of them.
        options: how the weights are made.

    Attributes:
        load: how many tokens each expert got, of all experts.
    """

    __slots__ = ("experts", "load", "router")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        own: range | None = None,
        options: LayerOptions,
    ) -> None:
        self.router = Router(hidden_size, num_experts, top_k, options=options)
        self.experts: Experts = make_experts(
            hidden_size, intermediate_size, range(num_experts) if own is None else own, options=options
        )
        self.load = ExpertLoad(num_experts, options.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the mixture's output for x, both [num_tokens, hidden_size]."""
        weights, ids = self.router(x)
        self.load.add(ids)
        return self.experts(x, weights, ids)

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:  # noqa: ARG002
        """Yield nothing: an expert sees some tokens of a step, which adapters and calibration know nothing of."""
        return iter(())

    def expert_weights(self, prefix: str) -> Iterator[str]:
        """Yield the names of the experts' matrices in a checkpoint, with what they begin with."""
        for slot in self.experts.slots(f"{prefix}experts."):
            yield slot.name

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        self.router.linear.finish()
        self.experts.finish()

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        yield from self.router.linear.slots(prefix)
        yield from self.experts.slots(f"{prefix}experts.")
