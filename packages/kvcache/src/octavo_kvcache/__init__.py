"""A block-table KV cache: reference counts, copy-on-write forks, and an exact prefix cache.

Everything but `KVStorage` is plain Python and loads no torch; `KVStorage` needs the extra `octavo-kvcache[torch]`.
"""

from typing import TYPE_CHECKING

from octavo_kvcache.allocation import UNCHANGED, Allocation, TableUpdate
from octavo_kvcache.block import DEVICE, HOST, NULL_BLOCK, Block, BlockCopy, BlockHash
from octavo_kvcache.errors import (
    CacheFull,
    DuplicatePin,
    DuplicateSequence,
    InvalidArgument,
    InvalidBlock,
    KVCacheError,
    PinLimit,
    UnknownPin,
    UnknownSequence,
    UnsupportedSpec,
)
from octavo_kvcache.host_tier import SwapSize
from octavo_kvcache.lookups import LookupCounts
from octavo_kvcache.manager import CacheManager
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix import BlockHasher, PrefixCache
from octavo_kvcache.sequence import SeqId
from octavo_kvcache.spec import KVCacheSpec, KVGroup, group_specs
from octavo_kvcache.stats import CacheStats, HostCounts
from octavo_kvcache.table import BlockTable

if TYPE_CHECKING:
    from octavo_kvcache.storage import KVStorage

__all__ = [
    "DEVICE",
    "HOST",
    "NULL_BLOCK",
    "UNCHANGED",
    "Allocation",
    "Block",
    "BlockCopy",
    "BlockHash",
    "BlockHasher",
    "BlockPool",
    "BlockTable",
    "CacheFull",
    "CacheManager",
    "CacheStats",
    "DuplicatePin",
    "DuplicateSequence",
    "HostCounts",
    "InvalidArgument",
    "InvalidBlock",
    "KVCacheError",
    "KVCacheSpec",
    "KVGroup",
    "KVStorage",
    "LookupCounts",
    "PinLimit",
    "PrefixCache",
    "SeqId",
    "SwapSize",
    "TableUpdate",
    "UnknownPin",
    "UnknownSequence",
    "UnsupportedSpec",
    "group_specs",
]


def __getattr__(name: str) -> object:
    if name != "KVStorage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from octavo_kvcache.storage import KVStorage  # loads torch, so only when it is asked for

    return KVStorage
