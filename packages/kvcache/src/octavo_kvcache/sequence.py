"""SequenceBlocks: what the cache manager remembers of one sequence."""

import sys
from collections.abc import Mapping

from octavo_kvcache.block import BlockHash
from octavo_kvcache.lookups import Lookup
from octavo_kvcache.table import BlockTable

SeqId = int | str
"""What a caller names its sequences by."""

NEVER = sys.maxsize
"""A number of tokens that no sequence reaches."""


class SequenceBlocks:
    """The tables of one sequence and how far it may write and has been hashed. Only the `CacheManager` writes it.

    Attributes:
        tables: one per group.
        root_hash: parent of the first block's hash.
        extra_keys: what block i depends on besides tokens, by i.
        hashes: hashes of the leading full blocks whose content is final.
        next_commit: number of computed tokens that completes the next block to be hashed.
        num_committed: tokens whose keys and values are computed and final.
        first_writable, writable_stop: the tokens [first_writable, writable_stop) lie in blocks that nobody else
            holds and that have no hash, so writing there needs no look at the blocks. A fork empties the range.
        lookup: look into the prefix cache that is to be counted when the sequence is admitted; None when it has been.

    """

    __slots__ = (
        "extra_keys",
        "first_writable",
        "hashes",
        "lookup",
        "next_commit",
        "num_committed",
        "root_hash",
        "tables",
        "writable_stop",
    )

    def __init__(self, tables: tuple[BlockTable, ...], root_hash: BlockHash, extra_keys: Mapping[int, bytes]) -> None:
        self.tables = tables
        self.root_hash = root_hash
        self.extra_keys = extra_keys
        self.hashes: list[BlockHash] = []
        self.next_commit = tables[0].block_size
        self.num_committed = 0
        self.first_writable = 0
        self.writable_stop = 0
        self.lookup: Lookup | None = None

    @property
    def block_size(self) -> int:
        return self.tables[0].block_size

    @property
    def num_tokens(self) -> int:
        """Tokens written, or scheduled to be written by the current step."""
        return self.tables[0].num_tokens

    @property
    def last_hash(self) -> BlockHash:
        """The hash that the next block's continues."""
        return self.hashes[-1] if self.hashes else self.root_hash

    def held(self) -> list[int]:
        """All blocks that the sequence holds a reference to, heads of all groups before tails."""
        if len(self.tables) == 1:
            return self.tables[0].held
        by_index = ((index, ids) for table in self.tables for index, ids in enumerate(table.held, table.num_null))
        return [block_id for _, block_id in sorted(by_index, key=lambda item: item[0])]

    def rewind(self, num_tokens: int) -> None:
        """Forget hashes and commits past `num_tokens`: what comes after it is written anew."""
        if num_tokens < self.num_committed:
            self.num_committed = num_tokens
        if num_tokens // self.block_size < len(self.hashes):
            del self.hashes[num_tokens // self.block_size :]
            if self.next_commit != NEVER:
                self.next_commit = (len(self.hashes) + 1) * self.block_size

    def fork(self, num_tokens: int | None = None) -> "SequenceBlocks":
        """Copy the state, cut after `num_tokens`; neither side writes a block before it has looked if it is alone."""
        child = SequenceBlocks(tuple(table.fork(num_tokens) for table in self.tables), self.root_hash, self.extra_keys)
        child.hashes = self.hashes.copy()
        child.next_commit = self.next_commit
        child.num_committed = self.num_committed
        if num_tokens is not None:
            child.rewind(num_tokens)
        self.writable_stop = child.writable_stop = 0
        return child
