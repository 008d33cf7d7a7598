"""FeedForward: what follows attention in a layer; GatedMLP: with a SiLU gate (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import Shard, WeightSlot
from octavo_kernels import silu_and_mul


class FeedForward(Protocol):
    """The block of a layer that sees each token by itself."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the block's output for x, both [num_tokens, hidden_size]."""
        ...

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """Yield the linears that see every token, each with what the checkpoint's names of its shards begin with."""
        ...

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        ...

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        ...


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product.

    Args:
        hidden_size: of what comes in and goes out.
        intermediate_size: columns between the two products.
        bias: whether the linears have biases.
        options: how the weights are made.
        names: of gate, up and down in a checkpoint.
    """

    __slots__ = ("down", "gate_up")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        options: LayerOptions,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        gate, up, down = names
        shards = (Shard(gate, intermediate_size), Shard(up, intermediate_size))
        self.gate_up = Linear(hidden_size, shards, bias=bias, options=options)
        self.down = Linear(intermediate_size, (Shard(down, hidden_size),), bias=bias, options=options)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the block's output for x, both [num_tokens, hidden_size]."""
        return self.down(silu_and_mul(self.gate_up(x)))

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """Yield the linears, each with what the checkpoint's names of its shards begin with."""
        yield prefix, self.gate_up
        yield prefix, self.down

    def finish(self) -> None:
        """Prepare the filled weights for products."""
        self.gate_up.finish()
        self.down.finish()

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield where the checkpoint's tensors go."""
        yield from self.gate_up.slots(prefix)
        yield from self.down.slots(prefix)
