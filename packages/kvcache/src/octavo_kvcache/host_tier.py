"""HostTier: the host blocks that sequences hold while they are swapped out, and which device blocks equal them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from octavo_kvcache.block import DEVICE, HOST, NULL_BLOCK, BlockCopy
from octavo_kvcache.empty_slots import EmptySlots
from octavo_kvcache.errors import UnknownSequence
from octavo_kvcache.growth import Growth
from octavo_kvcache.pool import BlockPool
from octavo_kvcache.prefix import group_hash
from octavo_kvcache.prefix_index import PrefixIndex
from octavo_kvcache.sequence import NEVER, SeqId, SequenceBlocks
from octavo_kvcache.stats import HostCounts


class SwapSize(NamedTuple):
    """What it takes to swap some sequences out and in again, and what giving their blocks up would lose.

    Attributes:
        num_out: blocks to copy to the host.
        num_in: blocks that nobody else holds: they are to be copied back.
        num_lost: blocks whose tokens would have to be computed again: those, and those that can not be hit.

    """

    num_out: int
    num_in: int
    num_lost: int


class HostTier:
    """Blocks in the host's memory, for sequences that have to wait: the part of a `CacheManager` that swaps them.

    A block that several sequences hold is copied once and stays shared, also if they leave at different times: a
    device block and the host block it was copied to are twins for as long as neither is given to other content nor
    overwritten. When sequences come back, blocks that are on the device still, as a twin that is held or cached or
    under the hash of their content, are held there again; only the others are copied.

    The copies of a call are to be applied before those of later calls, copies on write included, and after the steps
    in flight: in the next step, in the order of the calls. Then they hold what the steps in flight write too, and
    blocks of both tiers can be handed out again at once.

    Args:
        num_blocks: host blocks; block 0 is the null block here too.
        device: the pool of the device's blocks.
        prefix: which device blocks have which content.
        on_device: the sequences that have device blocks; those that swap leave it and come back to it.
        empty_slots: of those sequences.

    """

    __slots__ = (
        "_device",
        "_empty_slots",
        "_num_blocks_in",
        "_num_blocks_out",
        "_on_device",
        "_pool",
        "_prefix",
        "_sequences",
    )

    def __init__(
        self,
        num_blocks: int,
        device: BlockPool,
        prefix: PrefixIndex,
        on_device: dict[SeqId, SequenceBlocks],
        empty_slots: EmptySlots,
    ) -> None:
        self._device = device
        self._prefix = prefix
        self._on_device = on_device
        self._empty_slots = empty_slots
        self._pool = BlockPool(num_blocks)
        self._sequences: dict[SeqId, SequenceBlocks] = {}
        self._num_blocks_out = 0
        self._num_blocks_in = 0

    def __contains__(self, seq_id: SeqId) -> bool:
        return seq_id in self._sequences

    def size(self, seq_ids: Sequence[SeqId]) -> SwapSize:
        """Count what swapping some sequences together would take. Changes nothing.

        Raises:
            UnknownSequence: a sequence has no device blocks.

        """
        refs = Counter(block_id for seq in self._leaving(seq_ids).values() for block_id in seq.held())
        own = {block_id for block_id, num_refs in refs.items() if self._device.ref_count(block_id) == num_refs}
        return SwapSize(
            num_out=sum(self._twin_of(block_id) is None for block_id in refs),
            num_in=len(own),
            num_lost=sum(block_id in own or self._device.block_hash(block_id) is None for block_id in refs),
        )

    def swap_out(self, seq_ids: Sequence[SeqId]) -> list[BlockCopy]:
        """Move sequences to the host, all or none; return the copies. Their device blocks are free at once.

        Raises:
            CacheFull: too few host blocks are free; nothing was changed.
            UnknownSequence: a sequence has no device blocks.

        """
        sequences = self._leaving(seq_ids)
        held = dict.fromkeys(block_id for seq in sequences.values() for block_id in seq.held())
        wanted = [block_id for block_id in held if self._twin_of(block_id) is None]
        fresh = self._pool.allocate(len(wanted))
        for device_id, host_id in zip(wanted, fresh, strict=True):
            self._pair(device_id, host_id)
        for seq_id, seq in sequences.items():
            self._sequences[seq_id] = self._move_out(seq_id, seq)
        self._pool.release(fresh)  # the sequences hold them now
        self._num_blocks_out += len(wanted)
        return [BlockCopy(src, dst, DEVICE, HOST) for src, dst in zip(wanted, fresh, strict=True)]

    def swap_in(self, seq_ids: Sequence[SeqId], *, num_spare: int = 0) -> list[BlockCopy]:
        """Give sequences that were swapped out device blocks again, all or none; return the copies.

        Args:
            seq_ids: the sequences; `CacheManager.block_ids` tells their new tables.
            num_spare: device blocks that must be free afterwards.

        Raises:
            CacheFull: too few device blocks are free; nothing was changed.
            UnknownSequence: a sequence is not swapped out.

        """
        sequences = {seq_id: self._get(seq_id) for seq_id in seq_ids}
        found = self._find(sequences.values())
        held = dict.fromkeys(host_id for seq in sequences.values() for host_id in seq.held())
        missing = [host_id for host_id in held if host_id not in found]
        num_cached = sum(self._device.ref_count(device_id) == 0 for device_id in set(found.values()))
        self._device.require(len(missing) + num_cached + num_spare)
        self._device.retain(found.values())  # before others are allocated, which may evict
        fresh = self._device.allocate(len(missing))
        places = found | dict(zip(missing, fresh, strict=True))
        for seq_id, seq in sequences.items():
            self._move_in(seq_id, seq, places)
        self._device.release([*places.values()])  # the sequences hold them now
        for host_id, device_id in zip(missing, fresh, strict=True):
            self._pair(device_id, host_id)
        self._count_empty_slots(sequences.values())
        self._num_blocks_in += len(missing)
        return [BlockCopy(src, dst, HOST, DEVICE) for src, dst in zip(missing, fresh, strict=True)]

    def distrust_copies(self) -> None:
        """Take note that a step failed, so that copies of its own and of later ones may not have been made."""
        for block_id in range(self._device.num_blocks):
            self._device.set_twin(block_id, None)

    def counts(self) -> HostCounts:
        """Count what is held, and what was copied since the start."""
        return HostCounts(
            num_blocks=self._pool.num_blocks,
            num_used=self._pool.num_used,
            num_sequences=len(self._sequences),
            num_blocks_out=self._num_blocks_out,
            num_blocks_in=self._num_blocks_in,
        )

    def free(self, seq_id: SeqId) -> None:
        """Drop a sequence that was swapped out.

        Raises:
            UnknownSequence: it was not.

        """
        seq = self._get(seq_id)
        del self._sequences[seq_id]
        self._pool.release(seq.held())

    def overwrite(self, growth: Growth) -> None:
        """Take note that the blocks of a growth, which has been carried out, get other content."""
        for group in growth.groups:
            for block_id in group.table.block_ids[growth.first_block : growth.end_block]:
                self._device.set_twin(block_id, None)

    def forget_hashes(self) -> None:
        """Let no sequence come back by way of the prefix cache, nor be cached."""
        for seq in self._sequences.values():
            seq.hashes.clear()
            seq.next_commit = NEVER

    def _get(self, seq_id: SeqId) -> SequenceBlocks:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise UnknownSequence(f"sequence {seq_id!r} is not swapped out") from None

    def _leaving(self, seq_ids: Sequence[SeqId]) -> dict[SeqId, SequenceBlocks]:
        for seq_id in seq_ids:
            if seq_id not in self._on_device:
                raise UnknownSequence(f"sequence {seq_id!r} has no device blocks: it was never added, freed or swapped")
        return {seq_id: self._on_device[seq_id] for seq_id in seq_ids}

    def _move_out(self, seq_id: SeqId, seq: SequenceBlocks) -> SequenceBlocks:
        """Make a sequence's tables name host blocks, which it holds from now on instead of those of the device."""
        waiting = seq.fork()
        for table in waiting.tables:
            table.block_ids[table.num_null :] = [self._twin(block_id) for block_id in table.held]
            self._pool.retain(table.held)
        self._empty_slots.leave(seq)
        del self._on_device[seq_id]
        self._device.release(seq.held())
        return waiting

    def _move_in(self, seq_id: SeqId, seq: SequenceBlocks, places: Mapping[int, int]) -> None:
        """Make a sequence's tables name device blocks, which it holds from now on instead of those of the host.

        What is copied counts as computed, and can be hit, when the next `commit` says that the copies were made.
        """
        self._pool.release(seq.held())
        for table in seq.tables:
            table.block_ids[table.num_null :] = [places[host_id] for host_id in table.held]
            self._device.retain(table.held)
        num_hashed = self._num_hashed(seq)
        del seq.hashes[num_hashed:]
        if seq.next_commit != NEVER:
            seq.next_commit = (num_hashed + 1) * seq.block_size
        seq.num_committed = seq.first_writable = num_hashed * seq.block_size
        seq.writable_stop = 0
        del self._sequences[seq_id]
        self._on_device[seq_id] = seq

    def _count_empty_slots(self, sequences: Iterable[SequenceBlocks]) -> None:
        """Count those of sequences that came back, and of others whose blocks they hold again."""
        joined = {block_id for seq in sequences for block_id in seq.held()}
        newcomers = set(sequences)
        self._empty_slots.recount((seq for seq in self._on_device.values() if seq not in newcomers), joined)
        for seq in newcomers:
            self._empty_slots.enter(seq)

    def _num_hashed(self, seq: SequenceBlocks) -> int:
        """Count the leading blocks that the prefix cache has."""
        for index in range(len(seq.hashes)):
            block_ids = [table.block_ids[index] for table in seq.tables]
            if any(b != NULL_BLOCK and self._device.block_hash(b) is None for b in block_ids):
                return index
        return len(seq.hashes)

    def _pair(self, device_id: int, host_id: int) -> None:
        self._device.set_twin(device_id, host_id)
        self._pool.set_twin(host_id, device_id)

    def _twin_of(self, device_id: int) -> int | None:
        """Return the held host block with the content of a device block."""
        host_id = self._device.twin(device_id)
        if host_id is None or self._pool.twin(host_id) != device_id or self._pool.ref_count(host_id) == 0:
            return None
        return host_id

    def _twin(self, device_id: int) -> int:
        host_id = self._twin_of(device_id)
        assert host_id is not None
        return host_id

    def _find(self, sequences: Iterable[SequenceBlocks]) -> dict[int, int]:
        """Find the device blocks with the content of the host blocks that some sequences hold."""
        found: dict[int, int] = {}
        for seq in sequences:
            for group, table in enumerate(seq.tables):
                for index, host_id in enumerate(table.held, table.num_null):
                    device_id = self._find_hash(seq, index, group)
                    if device_id is None:
                        device_id = self._find_twin(host_id)
                    if device_id is not None:
                        found.setdefault(host_id, device_id)
        return found

    def _find_hash(self, seq: SequenceBlocks, index: int, group: int) -> int | None:
        return self._prefix.get(group_hash(seq.hashes[index], group)) if index < len(seq.hashes) else None

    def _find_twin(self, host_id: int) -> int | None:
        device_id = self._pool.twin(host_id)
        if device_id is None or self._device.twin(device_id) != host_id:
            return None
        on_device = self._device.ref_count(device_id) > 0 or self._device.block_hash(device_id) is not None
        return device_id if on_device else None
