"""KVCacheSpec: what one layer keeps per token; KVGroup: the layers that share one block table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from octavo_kvcache.errors import InvalidArgument, UnsupportedSpec

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per element of the dtypes that need no scales."""

CODE_DTYPES = ("int8", "float8_e4m3fn")
"""The dtypes of one byte whose elements are codes: every cached vector has a scale of four bytes beside them."""

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one attention layer keeps.

    Attributes:
        num_kv_heads: heads of K and of V.
        head_dim: elements per head, the same for K and V.
        dtype: name of the element type, a key of `DTYPE_BYTES` or one of `CODE_DTYPES`.
        kind: "full" (every token is kept) or "window" (only what a window still sees).
        window: tokens that a query sees, itself included; for kind "window" only.

    Raises:
        UnsupportedSpec: another kind or dtype.
        InvalidArgument: a size below 1, or a window that does not go with the kind.

    """

    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    kind: Literal["full", "window"] = "full"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window"):
            raise UnsupportedSpec(f"kind must be 'full' or 'window', got {self.kind!r}; no other kind is implemented")
        if self.dtype not in DTYPE_BYTES and self.dtype not in CODE_DTYPES:
            raise UnsupportedSpec(f"dtype must be one of {', '.join((*DTYPE_BYTES, *CODE_DTYPES))}, got {self.dtype!r}")
        if self.num_kv_heads < 1 or self.head_dim < 1:
            raise InvalidArgument(
                f"num_kv_heads and head_dim must be positive, got {self.num_kv_heads}, {self.head_dim}"
            )
        if self.kind == "full" and self.window is not None:
            raise InvalidArgument(f"window must be None for kind 'full', got {self.window}; use kind='window'")
        if self.kind == "window" and (self.window is None or self.window < 1):
            raise InvalidArgument(f"window must be at least 1 token for kind 'window', got {self.window}")

    @property
    def has_scales(self) -> bool:
        """Whether each cached vector has a scale."""
        return self.dtype in CODE_DTYPES

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of `block_size` tokens takes in this layer, K and V together, with their scales."""
        vector = self.head_dim + _SCALE_BYTES if self.has_scales else self.head_dim * DTYPE_BYTES[self.dtype]
        return 2 * self.num_kv_heads * block_size * vector


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with equal specs: a sequence has one block table for all of them.

    Attributes:
        spec: what each of the layers keeps.
        layers: indices of the layers, ascending.

    """

    spec: KVCacheSpec
    layers: tuple[int, ...]


def group_specs(specs: Sequence[KVCacheSpec]) -> tuple[KVGroup, ...]:
    """Collect the layers with equal specs, in the order in which the specs first appear.

    Args:
        specs: one per layer.

    """
    layers: dict[KVCacheSpec, list[int]] = {}
    for index, spec in enumerate(specs):
        layers.setdefault(spec, []).append(index)
    return tuple(KVGroup(spec, tuple(indices)) for spec, indices in layers.items())
