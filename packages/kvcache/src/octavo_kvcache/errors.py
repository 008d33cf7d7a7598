"""The errors of this package, one tree.

KVCacheError
├── CacheFull            fewer blocks are free than the call needs; nothing was changed
├── PinLimit             pins would hold more blocks than they may; nothing was changed
├── UnknownSequence      no sequence has this id (also a KeyError)
├── DuplicateSequence    a sequence with this id exists already (also a ValueError)
├── UnknownPin           no pin has this id (also a KeyError)
├── DuplicatePin         a pin with this id exists already (also a ValueError)
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


class PinLimit(KVCacheError):
    """A pin that would take more blocks than pins may hold together.

    Attributes:
        wanted: blocks of the new pin.
        held: blocks of the pins there are, those of several once for each.
        limit: the most blocks that pins may hold.

    """

    def __init__(self, wanted: int, held: int, limit: int) -> None:
        super().__init__(
            f"a pin of {wanted} blocks was asked for, pins hold {held} and may hold {limit}; "
            "drop a pin, pin a shorter prefix, or let pins hold more"
        )
        self.wanted = wanted
        self.held = held
        self.limit = limit

    def __reduce__(self) -> tuple[type["PinLimit"], tuple[int, int, int]]:
        return type(self), (self.wanted, self.held, self.limit)


class UnknownSequence(KVCacheError, KeyError):
    """A sequence id that was never added, or was freed."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class DuplicateSequence(KVCacheError, ValueError):
    """A sequence id that is in use."""


class UnknownPin(KVCacheError, KeyError):
    """A pin id that was never given, or was dropped."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class DuplicatePin(KVCacheError, ValueError):
    """A pin id that is in use."""


class InvalidArgument(KVCacheError, ValueError):
    """A size, range or token id outside of what the call allows."""


class InvalidBlock(KVCacheError, ValueError):
    """A block id that is out of range, the null block, or held by nobody."""


class UnsupportedSpec(KVCacheError, ValueError):
    """A kind or dtype of KV cache that is not implemented."""
