"""BlockTable: which blocks hold one sequence's tokens, in order, for one group of layers."""

from collections.abc import Sequence

from octavo_kvcache.block import NULL_BLOCK
from octavo_kvcache.errors import InvalidArgument


class BlockTable:
    """The blocks of one sequence. Only the `CacheManager` writes it; it counts no references, the `BlockPool` does.

        block_ids   0  0  7  3  9        block_size 4
        tokens      ----  89 ..  ...     num_null 2, num_tokens 18: block 9 holds tokens 16 and 17

    Attributes:
        block_ids: block of the tokens [i * block_size, (i + 1) * block_size) at index i.
        num_tokens: tokens written, or scheduled to be written by the current step.
        num_null: leading blocks that are behind a window and were replaced by the null block.
        deduplicated: indices of blocks that gave way to others with the same content, which the runner does not know
            yet: the next `TableUpdate` tells it.

    """

    __slots__ = ("block_ids", "block_size", "deduplicated", "num_null", "num_tokens")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_ids: list[int] = []
        self.num_tokens = 0
        self.num_null = 0
        self.deduplicated: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit into the blocks of the table."""
        return len(self.block_ids) * self.block_size

    @property
    def held(self) -> list[int]:
        """The blocks that the table holds a reference to: all but the leading null blocks."""
        return self.block_ids[self.num_null :]

    def grow(self, block_ids: Sequence[int]) -> None:
        """Append blocks."""
        self.block_ids.extend(block_ids)

    def deduplicate(self, index: int, block_id: int) -> int:
        """Take another block with the same content at an index; return the one that was there."""
        own, self.block_ids[index] = self.block_ids[index], block_id
        self.deduplicated.append(index)
        return own

    def skip(self, num_blocks: int) -> list[int]:
        """Replace all blocks before index `num_blocks` by the null block; return the ids that were replaced."""
        dropped = self.block_ids[self.num_null : num_blocks]
        self.block_ids[self.num_null : num_blocks] = [NULL_BLOCK] * len(dropped)
        self.num_null += len(dropped)
        return dropped

    def slots(self, start: int, stop: int) -> list[int]:
        """List the slots (block_id * block_size + offset) of the tokens [start, stop).

        Raises:
            InvalidArgument: a token behind the window or past the last block.

        """
        if not self.num_null * self.block_size <= start <= stop <= self.capacity:
            raise InvalidArgument(
                f"slots [{start}, {stop}) are not all in the table, which covers "
                f"[{self.num_null * self.block_size}, {self.capacity})"
            )
        size, block_ids = self.block_size, self.block_ids
        return [block_ids[token // size] * size + token % size for token in range(start, stop)]

    def fork(self, num_tokens: int | None = None) -> "BlockTable":
        """Make a second table with the blocks of the first `num_tokens` tokens (None: all); the caller retains them.

        Raises:
            InvalidArgument: more tokens than there are, or an end behind the window.

        """
        child = BlockTable(self.block_size)
        if num_tokens is None:
            child.block_ids = self.block_ids.copy()
            child.num_tokens = self.num_tokens
        else:
            if not self.num_null * self.block_size <= num_tokens <= self.num_tokens:
                raise InvalidArgument(
                    f"a table of {self.num_tokens} tokens, of which the first {self.num_null * self.block_size} are "
                    f"behind the window, can not be forked after {num_tokens}"
                )
            child.block_ids = self.block_ids[: -(-num_tokens // self.block_size)]
            child.num_tokens = num_tokens
        child.num_null = self.num_null
        child.deduplicated = [index for index in self.deduplicated if index < len(child.block_ids)]
        return child
