"""BlockPool: all blocks of the cache, their reference counts, and the free list in the order of reuse."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from octavo_kvcache.block import NULL_BLOCK, Block, BlockHash
from octavo_kvcache.errors import CacheFull, InvalidArgument, InvalidBlock


class FreeList:
    """An intrusive doubly linked list of free blocks: O(1) at both ends and for removal from the middle.

        first                                                   last
        blocks without a hash, latest freed first | cached blocks, least recently used first

    Blocks are taken from the front. So a block that holds nothing is used before a cached one is evicted, and a
    block that was just in use is used again before one that was never touched, whose memory costs nothing yet.
    """

    __slots__ = ("_end", "num_blocks")

    def __init__(self) -> None:
        self._end = Block(NULL_BLOCK)  # closes the ring: its next is the first block, its prev the last
        self._end.prev_free = self._end.next_free = self._end
        self.num_blocks = 0

    def push_front(self, block: Block) -> None:
        self._insert_after(self._end, block)

    def push_back(self, block: Block) -> None:
        previous = self._end.prev_free
        assert previous is not None
        self._insert_after(previous, block)

    def pop_front(self) -> Block:
        block = self._end.next_free
        assert block is not None
        assert block is not self._end
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        previous, following = block.prev_free, block.next_free
        assert previous is not None
        assert following is not None
        previous.next_free, following.prev_free = following, previous
        block.prev_free = block.next_free = None
        self.num_blocks -= 1

    def __iter__(self) -> Iterator[Block]:
        block = self._end.next_free
        while block is not None and block is not self._end:
            yield block
            block = block.next_free

    def _insert_after(self, previous: Block, block: Block) -> None:
        following = previous.next_free
        assert following is not None
        block.prev_free, block.next_free = previous, following
        previous.next_free = following.prev_free = block
        self.num_blocks += 1


class BlockPool:
    """Hands out blocks, counts who holds them, and keeps cached blocks for reuse until they are evicted.

    Args:
        num_blocks: blocks in storage, the null block included; at least 2.
        on_evict: called with (block_hash, block_id) when a cached block is about to be handed out for new content.

    Attributes:
        num_shared: blocks that more than one table holds.
        num_refs: sum of all reference counts.
        num_cached: free blocks that still hold content under a hash.
        num_evictions: cached blocks that were handed out for new content, since the start.

    """

    __slots__ = ("_blocks", "_free", "_on_evict", "num_blocks", "num_cached", "num_evictions", "num_refs", "num_shared")

    def __init__(self, num_blocks: int, *, on_evict: Callable[[BlockHash, int], None] | None = None) -> None:
        if num_blocks < 2:
            raise InvalidArgument(f"num_blocks must be at least 2 (block 0 is the null block), got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_shared = 0
        self.num_refs = 0
        self.num_cached = 0
        self.num_evictions = 0
        self._on_evict = on_evict
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free = FreeList()
        for block in self._blocks[1:]:
            self._free.push_back(block)

    @property
    def num_usable(self) -> int:
        """Blocks that can be allocated: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return self._free.num_blocks

    @property
    def num_used(self) -> int:
        """Blocks that at least one table holds."""
        return self.num_usable - self._free.num_blocks

    def require(self, num_blocks: int) -> None:
        """Check that `num_blocks` blocks are free.

        Raises:
            CacheFull: fewer are.

        """
        if num_blocks > self._free.num_blocks:
            raise CacheFull(num_blocks, self._free.num_blocks, self.num_usable)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks, each with a reference count of 1; evict cached ones if they are first in line.

        Raises:
            CacheFull: fewer are free; then none is taken.

        """
        self.require(num_blocks)
        block_ids = []
        for _ in range(num_blocks):
            block = self._free.pop_front()
            if block.block_hash is not None:
                self._evict(block, block.block_hash)
            block.ref_count = 1
            block.twin = None
            block_ids.append(block.block_id)
        self.num_refs += num_blocks
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block; a cached free block leaves the free list.

        Raises:
            InvalidBlock: a block that is neither held nor cached, or is the null block.

        """
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                if block.block_hash is None:
                    raise InvalidBlock(
                        f"block {block_id} can not be retained: nobody holds it and nothing is cached in it"
                    )
                self._free.remove(block)
                self.num_cached -= 1
            elif block.ref_count == 1:
                self.num_shared += 1
            block.ref_count += 1
            self.num_refs += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference from each block, the last of `block_ids` first, so that tails are evicted before heads.

        A block that nobody holds any more goes to the free list: for reuse at once if it has no hash, else as the
        most recently used of the cached blocks.

        Raises:
            InvalidBlock: a block that nobody holds.

        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count == 0:
                raise InvalidBlock(f"block {block_id} can not be released: nobody holds it")
            block.ref_count -= 1
            self.num_refs -= 1
            if block.ref_count == 1:
                self.num_shared -= 1
            elif block.ref_count == 0:
                if block.block_hash is None:
                    self._free.push_front(block)
                else:
                    self._free.push_back(block)
                    self.num_cached += 1

    def ref_count(self, block_id: int) -> int:
        """Return how many tables hold the block."""
        return self._blocks[block_id].ref_count

    def block_hash(self, block_id: int) -> BlockHash | None:
        """Return the hash that the block's content is cached under, or None."""
        return self._blocks[block_id].block_hash

    def set_hash(self, block_id: int, block_hash: BlockHash) -> None:
        """Mark a held block as cached under `block_hash`.

        Raises:
            InvalidBlock: nobody holds the block.

        """
        block = self._blocks[block_id]
        if block.ref_count == 0:
            raise InvalidBlock(f"block {block_id} can not get a hash: nobody holds it")
        block.block_hash = block_hash

    def drop_hash(self, block_id: int) -> None:
        """Forget that anything is cached in the block; a free block becomes the first to be used again."""
        block = self._blocks[block_id]
        if block.block_hash is None:
            return
        block.block_hash = None
        if block.ref_count == 0:
            self.num_cached -= 1
            self._free.remove(block)
            self._free.push_front(block)

    def twin(self, block_id: int) -> int | None:
        """Return the block of the other tier that may have the same content: if it names this one as its twin."""
        return self._blocks[block_id].twin

    def set_twin(self, block_id: int, twin: int | None) -> None:
        """Note which block of the other tier has the same content; None where the content is about to change."""
        self._blocks[block_id].twin = twin

    def free_block_ids(self) -> list[int]:
        """List the free blocks in the order in which they will be used: for tests and tools, O(num_free)."""
        return [block.block_id for block in self._free]

    def _evict(self, block: Block, block_hash: BlockHash) -> None:
        block.block_hash = None
        self.num_cached -= 1
        self.num_evictions += 1
        if self._on_evict is not None:
            self._on_evict(block_hash, block.block_id)
