"""Admission: what a waiting sequence gets before it runs: cached blocks, and slots for its first tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from octavo_engine.residents import Residents
from octavo_engine.sequence import Sequence
from octavo_engine.types import NOTHING_CACHED, CachedTokens
from octavo_kvcache import Allocation, CacheFull


class Admission:
    """Finds out what a sequence need not compute, and whether there is room for the rest.

    Args:
        residents: the sequences that run, which need room to grow.
    """

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._cache = residents.cache

    def match(self, sequence: Sequence) -> CachedTokens:
        """Start a sequence in the cache with what is there of its tokens, unless each of them must be computed."""
        request, adapter = sequence.request, sequence.adapter
        if sequence.needs_whole_prompt:
            self._cache.add(sequence.seq_id, salt=request.salt, adapter=adapter)
            return NOTHING_CACHED
        token_ids = sequence.token_ids
        if sequence.num_tokens_to_enter < len(token_ids):  # leave one to compute
            token_ids = token_ids[: sequence.num_tokens_to_enter]
        if request.parent is not None and (num_shared := self._residents.share(sequence, token_ids)):
            return CachedTokens(fork=num_shared)
        resumed = sequence.num_preemptions > 0
        num_cached = self._cache.match(sequence.seq_id, token_ids, salt=request.salt, adapter=adapter, resumed=resumed)
        num_partial = num_cached % self._cache.block_size
        return CachedTokens(full=num_cached - num_partial, partial=num_partial)

    def try_allocate(self, sequence: Sequence, start: int, num_new: int) -> Allocation | None:
        """Allocate for the tokens from `start` on; None where that would leave too little for those that run."""
        if not self._fits(start, num_new):
            return None
        try:
            return self._cache.allocate(sequence.seq_id, start, num_new)
        except CacheFull:
            return None

    def bring_back(self, members: SequenceABC[Sequence], num_new: int) -> bool:
        """Give sequences that are on the host together their blocks; False where that would leave too few."""
        num_spare = 0  # alone they fit as they did before
        if running := self._residents.running:
            num_each = 1 + -(-num_new // self._cache.block_size)  # a block that it shares is copied
            num_spare = len(members) * num_each + len(running)
        return self._residents.swapper.try_in(members, num_spare)

    def _fits(self, start: int, num_new: int) -> bool:
        """Leave a free block for each running sequence to grow into, so that entering does not cause preemption."""
        running, block_size = self._residents.running, self._cache.block_size
        if not running:
            return True
        # Where it starts within a block, that block is somebody else's too and will be copied.
        num_blocks = -(-(start % block_size + num_new) // block_size)
        return self._cache.num_free >= num_blocks + len(running)
