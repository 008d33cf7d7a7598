"""The vocabulary of blocks: their ids and hashes, one block's bookkeeping, and the copy of one block."""

from typing import NamedTuple, NewType

BlockHash = NewType("BlockHash", bytes)
"""The digest of everything a full block's content depends on; see `octavo_kvcache.prefix`."""

NULL_BLOCK = 0
"""The id of the null block: reserved, never allocated, for padding and for blocks behind a window."""

DEVICE, HOST = "device", "host"
"""The tiers that blocks live in: where the model computes, and the host's memory."""


class BlockCopy(NamedTuple):
    """One block to be copied before a step runs: copy-on-write and swapping as data.

    A list of copies is applied in order: a later copy may read or overwrite what an earlier one wrote.
    The tiers name the memory that each side lives in: DEVICE or HOST. Each tier counts its blocks from 0.
    """

    src: int
    dst: int
    src_tier: str = DEVICE
    dst_tier: str = DEVICE


class Block:
    """The bookkeeping of one block. Only the `BlockPool` writes it.

    Attributes:
        block_id: row of the block in every layer's storage.
        ref_count: how many block tables hold the block; 0 = in the free list.
        block_hash: key of the block's content in the prefix cache, or None.
        twin: the block of the other tier that has had the same content since this one was handed out, or None. It
            counts while it names this block as its twin too.
        prev_free, next_free: neighbours in the free list; None while the block is held.

    """

    __slots__ = ("block_hash", "block_id", "next_free", "prev_free", "ref_count", "twin")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: BlockHash | None = None
        self.twin: int | None = None
        self.prev_free: Block | None = None
        self.next_free: Block | None = None

    def __repr__(self) -> str:
        digest = None if self.block_hash is None else self.block_hash.hex()[:12]
        return f"Block({self.block_id}, ref_count={self.ref_count}, block_hash={digest})"
