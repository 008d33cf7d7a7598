"""AdapterTarget: a linear that adapters may change; AdapterInfo: what is known of an adapter that is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class AdapterTarget(NamedTuple):
    """The sizes of a checkpoint's linear, as `model.layers.0.self_attn.q_proj`, which may be a part of a fused one."""

    in_features: int
    out_features: int
    has_bias: bool


Targets = Mapping[str, AdapterTarget]
"""The linears of a model by their names in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter that requests can name.

    Attributes:
        name: what requests call it.
        path: where it was read.
        digest: of its files' content, in hexadecimal; another one after it was loaded again from changed files.
        rank: the highest of its matrices.
        num_bytes: of its weights in the host's memory.
        is_loaded: whether they are there now; if not, the next request reads them again.
    """

    name: str
    path: str
    digest: str
    rank: int
    num_bytes: int
    is_loaded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """What adapters have taken so far.

    Attributes:
        num_loaded: versions in the host's memory.
        num_active: versions that running sequences use.
        num_reads: how often one was read from files.
        num_fills: how often one was brought to the model.
    """

    num_loaded: int = 0
    num_active: int = 0
    num_reads: int = 0
    num_fills: int = 0


def pool_bytes(targets: Targets, *, max_loras: int, max_lora_rank: int, element_bytes: int) -> int:
    """Return the device memory for so many adapters of the highest rank, in bytes."""
    num_values = sum(target.in_features + target.out_features for target in targets.values())
    return num_values * max_loras * max_lora_rank * element_bytes
