"""The errors of this package, one tree.

KVCacheError
├── CacheFull            fewer blocks are free than the call needs; nothing was changed
├── UnknownSequence      no sequence has this id (also a KeyError)
├── DuplicateSequence    a sequence with this id exists already (also a ValueError)
├── InvalidArgument      a size, range or token id that cannot be right (also a ValueError)
├── InvalidBlock         a block that nobody holds was retained or released (also a ValueError)
└── UnsupportedSpec      a kind or dtype of KV cache that this version does not implement (also a ValueError)
"""


class KVCacheError(Exception):
    """Base of every error that this package raises on purpose."""


class CacheFull(KVCacheError):
    """Too few free blocks for an allocation.

    Attributes:
        wanted: blocks the call needed.
        free: blocks that were free.
        total: blocks that can ever be allocated (the null block is not one of them).

    """

    def __init__(self, wanted: int, free: int, total: int) -> None:
        super().__init__(
            f"{wanted} blocks wanted, {free} of {total} are free; "
            "free or preempt a sequence, or give the cache more blocks"
        )
        self.wanted = wanted
        self.free = free
        self.total = total

    def __reduce__(self) -> tuple[type["CacheFull"], tuple[int, int, int]]:
        return type(self), (self.wanted, self.free, self.total)


class UnknownSequence(KVCacheError, KeyError):
    """A sequence id that was never added, or was freed."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class DuplicateSequence(KVCacheError, ValueError):
    """A sequence id that is in use."""


class InvalidArgument(KVCacheError, ValueError):
    """A size, range or token id outside of what the call allows."""


class InvalidBlock(KVCacheError, ValueError):
    """A block id that is out of range, the null block, or held by nobody."""


class UnsupportedSpec(KVCacheError, ValueError):
    """A kind or dtype of KV cache that is not implemented."""
