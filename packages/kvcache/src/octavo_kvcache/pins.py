"""Pins: cached prefixes that are held against eviction, within a limit."""

from collections import Counter
from collections.abc import Sequence

from octavo_kvcache.errors import DuplicatePin, InvalidArgument, PinLimit, UnknownPin
from octavo_kvcache.pool import BlockPool


class Pins:
    """Which blocks are pinned, by pin: the part of a `CacheManager` that its caller asks for room, and gives it back.

    Room is set aside when a pin is asked for and its prefix has yet to be computed, so that what was granted can be
    held. Blocks that several pins share count for each: dropping one never takes room from another.

    Args:
        pool: the pool of the blocks.
        block_size: tokens per block.
        num_groups: blocks that as many tokens take.
        max_num_blocks: the most blocks that pins hold together.

    Attributes:
        num_reserved: blocks that are held or set aside, those of several pins once for each.

    """

    __slots__ = ("_block_size", "_held", "_num_groups", "_pool", "_refs", "_reserved", "max_num_blocks", "num_reserved")

    def __init__(self, pool: BlockPool, block_size: int, num_groups: int, max_num_blocks: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._num_groups = num_groups
        self.max_num_blocks = max_num_blocks
        self.num_reserved = 0
        self._reserved: dict[str, int] = {}
        self._held: dict[str, list[int]] = {}
        self._refs: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._reserved)

    def __contains__(self, pin_id: str) -> bool:
        return pin_id in self._reserved

    @property
    def num_blocks(self) -> int:
        """Blocks that pins hold, each once."""
        return len(self._refs)

    def reserve(self, pin_id: str, num_tokens: int) -> None:
        """Set room aside for a pin of the full blocks of `num_tokens` tokens, which may have yet to be computed.

        Raises:
            DuplicatePin: the id is in use.
            InvalidArgument: too few tokens for a block.
            PinLimit: pins would hold more than they may; nothing was changed.

        """
        num_blocks = num_tokens // self._block_size * self._num_groups
        if pin_id in self._reserved:
            raise DuplicatePin(f"pin {pin_id!r} exists already; drop it first or take another id")
        if num_blocks < 1:
            raise InvalidArgument(
                f"pin {pin_id!r} has {num_tokens} tokens, and whole blocks of {self._block_size} are pinned; pin more"
            )
        if self.num_reserved + num_blocks > self.max_num_blocks:
            raise PinLimit(num_blocks, self.num_reserved, self.max_num_blocks)
        self._reserved[pin_id] = num_blocks
        self.num_reserved += num_blocks

    def hold(self, pin_id: str, block_ids: Sequence[int]) -> None:
        """Hold the blocks for which room was set aside; they may be fewer. Call `CacheManager.pin` for it.

        Raises:
            UnknownPin: no room was set aside under this id.

        """
        num_reserved = self._reserved_for(pin_id)
        assert len(block_ids) <= num_reserved
        assert pin_id not in self._held
        self._pool.retain(block_ids)
        self._held[pin_id] = list(block_ids)
        self._refs.update(block_ids)

    def drop(self, pin_id: str) -> None:
        """Let go of a pin, whether its blocks are held or room was set aside for them.

        Raises:
            UnknownPin: there is no such pin.

        """
        self.num_reserved -= self._reserved_for(pin_id)
        del self._reserved[pin_id]
        block_ids = self._held.pop(pin_id, [])
        for block_id in block_ids:
            self._refs[block_id] -= 1
            if not self._refs[block_id]:
                del self._refs[block_id]
        self._pool.release(block_ids)

    def clear(self) -> None:
        """Let go of all pins."""
        for pin_id in list(self._reserved):
            self.drop(pin_id)

    def _reserved_for(self, pin_id: str) -> int:
        try:
            return self._reserved[pin_id]
        except KeyError:
            raise UnknownPin(f"pin {pin_id!r} does not exist: it was never made or has been dropped") from None
